"""The runner of experiments, as a user calls it."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, ended

from benchmarks import experiments, games
from benchmarks.common import read_rows
from benchmarks.experiments import Trial, read_list, summary, write

TINY = "--num_threads=1 --agents_per_thread=2 --summary_period=2"  # rows of progress.csv: 20, 40, ... agent steps


def command(folder, text, *flags):
    (folder / "list.txt").write_text(text)
    words = [folder / "list.txt", f"--out={folder}/table.csv", f"--log_dir={folder}/runs", *flags]
    return [sys.executable, "-m", "benchmarks.experiments", *map(str, words)]


def search(folder, text, *flags):
    status, printed, errors = ended(command(folder, text, *flags))
    assert status == 0, errors
    with open(folder / "table.csv", newline="") as file:
        return printed, list(csv.DictReader(file))


def test_every_configuration_is_run_with_every_seed_once_and_failures_have_rows_too(tmp_path, monkeypatch, main):
    (tmp_path / "list.txt").write_text(f"tiny one: {TINY}  # a comment\n\nwrong: --gae_lambda=2\n")

    def search(*seeds):
        """Run it in this process; the fixture `main` gives the handlers of signals back."""
        words = [tmp_path / "list.txt", f"--out={tmp_path}/table.csv", f"--log_dir={tmp_path}/runs", "--steps=205"]
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, words), "--seeds", *seeds])
        experiments.main()
        with open(tmp_path / "table.csv", newline="") as file:
            return {(r["name"], r["seed"]): (r["flags"], r["agent_steps"], r["ended"]) for r in csv.DictReader(file)}

    tiny, wrong = (TINY, "205", "done"), ("--gae_lambda=2", "", "failed with exit status 2")
    assert search("1") == {("tiny one", "1"): tiny, ("wrong", "1"): wrong}
    assert read_rows(tmp_path / "runs/tiny-one-1/progress.csv")[-1]["agent_steps"] == "200"
    assert (tmp_path / "runs/tiny-one-1/last.ckpt.index").exists()
    ran = []
    monkeypatch.setattr(experiments, "follow", lambda words, *_: ran.append(words) or 2)
    failed = (TINY, "", "failed with exit status 2")
    expected = {("tiny one", "1"): tiny, ("tiny one", "2"): failed, ("wrong", "1"): wrong, ("wrong", "2"): wrong}
    assert search("1", "2") == expected
    assert all("--annealing_steps=160000000" in words for words in ran)  # as in a run of the defaults
    assert {word for words in ran for word in words if "--log_dir" in word} == {
        f"--log_dir={tmp_path}/runs/{name}" for name in ("tiny-one-2", "wrong-1", "wrong-2")
    }


@pytest.mark.slow
def test_search_that_is_stopped_saves_its_runs_and_resumes_them_the_next_time(tmp_path):
    run, end = tmp_path / "runs" / "tiny-1", time.monotonic() + 60
    process = subprocess.Popen(command(tmp_path, f"tiny: {TINY}\n", "--steps=1000000000"), cwd=ROOT)
    while not read_rows(run / "progress.csv"):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert (run / "last.ckpt.index").exists()
    assert not (tmp_path / "table.csv").exists()
    _, (row,) = search(tmp_path, f"tiny: {TINY}\n", "--steps=20")  # fewer than it has
    assert "resumed " in (run / "output.txt").read_text()
    assert (row["ended"], row["agent_steps"]) == ("done", read_rows(run / "progress.csv")[-1]["agent_steps"])


TRAINING = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("began", flush=True)
told = signal.sigtimedwait([signal.SIGTERM], 60)
print("told to end by signal", told.si_signo, flush=True)
"""


def test_training_does_not_outlive_a_search_that_is_killed(tmp_path):
    output, end = tmp_path / "output.txt", time.monotonic() + 60
    call = f"follow(['-c', {TRAINING!r}], {os.sched_getaffinity(0)}, {str(output)!r}, threading.Event())"
    words = [sys.executable, "-c", f"import threading; from benchmarks.experiments import follow; {call}"]
    with subprocess.Popen(words, cwd=ROOT) as search:
        for expected in ("began\n", f"began\ntold to end by signal {signal.SIGTERM:d}\n"):
            while not output.exists() or output.read_text() != expected:
                assert time.monotonic() < end
                time.sleep(0.1)
            search.kill()


