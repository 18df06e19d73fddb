"""However a run is ended, and whatever breaks around it, nothing is lost: faults that are injected for real.

Rows 1 to 5, 25, 26, 29 to 31, 34 and 35 of `docs/reliability.md`.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import types

import numpy as np
import pytest
from conftest import (
    ENDLESS,
    LONG,
    RARELY,
    SMALL,
    FaultyEnv,
    Resumable,
    Running,
    checkpoints,
    command,
    ended,
    files,
    iterations,
    last_iteration,
    newest,
    own_mounts,
    refusal,
    rows,
    run,
    tensorboard,
    use_games,
)

import a3c
import checkpoint
import groups
import report
import startup
from async_agent import GroupFailure
from network import Losses
from progress import Progress
from startup import UserError, tf


def slow(*values, row):
    """Return a case of a test that is run on demand."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.row(n=row)])


# Rows 1, 3 and 26: every way of being told to end.


@pytest.mark.parametrize(
    "name, said",
    [
        pytest.param("SIGINT", "building games: 0", marks=pytest.mark.row(n=1)),
        pytest.param("SIGTERM", "iteration 4 ", marks=pytest.mark.row(n=3)),
        slow("SIGINT", "iteration 4 ", row=1),
        slow("SIGTERM", "building games: 0", row=3),
        slow("SIGHUP", "iteration 4 ", row=26),
    ],
)
def test_signal_saves_prints_the_path_and_ends_within_ten_seconds(tmp_path, name, said):
    number, folder = getattr(signal, name), tmp_path / "run"
    with Running(folder, ENDLESS, RARELY) as running:
        running.wait_for(lambda: said in running.printed.read_text())
        status, output = running.send(number)
    assert status == 128 + number
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) == newest(folder) >= (4 if "iteration" in said else 0)
    assert not list(folder.glob(".unfinished*"))
    log = running.printed.read_bytes()  # no bar goes into a file: `grep ^iteration` finds every row
    assert b"\r" not in log
    assert len(re.findall(rb"(?m)^iteration \d+  steps", log)) == len(rows(folder))


@pytest.mark.row(n=26)
@pytest.mark.row(n=34)
@pytest.mark.parametrize(
    "number", [signal.SIGHUP, None, *(slow(n, row=26) for n in (signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR1))]
)
def test_signal_or_exception_ends_a_run_saved_and_the_handlers_are_given_back(make_config, monkeypatch, number):
    before, during = [signal.getsignal(n) for n in startup.STOP_SIGNALS], []

    def fault():
        during.append([signal.getsignal(n) for n in startup.STOP_SIGNALS])
        if number is None:
            raise RuntimeError("cable pulled")
        os.kill(os.getpid(), number)

    use_games(monkeypatch, FaultyEnv(fault))
    config = make_config(agents_per_thread=4, max_iteration=3000, filters=4)
    with pytest.raises(GroupFailure) if number is None else contextlib.nullcontext():
        assert a3c.train(config) == 128 + number
    assert last_iteration(config.log_dir) >= 6
    assert not set(during[0]) & set(before)
    assert [signal.getsignal(n) for n in startup.STOP_SIGNALS] == before


