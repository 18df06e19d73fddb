"""Pictures of runs, as a user asks for them."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

SHIPPED = "models/breakout-v0"


def plot(*arguments):
    command = [sys.executable, "plot.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("scores", ["nan,nan", "-20.5,-19"])
def test_run_without_a_finished_game_or_with_negative_scores_is_drawn(tmp_path, scores):
    header = (ROOT / SHIPPED / "progress.csv").read_text().splitlines()[0]
    (tmp_path / "progress.csv").write_text(
        f"{header}\n5,100,0,1.5,{scores},0,0,1,1,0.1,20\n10,200,0,2,{scores},0,0,1,1,0.1,20\n"
    )
    process = plot(tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert Image.open(tmp_path / "scores.png").size == (1500, 450)


def test_several_runs_and_a_reference_are_drawn_into_the_folder_asked_for(tmp_path):
    process = plot(SHIPPED, "results/busy-machine", "--reference", "results/original.csv", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "losses.png"}


def test_references_are_drawn_by_steps_and_by_the_hours_that_they_know(tmp_path):
    head, row = "run,agent_steps,average_score,seconds\n", "a point,10000000,100,"
    pictures = []
    for name, text in {
        "none": row + "nan\n",
        "seconds": row + "3600\n",
        "two": row + "nan\na point,2e7,100,nan\n",
    }.items():
        (tmp_path / "reference.csv").write_text(head + text)
        references = ["--reference", "results/original.csv", tmp_path / "reference.csv"]
        process = plot(SHIPPED, *references, "--out", tmp_path / name)
        assert process.returncode == 0, process.stderr
        pictures.append(np.asarray(Image.open(tmp_path / name / "scores.png").convert("L"), int)[100:])
    differs = [np.unique(np.nonzero(picture != pictures[0])[1]) for picture in pictures[1:]]
    assert differs[0].size and differs[0].min() > 1000  # the point of one hour, in the third panel
    assert differs[1].size and differs[1].max() < 600  # the line in place of a point, in the first


def test_runs_are_drawn_as_far_as_asked_and_a_run_that_begins_later_is_an_error(tmp_path):
    assert plot(SHIPPED, "--steps", 1e6, "--out", tmp_path / "part").returncode == 0
    assert plot(SHIPPED, "--out", tmp_path / "whole").returncode == 0
    part, whole = ((tmp_path / name / "scores.png").read_bytes() for name in ("part", "whole"))
    assert part != whole
    process = plot(SHIPPED, "--steps", 10, "--out", tmp_path)
    assert process.returncode == 1
    assert "--steps 10" in process.stderr and len(process.stderr.splitlines()) == 1


def test_run_that_is_not_there_is_named(tmp_path):
    process = plot(tmp_path / "nothing")
    assert process.returncode == 1
    assert "nothing" in process.stderr and len(process.stderr.splitlines()) == 1
