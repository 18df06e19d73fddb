"""Pictures of runs, as a user asks for them."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

import plot

SHIPPED = "models/breakout-v0"


@pytest.fixture
def draw(monkeypatch):
    """Return a function that runs the command line in this process; what is wrong raises SystemExit."""

    def call(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()

    return call


@pytest.mark.parametrize("scores", ["nan,nan", "-20.5,-19"])
def test_run_without_a_finished_game_or_with_negative_scores_is_drawn(tmp_path, draw, capfd, scores):
    header = (ROOT / SHIPPED / "progress.csv").read_text().splitlines()[0]
    (tmp_path / "progress.csv").write_text(
        f"{header}\n5,100,0,1.5,{scores},0,0,1,1,0.1,20\n10,200,0,2,{scores},0,0,1,1,0.1,20\n"
    )
    draw(tmp_path)
    assert capfd.readouterr().err == ""
    assert Image.open(tmp_path / "scores.png").size == (1500, 450)


@pytest.fixture
def limits(monkeypatch):
    """Return the lists of lowest and highest score that pictures of scores show."""
    seen, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (seen.append(self.axes[0].get_ylim()), save(self, *a, **k))
    )
    return seen


def test_no_score_is_cut_off_be_it_negative_or_a_references(tmp_path, draw, limits):
    header = (ROOT / SHIPPED / "progress.csv").read_text().splitlines()[0]
    (tmp_path / "progress.csv").write_text(f"{header}\n5,1000,0,1.5,-20.5,-19,0,0,1,1,0.1,20\n")
    draw(tmp_path)
    assert limits[0][0] < -20.5 < -19 < limits[0][1]
    (tmp_path / "points.csv").write_text("agent_steps,average_score,seconds\n500,7,nan\n9000,9000,nan\n9000,30,3600\n")
    draw(tmp_path, "--reference", tmp_path / "points.csv")
    assert 30 < limits[2][1] < 9000  # the third is seen by hours, the second nowhere
    assert limits[2][0] < -20.5


def test_several_runs_and_a_reference_are_drawn_into_the_folder_asked_for(tmp_path, draw):
    draw(SHIPPED, "results/busy-machine", "--reference", "results/original.csv", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "losses.png"}


def test_references_are_drawn_by_steps_and_by_the_hours_that_they_know(tmp_path, draw):
    head, row = "run,agent_steps,average_score,seconds\n", "a point,10000000,100,"
    pictures = []
    for name, text in {
        "none": row + "nan\n",
        "seconds": row + "3600\n",
        "two": row + "nan\na point,2e7,100,nan\n",
    }.items():
        (tmp_path / "reference.csv").write_text(head + text)
        references = ["--reference", "results/original.csv", tmp_path / "reference.csv"]
        draw(SHIPPED, *references, "--out", tmp_path / name)
        pictures.append(np.asarray(Image.open(tmp_path / name / "scores.png").convert("L"), int)[100:])
    differs = [np.unique(np.nonzero(picture != pictures[0])[1]) for picture in pictures[1:]]
    assert differs[0].size and differs[0].min() > 1000  # the point of one hour, in the third panel
    assert differs[1].size and differs[1].max() < 600  # the line in place of a point, in the first


def test_runs_are_drawn_as_far_as_asked_and_a_run_that_begins_later_is_an_error(tmp_path, draw):
    draw(SHIPPED, "--steps", 1e6, "--out", tmp_path / "part")
    draw(SHIPPED, "--out", tmp_path / "whole")
    part, whole = ((tmp_path / name / "scores.png").read_bytes() for name in ("part", "whole"))
    assert part != whole
    with pytest.raises(SystemExit, match=r"^plot\.py: error: --steps 10: [^\n]*$"):
        draw(SHIPPED, "--steps", 10, "--out", tmp_path)


def test_run_that_is_not_there_is_named(tmp_path, draw):
    with pytest.raises(SystemExit, match=r"^plot\.py: error: cannot read [^\n]*nothing[^\n]*$"):
        draw(tmp_path / "nothing")