@pytest.mark.parametrize(
    "trials, expected", [("a", [[2, 3, 5, 7]]), ("abc", [[2, 7], [3], [5]]), ("abcdef", [[2], [3], [5], [7]]), ("", [])]
)
def test_fewer_runs_than_cores_share_all_of_them(monkeypatch, trials, expected):
    monkeypatch.setattr(experiments.os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    ran, at_work = [], threading.Barrier(max(1, len(expected)))

    def run_trial(trial, cores, stop):
        if len(ran) < len(expected):  # each worker gets one of the first
            ran.append(cores)
            at_work.wait(30)
        return {"name": trial}

    rows = []
    experiments.on_all_cores(list(trials), run_trial, rows.append)
    assert sorted(ran) == expected
    assert sorted(row["name"] for row in rows) == sorted(trials)


ROWS = [(350_000, 1), (420_000, 2), (500_000, 4), (600_000, 9), (980_000, 5), (1_100_000, 7)]


@pytest.mark.parametrize(
    "rows, steps, expected",
    [
        ([], 1_000_000, {"agent_steps": ""}),
        ([(960_000, 3), (990_000, 3)], 0, {"agent_steps": 990_000, "1M": ""}),
        ([(960_000, 3), (990_000, 3)], 1_000_000, {"agent_steps": 1_000_000, "1M": "3.0"}),  # the next row was not due
        ([(960_000, 3), (990_000, 3)], 1_020_000, {"agent_steps": 990_000, "1M": ""}),
        ([(450_000, "nan"), (960_000, "nan"), (10**6, 3)], 0, {"0.5M": "", "1M": "3.0"}),  # no game had ended
        (ROWS, 0, {"0.5M": "3.0", "1M": "5.0", "2M": "", "10M": "", "agent_steps": 1_100_000, "minutes": "1.8"}),
    ],
)
def test_marks_are_means_of_the_scores_up_to_them_and_empty_where_the_run_ended_before(rows, steps, expected):
    rows = [{"agent_steps": str(n), "average_score": str(score), "steps_per_second": "10000"} for n, score in rows]
    if rows:
        rows[-1]["steps_per_second"] = "10"  # it stood still for a while: the median counts
        rows.insert(0, {**rows[0], "agent_steps": "8000", "steps_per_second": "nan"})
    assert expected.items() <= summary(rows, steps).items()


@pytest.mark.parametrize(
    "text, said",
    [
        ("no colon", "no colon"),
        ("twice: --a\ntwice: --b", "twice"),
        ("a b: --a\na-b: --b", "a-b"),
        ("x: --game='A", "No closing"),
    ],
)
def test_list_that_cannot_be_read_is_refused(tmp_path, text, said):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_list(tmp_path / "list.txt")


@pytest.mark.parametrize("program", [experiments, games])
@pytest.mark.parametrize("out", ["none/table.csv", "folder", "binary", "foreign"])
def test_table_that_cannot_be_added_to_is_refused_before_anything_is_trained(tmp_path, monkeypatch, program, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "foreign").write_text("a,b\n1,2\n")
    (tmp_path / "list.txt").write_text("a: --filters 1\n")
    words = [str(tmp_path / "list.txt")] if program is experiments else []
    monkeypatch.setattr(sys, "argv", ["x.py", *words, f"--out={tmp_path / out}", f"--log_dir={tmp_path}/log"])
    monkeypatch.setattr(program, "on_all_cores", lambda *_: pytest.fail("it trained"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"^(experiments|games)\.py: error: "):
        program.main()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("program", [experiments, games])
def test_run_that_was_begun_with_other_flags_is_not_taken_for_another(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    began = []
    monkeypatch.setattr(program, "on_all_cores", lambda trials, *_: began.extend(trials))

    def begin(flags):
        Path("list.txt").write_text(f"Pong: --preset {flags}")
        words = ["list.txt"] if program is experiments else ["--games=Pong", f"--preset={flags}"]
        monkeypatch.setattr(sys, "argv", ["x.py", *words, "--out=table.csv", "--log_dir=runs"])
        program.main()
        return [trial.name for trial in began]

    assert begin("a-typo" if program is experiments else "original") == ["Pong"]  # it made no save
    assert begin("fast") == ["Pong"] * 2
    Path("runs/Pong-1/last.ckpt.index").touch()
    assert begin("fast") == ["Pong"] * 3
    with pytest.raises(SystemExit, match=rf"error: {tmp_path}/runs/Pong-1 has a run with other flags \(--preset.fast"):
        begin("strong")
    assert len(began) == 3


def test_runs_are_in_the_folder_that_was_named_and_not_where_the_program_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("tiny: --filters 1")
    monkeypatch.setattr(sys, "argv", ["x.py", "list.txt", "--out=table.csv", "--log_dir=runs"])
    ran = []
    monkeypatch.setattr(experiments, "follow", lambda words, *_: ran.append(words) or 2)
    experiments.main()
    assert f"--log_dir={tmp_path}/runs/tiny-1" in ran[0]


def test_row_stays_where_a_longer_run_of_the_same_has_failed_and_spreadsheets_may_save_it(tmp_path):
    columns, path = ["name", "seed", "agent_steps", "ended"], str(tmp_path / "table.csv")
    rows = [{"name": name, "seed": "1", "agent_steps": "4E+01", "ended": "done"} for name in "ab"]
    for row in rows:
        write(path, row, columns)
    write(path, {"name": "a", "seed": 1, "agent_steps": "", "ended": "failed"}, columns)
    assert read_rows(path) == rows
    write(path, {"name": "a", "seed": 1, "agent_steps": 41, "ended": "done"}, columns)
    assert [(row["name"], row["agent_steps"]) for row in read_rows(path)] == [("b", "4E+01"), ("a", "41")]


@pytest.mark.parametrize("program", [experiments, games])
def test_run_of_no_steps_is_refused(monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", ["x.py", *["list.txt"] * (program is experiments), "--steps=0"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "must be above 0" in capsys.readouterr().err


def test_what_goes_wrong_with_a_trial_is_raised_in_the_end(monkeypatch):
    def run_trial(*_):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        experiments.on_all_cores([1, 2, 3], run_trial, None)


@pytest.mark.parametrize(
    "flags, again", [([], False), (["--steps=11"], True), (["--play=8"], True), (["--preset=original"], True)]
)
def test_game_that_has_a_row_is_not_trained_again_unless_more_is_asked_for(tmp_path, monkeypatch, flags, again):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    row = {"name": "Pong", "seed": 1, "agent_steps": 10, "games": 7, "ended": "done"}
    write("results/games-fast.csv", row, games.COLUMNS)
    monkeypatch.setattr(sys, "argv", ["games.py", "--games=Pong", "--steps=10", "--play=7", *flags])
    began = []
    monkeypatch.setattr(games, "on_all_cores", lambda trials, *_: began.extend(trials))
    games.main()
    preset = "original" if "--preset=original" in flags else "fast"
    protocol = f"--preset={preset} --frameskip=4 --max_pool=True --noop_max=30"
    assert began == [Trial("Pong", f"{protocol} --game=PongNoFrameskip-v4", 1)] * again


@pytest.mark.parametrize("status, ended", [(0, "done"), (3, "a3c-test.py failed with exit status 3"), (None, None)])
def test_agent_of_a_game_is_played_as_it_was_trained_and_its_scores_join_the_row(tmp_path, monkeypatch, status, ended):
    def play(program, cores, output, stop):
        assert {"--policy=softmax", "--iter=7", "--frameskip=4", f"--model={tmp_path}/Pong-2"} <= set(program)
        assert cores == [0, 1]
        (tmp_path / "Pong-2/played").mkdir(parents=True)
        scores = '{"mean": 20.5, "standard_deviation": 0.5, "games": 7, "median": 21}'
        (tmp_path / "Pong-2/played/results.json").write_text(scores)
        return status

    monkeypatch.setattr(games, "run", lambda trial, *_: {**trial._asdict(), "ended": "done"})
    monkeypatch.setattr(games, "follow", play)
    row = games.train_and_play(Trial("Pong", "--a", 2), str(tmp_path), 10, 7, [0, 1], None)
    if row is not None:
        assert row["ended"] == ended
        assert ("mean" in row) == (ended == "done")
        write(tmp_path / "table.csv", row, games.COLUMNS)
        (tmp_path / "table.csv").write_text((tmp_path / "table.csv").read_text().rstrip())  # as some editors save it
        write(tmp_path / "table.csv", {"name": "Qbert", "seed": 2}, games.COLUMNS)
        assert read_rows(tmp_path / "table.csv")[0]["mean"] == ("20.5" if ended == "done" else "")
    assert (row is None) == (ended is None)
