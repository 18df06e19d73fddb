"""Pictures of runs, as a user asks for them. What is wrong with a file or a name is in test_faults_files.py."""

import numpy as np
import pytest
from conftest import SHIPPED

HEADER = (SHIPPED / "progress.csv").read_text().splitlines()[0]


def curve(figure, panel, index):
    """Return the points that a curve shows in a panel of a picture."""
    points = figure.axes[panel].lines[index].get_xydata()
    return points[np.isfinite(points).all(axis=1)]


@pytest.mark.parametrize("scores", ["nan,nan", "-20.5,-19"])
def test_run_without_a_finished_game_or_with_negative_scores_is_drawn(tmp_path, draw, figures, capfd, scores):
    row = f"0,1.5,{scores},0,0,1,1,0.1,20"
    (tmp_path / "progress.csv").write_text(f"{HEADER}\n5,100,{row}\n10,200,{row}\n")
    draw(tmp_path)
    printed = capfd.readouterr()
    assert printed.err == ""
    assert ("no game has ended yet" in printed.out) == ("nan" in scores)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    if "nan" not in scores:
        low, high = figures[0].axes[0].get_ylim()
        assert low < -20.5 < -19 < high


def test_each_loss_has_a_panel(tmp_path, draw, figures):
    (tmp_path / "progress.csv").write_text(f"{HEADER}\n5,1000,1,1.5,3,5,0.1,0.2,0.3,0.4,0.5,20\n")
    draw(tmp_path)
    shown = {axes.get_title(): curve(figures[1], panel, 0).tolist() for panel, axes in enumerate(figures[1].axes)}
    values = {"policy_loss": 0.1, "value_loss": 0.2, "entropy": 0.3, "gradient_norm": 0.4, "learning_rate": 0.5}
    assert shown == {name: [[0.001, value]] for name, value in {**values, "steps_per_second": 20}.items()}


def test_references_are_drawn_as_far_as_the_run_by_steps_and_whole_by_the_hours_that_they_know(tmp_path, draw, figures):
    (tmp_path / "progress.csv").write_text(f"{HEADER}\n5,1000,1,1.5,3,5,0,0,1,1,0.1,20\n")
    points = "run,agent_steps,average_score,seconds\na,500,7,nan\na,900,8,nan\na,9000,9000,nan\nb,9000,30,3600\n"
    (tmp_path / "points.csv").write_text("# A comment.\n" + points)
    draw(tmp_path, "--reference", tmp_path / "points.csv", "--out", tmp_path / "pictures")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"scores.png", "losses.png"}
    by_steps = figures[0].axes[0]
    shown = [[curve(figures[0], panel, index).tolist() for index in (2, 3)] for panel in range(3)]
    assert shown == [[[[0.0005, 7], [0.0009, 8]], []], [[], []], [[], [[1, 30]]]]
    assert by_steps.lines[2].get_linestyle() == "--"
    assert by_steps.lines[3].get_marker() == "o"
    assert 30 < by_steps.get_ylim()[1] < 9000


def test_each_game_has_a_panel_with_its_runs_and_its_references(tmp_path, draw, figures):
    for name, score in ("Pong-1", -3), ("Qbert-1", 500), ("Pong-2", 4):
        (tmp_path / name).mkdir()
        (tmp_path / name / "progress.csv").write_text(f"{HEADER}\n5,1000,1,1.5,{score},5,0,0,1,1,0.1,20\n")
    (tmp_path / "points.csv").write_text("run,agent_steps,average_score\nPong-a peer,9000,17\nEnduro-a peer,9000,8\n")
    runs = [tmp_path / name for name in ("Pong-1", "Qbert-1", "Pong-2")]
    draw(*runs, "--by_game", "--reference", tmp_path / "points.csv", "--out", tmp_path)
    assert (tmp_path / "games.png").read_bytes().startswith(b"\x89PNG")
    pong, qbert = (axes for axes in figures[0].axes if axes.get_visible())
    shown = [[line.get_xydata().tolist() for line in axes.lines] for axes in (pong, qbert)]
    assert shown == [[[[0.001, -3]], [[0.001, 4]], [[0.009, 17]]], [[[0.001, 500]]]]
    assert (pong.get_title(), qbert.get_title()) == ("Pong", "Qbert")
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["these runs", "a peer"]


def test_runs_are_drawn_as_far_as_asked_and_a_run_that_begins_later_or_is_not_there_is_named(tmp_path, draw, figures):
    draw(SHIPPED, "--out", tmp_path)
    draw(SHIPPED, "--steps", 1e6, "--out", tmp_path)
    whole, part = (curve(figure, 0, 0) for figure in figures[::2])
    np.testing.assert_array_equal(part, whole[whole[:, 0] <= 1])
    assert len(part) < len(whole)
    with pytest.raises(SystemExit, match=r"^plot\.py: error: --steps 10: [^\n]*$"):
        draw(SHIPPED, "--steps", 10, "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"^plot\.py: error: cannot read [^\n]*nothing[^\n]*$"):
        draw(tmp_path / "nothing")
