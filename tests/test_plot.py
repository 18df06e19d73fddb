"""Pictures of runs, as a user asks for them."""

import subprocess
import sys

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
