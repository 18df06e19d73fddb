"""The runner of experiments, as a user calls it."""

import csv
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.common import Child, read_rows
from benchmarks.experiments import read_list, summary


def command(folder, text, *flags):
    """Return the command line that runs the list `text`."""
    (folder / "list.txt").write_text(text)
    words = [folder / "list.txt", f"--out={folder}/table.csv", f"--log_dir={folder}/runs", *flags]
    return [sys.executable, "-m", "benchmarks.experiments", *map(str, words)]


def search(folder, text, *flags):
    """Run the list `text`; return the process and the rows of its table."""
    words = command(folder, text, *flags)
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    with open(folder / "table.csv", newline="") as file:
        return process, list(csv.DictReader(file))


def test_every_configuration_is_run_with_every_seed_once_and_failures_have_rows_too(tmp_path):
    tiny = "--num_threads=1 --agents_per_thread=2 --summary_period=2"
    text = f"tiny one: {tiny}  # a comment\n\nwrong: --gae_lambda=2\n"
    process, rows = search(tmp_path, text, "--steps=205", "--seeds", 1, 2)  # rows of progress.csv: 20, 40, ...
    assert process.returncode == 0, process.stderr
    found = {(row["name"], row["seed"]): row for row in rows}
    assert found.keys() == {(name, seed) for name in ("tiny one", "wrong") for seed in "12"}
    for (name, seed), row in found.items():
        if name == "wrong":
            assert row["ended"] == "failed with exit status 2"
            assert row["agent_steps"] == ""
        else:
            assert row["flags"] == tiny
            assert row["ended"] == "done"
            assert row["agent_steps"] == "205"
            assert read_rows(tmp_path / "runs" / f"tiny-one-{seed}" / "progress.csv")[-1]["agent_steps"] == "200"
            assert (tmp_path / "runs" / f"tiny-one-{seed}" / "last.ckpt.index").exists()
    process, again = search(tmp_path, f"tiny one: {tiny}\n", "--steps=205", "--seeds", 1, 2)
    assert process.stdout == ""
    assert again == rows


@pytest.mark.slow
def test_search_that_is_stopped_saves_its_runs_and_resumes_them_the_next_time(tmp_path):
    text, run = "tiny: --num_threads=1 --agents_per_thread=2 --summary_period=2\n", tmp_path / "runs" / "tiny-1"
    with Child(command(tmp_path, text, "--steps=1000000000")) as child:
        child.wait_for(lambda: read_rows(run / "progress.csv"), 60)
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(30) == 0
    assert (run / "last.ckpt.index").exists()
    assert not (tmp_path / "table.csv").exists()
    process, (row,) = search(tmp_path, text, "--steps=20")  # fewer than it has
    assert process.returncode == 0, process.stderr
    assert "resumed " in (run / "output.txt").read_text()
    assert row["ended"] == "done"
    assert row["agent_steps"] == read_rows(run / "progress.csv")[-1]["agent_steps"]


def test_end_between_two_rows_counts_only_where_no_row_was_due_and_the_run_came_to_it():
    rows = [{"agent_steps": str(n), "average_score": "3", "steps_per_second": "1e4"} for n in (960_000, 990_000)]
    ends = {steps: summary(rows, steps) for steps in (0, 1_000_000, 1_020_000)}
    assert [cells["agent_steps"] for cells in ends.values()] == [990_000, 1_000_000, 990_000]
    assert [cells["1M"] for cells in ends.values()] == ["", "3.0", ""]
    assert summary(rows[:1], 1_000_000)["agent_steps"] == 1_000_000
    assert summary([], 1_000_000)["agent_steps"] == ""


def test_marks_are_means_of_the_scores_up_to_them_and_empty_where_the_run_ended_before():
    steps_and_scores = [(350_000, 1), (420_000, 2), (500_000, 4), (600_000, 9), (980_000, 5), (1_100_000, 7)]
    speeds = [9_000, 10_000, 11_000, 10_000, 10_000, 10]  # the last row stood still for a while
    rows = [
        {"agent_steps": str(n), "average_score": str(x), "steps_per_second": str(speed)}
        for (n, x), speed in zip(steps_and_scores, speeds, strict=True)
    ]
    cells = summary(rows)
    assert (cells["0.5M"], cells["1M"], cells["2M"], cells["10M"]) == ("3.0", "5.0", "", "")
    assert (cells["agent_steps"], cells["minutes"]) == (1_100_000, "1.8")


@pytest.mark.parametrize("text", ["no colon", "twice: --a\ntwice: --b"])
def test_list_that_cannot_be_read_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=text.split(":")[0]):
        read_list(tmp_path / "list.txt")
