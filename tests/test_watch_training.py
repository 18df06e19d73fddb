"""`benchmarks/watch_training.py`: each new checkpoint of a run is played once and noted."""

import csv
import os
import subprocess
import sys

import gymnasium
import pytest
from conftest import Resumable, watching
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import plot
from benchmarks import watch_training


@pytest.fixture
def watch_once(tmp_path, monkeypatch):
    """Return a function that evaluates the newest checkpoint of tmp_path once; returns all rows of the table."""
    monkeypatch.setattr(os, "nice", lambda _: None)

    def call(*flags):
        own = ["--once", "--games=2", "--film=0", "--device=cpu", "--game=Breakout-v0", "--frameskip=20"]
        monkeypatch.setattr(sys, "argv", ["watch_training", str(tmp_path), *own, *flags])
        watch_training.main()
        if not (tmp_path / "evaluation.csv").exists():
            return []
        with open(tmp_path / "evaluation.csv", newline="") as file:
            return list(csv.DictReader(file))

    return call


@pytest.fixture
def short_games_here(monkeypatch):
    """Let a3c-test.py play in this process, no more than 20 steps of a game."""
    make = watching.make_watching_env

    def play(command, **_):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            return subprocess.CompletedProcess(command, watching.main())

    monkeypatch.setattr(subprocess, "run", play)
    monkeypatch.setattr(watching, "make_watching_env", lambda *a, **k: gymnasium.wrappers.TimeLimit(make(*a, **k), 20))


def test_each_checkpoint_is_played_once_and_noted_in_table_and_curves(tmp_path, watch_once, short_games_here, capsys):
    assert watch_once() == []
    run = Resumable(tmp_path, filters=1)
    run.save(30)
    (row,) = watch_once()
    assert (row["iteration"], row["agent_steps"], row["games"]) == ("30", "300", "2")
    assert float(row["average_score"]) <= float(row["maximum_score"])
    assert (tmp_path / "evaluation/30/results.json").exists()
    assert watch_once() == [row]
    assert "has no save that has not been played" in capsys.readouterr().out
    run.save(40)
    assert watch_once("--every=101") == [row]
    rows = watch_once("--every=100")
    assert [row["iteration"] for row in rows] == ["30", "40"]
    curves = EventAccumulator(str(tmp_path / "evaluation"), size_guidance={"tensors": 0}).Reload()
    assert [point.step for point in curves.Tensors("average_rewards")] == [30, 40]
    ((_, columns),) = plot.read_references(str(tmp_path / "evaluation.csv"))
    assert list(columns["agent_steps"]) == [300, 400]


@pytest.mark.parametrize("flag", ["--out=elsewhere", "--iter=1", "--model=another"])
def test_flag_that_would_make_its_row_of_something_else_is_refused(watch_once, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        watch_once(flag)
    assert flag.partition("=")[0] + ": this program says that itself" in capsys.readouterr().err


@pytest.mark.row(n=11)
def test_checkpoint_that_cannot_be_played_is_named(tmp_path, watch_once):
    path = Resumable(tmp_path, filters=1, num_actions=6).save(30)
    with pytest.raises(SystemExit, match=f"{path} could not be played: a3c-test.py: error: {path} is of a game with 6"):
        watch_once()
    (tmp_path / f"model.ckpt-50{checkpoint.INDEX}").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="ckpt-50 is damaged"):
        watch_once()


@pytest.mark.parametrize(
    "status, errors, said",
    [
        (2, "Unrecognized options: --polcy\n+----+\n", "^Unrecognized options: --polcy"),
        (-9, "\r  0%|   | 0/30\r  3%|   | 1/30", "could not be played: it was stopped$"),
        (1, "a\nKeyError: b\n  0%|", "could not be played: KeyError: b$"),
    ],
)
def test_why_a_checkpoint_was_not_played_is_said(tmp_path, watch_once, monkeypatch, status, errors, said):
    Resumable(tmp_path, filters=1).save(30)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, status, "", errors))
    with pytest.raises(SystemExit, match=said):
        watch_once()