@pytest.mark.row(n=1)
@pytest.mark.row(n=2)
def test_second_signal_during_a_save_lets_it_complete(tmp_path, play, monkeypatch):
    write, saves = tf.train.Checkpoint.write, []

    def write_disturbed(*arguments):
        signal.raise_signal(signal.SIGINT)
        saves.append(write(*arguments))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_disturbed)
    status, output, _ = play(LONG, games=FaultyEnv(lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert (status, len(saves)) == (130, 1)
    assert f"saved {tmp_path}/run/last.ckpt" in output
    assert last_iteration(tmp_path / "run") == newest(tmp_path / "run") >= 6


# Rows 4, 5, 29 and 30: kills. How much they lose, what is resumed, and the curves of TensorBoard after them.


def check_curves(folder):
    """Check that TensorBoard's curves are those of progress.csv."""
    table = rows(folder)
    for place, axis in ((folder, "iteration"), (folder / "per-eps", "episodes")):
        curves = tensorboard(place)
        for column, tag in report.COLUMNS.items():
            if tag:
                points, kept = curves.pop(tag, []), [row for row in table if row[column] != "nan"]
                assert [point.step for point in points] == [int(row[axis]) for row in kept]
                shown = [point.value for point in points]
                np.testing.assert_allclose(shown, [float(row[column]) for row in kept], rtol=1e-6)
        assert not curves


@pytest.mark.row(n=4)
@pytest.mark.row(n=5)
@pytest.mark.row(n=29)
@pytest.mark.row(n=30)
@pytest.mark.parametrize("kills, seconds", [(1, 2), pytest.param(50, 8, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_the_newest_save_and_the_curves_of_its_csv(tmp_path, kills, seconds):
    """The run saves by the clock, about every second. The last kill comes after a save, others at any moment."""
    assert a3c.Config().save_minutes == 10
    folder, seed, reached, games = tmp_path / "run", np.random.SeedSequence().entropy, 0, 0
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    for kill in range(1, kills + 1):
        with Running(folder, ENDLESS, RARELY, "--save_minutes=0.02") as running:
            running.wait_for(lambda: "Training on" in running.printed.read_text())
            if kill == kills:
                running.wait_for(lambda: checkpoint.numbered(str(folder)) and newest(folder) > reached)  # noqa: B023
                first = newest(folder)
                running.wait_for(lambda: newest(folder) > first)  # noqa: B023
            time.sleep(rng.uniform(0, seconds))
            seen = newest(folder) if checkpoint.numbered(str(folder)) else 0  # what a user could have been told
        output = running.printed.read_text()
        assert "damaged" not in output
        if reached and "resumed" in output:
            assert f"resumed {folder}/model.ckpt-{reached}: {reached * 20:,} agent steps, {games:,} games" in output
        if seen:
            state = Resumable(shutil.copytree(folder, tmp_path / f"copy {kill}"))  # the restart mends the folder itself
            assert state.resume()
            assert all("has no .index file" in text for text in state.warnings)  # never a damaged one
            assert all(np.all(np.isfinite(x)) for x in state.state())
            assert all(np.any(x != 1) for x in state.state()[10:])  # RMSProp's slots have moved
            assert state.progress.iteration >= max(seen, reached)
            assert state.progress.agent_steps == state.progress.iteration * 20
            assert state.progress.episodes >= games
            reached, games = state.progress.iteration, state.progress.episodes
            # A save writes last.ckpt after the numbered one. A kill between the two leaves that of the save before, or
            # none while it is replaced.
            last, *saves = checkpoint.resolve(f"{folder}/last.ckpt"), *checkpoint.numbered(str(folder))
            assert checkpoint.read(last)[1] in [checkpoint.read(save)[1] for save in saves[:2]]
            print(f"kill {kill}: iteration {reached}, {games} games")
    end = reached // 2 * 2 + 4  # before most of the rows that were lost
    ended = run(folder, f"--max_iteration={end}")
    assert ended.returncode == 0, ended.stderr
    assert f"resumed {folder}/model.ckpt-{reached}: {reached * 20:,} agent steps, {games:,} games" in ended.stdout
    assert iterations(folder) == list(range(2, end + 1, 2))
    check_curves(folder)
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    expected = {name + suffix for name in checkpoints(folder) for suffix in (checkpoint.DATA, checkpoint.INDEX)}
    assert names == expected | {"config.json", "progress.csv", "per-eps", ".lock"}  # nothing half-written is left


UPDATES_OF_20_STEPS = {"agents_per_thread": 4, "annealing_steps": 1000}


def losses_of(iteration):
    return Losses(*np.random.default_rng(iteration).normal(size=4))


def report_on(folder, progress, end, games=0):
    """Report updates up to `end`, each of 20 agent steps; `games` end in the first of them."""
    config = a3c.Config(log_dir=str(folder), summary_period=2, **UPDATES_OF_20_STEPS)
    reporter = report.Report(config, progress)
    progress.episodes += games
    progress.scores[0, :games] = progress.iteration
    while progress.iteration < end:
        progress.iteration, progress.agent_steps = progress.iteration + 1, progress.agent_steps + 20
        reporter.count_update(losses_of(progress.iteration))
    reporter.close()
    assert not reporter.background.failure


def test_row_has_the_means_of_its_updates_and_the_first_update_alone_no_speed(tmp_path, monkeypatch):
    progress, now = Progress(1, 4), itertools.count(1000, 4)  # an update takes 4 s
    progress.iteration, progress.agent_steps = 5, 100
    monkeypatch.setattr(report, "time", types.SimpleNamespace(monotonic=lambda: next(now), time=time.time))
    report_on(tmp_path, progress, 10)
    table = rows(tmp_path)
    assert [row["steps_per_second"] for row in table] == ["nan", "5", "5"]
    assert [point.step for point in tensorboard(tmp_path)["steps_per_second"]] == [8, 10]
    losses = np.mean([losses_of(iteration) for iteration in (9, 10)], axis=0)
    np.testing.assert_allclose([float(table[-1][name]) for name in Losses._fields], losses)
    rate = a3c.Config(**UPDATES_OF_20_STEPS).learning_rate_at(180)
    assert float(table[-1]["learning_rate"]) == pytest.approx(rate) != a3c.Config.learning_rate


@pytest.mark.row(n=29)
@pytest.mark.parametrize("games", [3, 0])
def test_curves_hold_where_lost_rows_have_as_many_games_as_those_that_stay(tmp_path, games):
    progress = Progress(1, 4)
    report_on(tmp_path, progress, 6, games)
    saved = progress.serialize()
    report_on(tmp_path, progress, 20)
    check_curves(tmp_path)
    progress.deserialize(saved)
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("22,440")  # killed in the middle of a row
    report_on(tmp_path, progress, 8, games)
    assert iterations(tmp_path) == [2, 4, 6, 8]
    check_curves(tmp_path)


@pytest.mark.row(n=29)
def test_long_runs_and_high_scores_keep_their_digits(tmp_path):
    progress = Progress(1, 4)
    progress.scores[:] = 1234567.0
    progress.seconds = 1_234_567.25
    report_on(tmp_path, progress, 2)
    (row,) = rows(tmp_path)
    assert float(row["average_score"]) == float(row["maximum_score"]) == 1234567.0
    assert 1_234_567.25 <= float(row["seconds"]) < 1_234_567 + 100
    assert float(row["seconds"]) % 1


@pytest.mark.row(n=2)
@pytest.mark.row(n=4)
@pytest.mark.row(n=30)
def test_kill_between_any_two_steps_of_a_save_leaves_a_complete_one(tmp_path, monkeypatch):
    """Before each step that changes a file the folder is copied: this is what a kill would leave of it."""
    folder, left = tmp_path / "run", []
    folder.mkdir()
    run = Resumable(folder, filters=4)
    run.save(10)

    def after_a_copy(change):
        def step(*arguments):
            left.append(tmp_path / str(len(left)))
            subprocess.run(["cp", "-r", folder, left[-1]], check=True)
            return change(*arguments)

        return step

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "remove"), (shutil, "copyfile")):
            patch.setattr(module, name, after_a_copy(getattr(module, name)))
        run.save(20)
    assert len(left) > 8
    for folder in left:
        for path in checkpoint.all_checkpoints(str(folder)):
            checkpoint.read(path)  # raises where it is damaged
        assert checkpoint.read(checkpoint.resolve(f"{folder}/last.ckpt"))[1] in (10, 20)
        state = Resumable(folder, filters=4)
        assert state.resume() in [f"{folder}/{name}" for name in ("model.ckpt-10", "model.ckpt-20")]
        state.save(30)
        assert last_iteration(folder) == newest(folder) == 30


# Row 25: output that breaks.


def fill(pipe):
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.set_blocking(pipe, True)  # for the program too, which has the same open file


def open_output(kind):
    """Return where the program is to write to, and a function that breaks that."""
    if kind in ("full disk", "closed"):
        return os.open("/dev/full", os.O_WRONLY), lambda: None
    reader, writer = os.pipe() if "pipe" in kind else pty.openpty()
    return writer, {
        "pipe without a reader": lambda: os.close(reader),
        "pipe that is not read": lambda: fill(writer),
        "closed terminal": lambda: os.close(reader),
        "stopped terminal": lambda: termios.tcflow(writer, termios.TCOOFF),  # as Ctrl-S
    }[kind]


KINDS = ["full disk", "closed", "pipe without a reader", "pipe that is not read", "closed terminal", "stopped terminal"]


@pytest.mark.row(n=3)
@pytest.mark.row(n=25)
@pytest.mark.row(n=26)
@pytest.mark.parametrize(
    "kinds",
    [
        ("full disk", "closed"),
        ("pipe without a reader", "stopped terminal"),
        ("closed terminal", "pipe that is not read"),
        *(pytest.param((kind, kind), marks=pytest.mark.slow) for kind in KINDS),  # one place for both, as by 2>&1
    ],
)
def test_run_goes_on_and_ends_saved_where_its_outputs_break_and_a_signal_is_ignored(tmp_path, kinds):
    """Stdout and stderr break, stdin is closed, and SIGHUP is ignored at the start, as by `nohup`."""
    places = {kind: open_output(kind) for kind in kinds}
    stdout, stderr = (places[kind][0] for kind in kinds)

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number, kind in enumerate(("closed", *kinds)):
            if kind == "closed":
                os.close(number)

    with Running(tmp_path / "run", *SMALL, stdout=stdout, stderr=stderr, preexec_fn=prepare) as running:
        running.goes_on(updates=2)
        for _, breaks in places.values():
            breaks()
        running.process.send_signal(signal.SIGHUP)
        running.goes_on()
        for number in range(3):  # a closed output is never taken for a file of the run
            assert os.readlink(f"/proc/{running.process.pid}/fd/{number}").startswith(("/dev/", "pipe:"))
        running.ends_saved()


@pytest.mark.row(n=25)
def test_help_and_errors_do_not_hang_on_a_reader_that_sleeps(tmp_path):
    place, breaks = open_output("pipe that is not read")
    breaks()
    words = command(tmp_path, "--game=Brekout-v0")
    assert ended(words, capture_output=False, stdout=place, stderr=place)[0] == 1
    words = command(tmp_path, "--help")
    assert ended(words, capture_output=False, stdout=place, stderr=place)[0] == 0


@pytest.mark.row(n=25)
def test_terminal_shows_the_bar_of_agent_steps_beneath_the_lines(tmp_path):
    screen, program_side = pty.openpty()
    termios.tcsetwinsize(screen, (24, 120))
    shown = []

    def read():
        with contextlib.suppress(OSError):
            while text := os.read(screen, 4096):
                shown.append(text)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    outputs = {"stdout": program_side, "stderr": program_side}
    with Running(tmp_path / "run", *SMALL, "--max_agent_steps=2000000", **outputs) as running:
        running.goes_on()
        running.ends_saved()
    os.close(program_side)
    reader.join(10)
    text = b"".join(shown).decode()
    assert re.search(r"[\d.]+k?/2\.00M \[.* steps/s, \d+ games", text)
    assert re.search(r"\riteration \d+  steps", text)
    assert text.rstrip().endswith(f"saved {tmp_path}/run/last.ckpt")


@pytest.mark.row(n=25)
def test_file_of_the_report_that_hangs_does_not_hold_up_training_and_saving(tmp_path, play, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(report.Report, "_write", lambda self, row: over.wait(60))
    start = time.monotonic()
    try:
        status, output, _ = play("--max_iteration=20")
        assert time.monotonic() - start < 40
    finally:
        over.set()
    assert status == 0
    assert f"saved {tmp_path}/run/last.ckpt" in output
    assert last_iteration(tmp_path / "run") == 20


@pytest.mark.row(n=6)
def test_file_of_the_report_that_cannot_be_written_ends_the_run_saved(tmp_path, play, monkeypatch):
    def fill_up(row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "_points", fill_up)
    ended = play(LONG)
    assert refusal(ended).startswith(f"cannot write the report in {tmp_path}/run: ")
    assert f"saved {tmp_path}/run/last.ckpt" in ended[1]
    assert last_iteration(tmp_path / "run") >= 2


# Row 31: the log folder is removed, or taken by another run.


@pytest.mark.row(n=31)
def test_run_whose_folder_is_removed_says_so_and_ends(tmp_path, play):
    folder = tmp_path / "run"
    line = refusal(play(LONG, games=FaultyEnv(lambda: shutil.rmtree(folder, ignore_errors=True))))
    assert line.startswith(f"log_dir = '{folder}' was removed, or taken by another run")
    assert not folder.exists()


@pytest.fixture
def no_locks(monkeypatch):
    """Let there be no locks, as on some network file systems."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.row(n=31)
@pytest.mark.row(n=35)
def test_run_whose_folder_another_takes_where_there_are_no_locks_leaves_it_to_that(tmp_path, play, no_locks):
    folder, taken = tmp_path / "run", []

    def files_of_the_other():
        return {"progress.csv": (folder / "progress.csv").read_bytes(), **files(folder)}

    def take():
        if not taken:
            other.enter_context(groups.run_folder(str(folder)))
            report_on(folder, Progress(1, 4), 2)
            taken.append(files_of_the_other())

    with contextlib.ExitStack() as other:
        status, output, errors = play(LONG, games=FaultyEnv(take))
    assert f"{folder}/.lock cannot be locked here: let no other run use this folder, else this one ends\n" in output
    assert "taken by another run" in refusal((status, output, errors))
    assert files_of_the_other() == taken[0]


@pytest.mark.row(n=31)
def test_check_of_a_folder_fails_once_it_is_gone_or_another_has_it_but_not_where_another_is_refused(tmp_path):
    folder = str(tmp_path / "run")
    with groups.run_folder(folder) as first:
        with pytest.raises(UserError, match="another run is using it"), groups.run_folder(folder):
            pass
        first()
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="was removed, or taken by another run"):
            first()
        with groups.run_folder(folder) as second:
            second()
            with pytest.raises(UserError, match="was removed, or taken by another run"):
                first()


# Row 34: used from a notebook or a program.

NOTEBOOK = """
import signal, sys, threading
from pathlib import Path
import numpy as np
import a3c
a3c.tf.constant(1.0) + 1
settings = dict(log_dir=Path(sys.argv[1]), num_threads=np.int64(1), agents_per_thread=np.int8(2), device="cpu")
statuses = []
for end in (2, 4):
    config = a3c.Config(**settings, learning_rate=np.float32(1e-3), max_iteration=np.int32(end))
    thread = threading.Thread(target=lambda: statuses.append(a3c.train(config)))
    thread.start()
    thread.join()
left = [thread.name for thread in threading.enumerate() if thread.name not in ("MainThread", "tqdm_monitor")]
print(statuses, left, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.mark.row(n=34)
def test_training_where_tensorflow_is_already_at_work_in_a_thread_twice_with_numbers_of_numpy(tmp_path):
    status, output, errors = ended([sys.executable, "-c", NOTEBOOK, tmp_path])
    assert status == 0, errors
    assert output.count("TensorFlow was already at work in this process") == 2
    assert output.splitlines()[-1] == "[0, 0] [] True"
    assert last_iteration(tmp_path) == 4


# Row 35: restricted machines. Quotas and GPUs are in test_startup.py.

READ_ONLY_ROOT = """
mount -t tmpfs tmpfs "$0" && mount -o remount,bind,ro / && mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"
"""


@pytest.mark.row(n=35)
def test_read_only_root_without_a_temporary_folder_names_the_way_out_which_is_one(tmp_path):
    words = command(tmp_path / "run", "--num_threads=1", "--max_iteration=2")
    words = [*own_mounts(), "sh", "-c", READ_ONLY_ROOT, str(tmp_path), *words]
    nowhere = {**os.environ, "HOME": "/nowhere"}
    nowhere.pop("TMPDIR", None)
    status, _, errors = ended(words, env=nowhere)
    if "permission denied" in errors:
        pytest.skip("this system does not let a user make the root read-only")
    assert status == 1
    assert errors == "TensorFlow needs a folder for temporary files: set TMPDIR to one that can be written\n"
    status, output, errors = ended(words, env={**nowhere, "TMPDIR": str(tmp_path)})
    assert status == 0, errors
    assert f"saved {tmp_path}/run/last.ckpt" in output
