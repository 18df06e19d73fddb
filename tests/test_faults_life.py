"""However a run is ended, and whatever breaks around it, nothing is lost: faults that are injected for real.

Rows 25, 26, 29, 30, 31, 34 and 35 of `docs/reliability.md`.
"""

import contextlib
import errno
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
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ENDLESS,
    ROOT,
    Resumable,
    Running,
    ScriptedEnv,
    command,
    ended,
    has_rows,
    iterations,
    last_iteration,
    newest,
    own_mounts,
    refusal,
    resumed,
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
from startup import UserError

RARELY = "--save_steps=1000000"
SMALL = ["--num_threads=1", "--agents_per_thread=2", ENDLESS, RARELY]
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Program(Running):
    """The program at work, with its output where `options` of Popen say."""

    def __init__(self, folder, *flags, program=("a3c.py",), **options):
        self.folder, self.printed = folder, Path(os.devnull)
        words = command(folder, *SMALL, *flags, program=program)
        self.process = subprocess.Popen(words, cwd=ROOT, **options)

    def goes_on(self, updates=10):
        """Return once it has made so many updates more."""
        self.wait_for(lambda: has_rows(self.folder))
        before = iterations(self.folder)[-1]
        self.wait_for(lambda: iterations(self.folder)[-1] >= before + updates)

    def ends_saved(self):
        """End it; check that this takes less than ten seconds and that all is saved."""
        before = iterations(self.folder)[-1]
        assert self.send(signal.SIGTERM)[0] == 128 + signal.SIGTERM
        assert last_iteration(self.folder) == newest(self.folder) >= before


# Row 25: output that breaks.


def fill(pipe):
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.set_blocking(pipe, True)  # for the program too, which has the same open file


def open_output(kind):
    """Return where the program is to write to, and a function that breaks that."""
    if kind == "full disk":
        return os.open("/dev/full", os.O_WRONLY), lambda: None
    reader, writer = os.pipe() if "pipe" in kind else pty.openpty()
    return writer, {
        "pipe without a reader": lambda: os.close(reader),
        "pipe that is not read": lambda: fill(writer),
        "closed terminal": lambda: os.close(reader),
        "stopped terminal": lambda: termios.tcflow(writer, termios.TCOOFF),  # as Ctrl-S
    }[kind]


@pytest.mark.row(n=25)
@pytest.mark.parametrize(
    "kind",
    ["full disk", "pipe without a reader", "pipe that is not read", "closed terminal", "stopped terminal"],
)
def test_output_that_breaks_does_not_keep_a_run_from_going_on_and_ending_saved(tmp_path, kind):
    place, breaks = open_output(kind)
    with Program(tmp_path / "run", stdout=place, stderr=place) as program:
        program.goes_on(updates=2)
        breaks()
        program.goes_on()
        program.ends_saved()


@pytest.mark.row(n=25)
@pytest.mark.parametrize("closed", [[2], [0, 1, 2]])
def test_closed_output_is_never_taken_for_a_file_of_the_run(tmp_path, closed):
    close = lambda: [os.close(number) for number in closed]  # noqa: E731
    with Program(tmp_path / "run", **SILENT, stdin=subprocess.DEVNULL, preexec_fn=close) as program:
        program.goes_on()
        for number in range(3):
            assert os.readlink(f"/proc/{program.process.pid}/fd/{number}").startswith("/dev/")
        program.ends_saved()


@pytest.mark.row(n=25)
def test_help_and_errors_do_not_hang_on_a_reader_that_sleeps(tmp_path):
    place, breaks = open_output("pipe that is not read")
    breaks()
    words = command(tmp_path, "--game=Brekout-v0")
    assert ended(words, capture_output=False, stdout=place, stderr=place)[0] == 1


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
    with Program(tmp_path / "run", "--max_agent_steps=2000000", **outputs) as program:
        program.goes_on()
        program.ends_saved()
    os.close(program_side)
    reader.join(10)
    text = b"".join(shown).decode()
    assert re.search(r"[\d.]+k?/2\.00M \[.* steps/s, \d+ games", text)
    assert re.search(r"\riteration \d+  steps", text)
    assert text.rstrip().endswith(f"saved {tmp_path}/run/last.ckpt")


@pytest.mark.row(n=25)
def test_file_of_the_report_that_hangs_does_not_hold_up_training_and_saving(tmp_path, main, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(report.Report, "_write", lambda self, row: over.wait(60))
    use_games(monkeypatch, *(ScriptedEnv(np.zeros([5, 4])) for _ in range(2)))
    start = time.monotonic()
    try:
        status, output, _ = main(f"--log_dir={tmp_path}", "--max_iteration=20")
        assert time.monotonic() - start < 40
    finally:
        over.set()
    assert status == 0
    assert f"saved {tmp_path}/last.ckpt" in output
    assert last_iteration(tmp_path) == 20


@pytest.mark.row(n=6)
def test_file_of_the_report_that_cannot_be_written_ends_the_run_saved(tmp_path, main, monkeypatch):
    def fill_up(row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "_points", fill_up)
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    ended = main(f"--log_dir={tmp_path}", "--num_threads=1")
    assert refusal(ended).startswith(f"cannot write the report in {tmp_path}: ")
    assert f"saved {tmp_path}/last.ckpt" in ended[1]
    assert last_iteration(tmp_path) >= 2


# Row 26: every way of being told to end.


@pytest.mark.row(n=25)
@pytest.mark.row(n=26)
@pytest.mark.parametrize(
    "name", ["SIGHUP", "SIGQUIT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGXCPU", "SIGUSR1"))]
)
def test_any_signal_that_ends_a_program_saves_and_ends_within_ten_seconds(tmp_path, name):
    number, folder = getattr(signal, name), tmp_path / "run"
    with Running(folder, *SMALL) as running:
        running.wait_for(lambda: has_rows(folder))
        status, output = running.send(number)
    assert status == 128 + number
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) == newest(folder) >= 4
    log = running.printed.read_bytes()  # no bar goes into a file: `grep ^iteration` finds every row
    assert b"\r" not in log
    assert len(re.findall(rb"(?m)^iteration \d+  steps", log)) == len(rows(folder))


@pytest.mark.row(n=26)
def test_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731  # as nohup does
    with Program(tmp_path / "run", **SILENT, preexec_fn=ignore) as program:
        program.goes_on(updates=2)
        program.process.send_signal(signal.SIGHUP)
        program.goes_on()
        program.ends_saved()


@pytest.mark.row(n=26)
@pytest.mark.row(n=34)
@pytest.mark.parametrize("fault", [False, True])
def test_handlers_of_signals_are_given_back(make_config, monkeypatch, fault):
    before, during = [signal.getsignal(number) for number in startup.STOP_SIGNALS], []

    class Watched(ScriptedEnv):
        def step(self, actions):
            during.append([signal.getsignal(number) for number in startup.STOP_SIGNALS])
            if fault:
                raise RuntimeError("cable pulled")
            return super().step(actions)

    use_games(monkeypatch, Watched(np.zeros([5, 2])))
    with pytest.raises(GroupFailure) if fault else contextlib.nullcontext():
        assert a3c.train(make_config(max_iteration=2)) == 0
    assert not set(during[0]) & set(before)
    assert [signal.getsignal(number) for number in startup.STOP_SIGNALS] == before


# Row 29: TensorBoard's curves are those of progress.csv.


def check_curves(folder):
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


@pytest.mark.row(n=29)
def test_killed_and_resumed_run_has_the_curves_of_its_csv(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, "--save_steps=600", "--num_threads=1") as running:
        running.wait_for(lambda: checkpoint.numbered(str(folder)))
        running.wait_for(lambda: iterations(folder)[-1] >= newest(folder) + 6)
        running.process.kill()
        running.process.wait()
    assert iterations(folder)[-1] > newest(folder)
    end = newest(folder) + 2  # before the rows that were lost
    assert run(folder, f"--max_iteration={end}", "--num_threads=1").returncode == 0
    assert iterations(folder) == list(range(2, end + 1, 2))
    check_curves(folder)


@pytest.mark.row(n=4)
@pytest.mark.row(n=29)
@pytest.mark.parametrize("ended", [3, 0])
def test_curves_hold_where_lost_rows_have_as_many_games_as_those_that_stay(tmp_path, main, monkeypatch, ended):
    """Games end in the first steps only, or never."""
    for end in (6, 20, 8):
        use_games(monkeypatch, ScriptedEnv(np.ones([200, 4]), np.arange(200)[:, None] < np.full(4, ended)))
        assert main(f"--log_dir={tmp_path}", "--num_threads=1", RARELY, f"--max_iteration={end}")[0] == 0
        check_curves(tmp_path)
        if end == 20:  # as if it had been killed before this save, and in the middle of a row
            for path in [*tmp_path.glob("model.ckpt-20*"), *tmp_path.glob("last.ckpt*")]:
                path.unlink()
            with open(tmp_path / "progress.csv", "a") as file:
                file.write("6,120")
    assert iterations(tmp_path) == [2, 4, 6, 8]


@pytest.mark.row(n=29)
def test_long_runs_and_high_scores_keep_their_digits(tmp_path, main, monkeypatch):
    use_games(monkeypatch, ScriptedEnv(np.full([5, 4], 246913.4), np.arange(5)[:, None] == np.full(4, 4)))
    real = a3c.Progress.total_seconds
    monkeypatch.setattr(a3c.Progress, "total_seconds", lambda self: real(self) + 1_234_567.25)
    assert main(f"--log_dir={tmp_path}", "--num_threads=1", "--max_iteration=2")[0] == 0
    (row,) = rows(tmp_path)
    assert float(row["average_score"]) == float(row["maximum_score"]) == 1234567.0
    assert 1_234_567.25 < float(row["seconds"]) < 1_234_567 + 100
    assert float(row["seconds"]) % 1


# Row 30: how much a kill can lose.


@pytest.mark.row(n=30)
def test_run_is_saved_by_the_clock_too_and_last_is_always_the_newest(tmp_path):
    assert a3c.Config().save_minutes == 10
    folder = tmp_path / "run"
    with Running(folder, *SMALL, "--save_minutes=0.02") as running:
        for _ in range(3):
            before = newest(folder) if checkpoint.numbered(str(folder)) else 0
            running.wait_for(lambda: checkpoint.numbered(str(folder)) and newest(folder) > before)  # noqa: B023
        running.process.kill()
        running.process.wait()
    assert resumed(folder).iteration == newest(folder)
    last = checkpoint.resolve(str(folder / "last.ckpt"))  # the kill may have come as that was replaced
    assert checkpoint.read(last)[1] >= before


@pytest.mark.row(n=30)
@pytest.mark.row(n=4)
def test_kill_between_any_two_steps_of_a_save_leaves_a_complete_one(tmp_path, monkeypatch):
    """Before each step that changes a file the folder is copied: this is what a kill would leave of it."""
    folder, left = tmp_path / "run", []
    folder.mkdir()
    run = Resumable(folder)
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
        state = Resumable(folder)
        assert state.resume() in [f"{folder}/{name}" for name in ("model.ckpt-10", "model.ckpt-20")]
        state.save(30)
        assert last_iteration(folder) == newest(folder) == 30


# Row 31: the log folder is removed, or taken by another run.


@pytest.mark.row(n=31)
def test_run_whose_folder_is_removed_says_so_and_ends(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, *SMALL) as running:
        running.wait_for(lambda: has_rows(folder))
        shutil.rmtree(folder)
        assert running.process.wait(timeout=15) == 1
    last = running.printed.read_text().splitlines()[-1]
    assert last.startswith(f"a3c.py: error: log_dir = '{folder}' was removed, or taken by another run")
    assert not folder.exists()


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
for end in (20, 40):
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
    assert last_iteration(tmp_path) == 40


# Row 35: restricted machines. Quotas and GPUs are in test_startup.py.

READ_ONLY_ROOT = """
mount -t tmpfs tmpfs "$0" && mount -o remount,bind,ro / && mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"
"""


@pytest.mark.row(n=35)
def test_read_only_root_without_a_temporary_folder_names_the_way_out_which_is_one(tmp_path):
    words = [*own_mounts(), "sh", "-c", READ_ONLY_ROOT, str(tmp_path), *command(tmp_path / "run", "--max_iteration=4")]
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


# The program on a file system without locks, as some network file systems are.
WITHOUT_LOCKS = """
import errno, fcntl, runpy
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
runpy.run_path("a3c.py", run_name="__main__")
"""


@pytest.mark.row(n=35)
@pytest.mark.row(n=31)
def test_two_runs_without_locks_are_warned_and_never_write_into_one_folder(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, *SMALL, program=("-c", WITHOUT_LOCKS)) as first:
        first.wait_for(lambda: has_rows(folder))
        os.remove(folder / "progress.csv")
        with Program(folder, program=("-c", WITHOUT_LOCKS), **SILENT) as second:
            assert first.process.wait(timeout=60) == 1
            second.goes_on()
            second.ends_saved()
    lines = first.printed.read_text().splitlines()
    assert f"{folder}/.lock cannot be locked here: let no other run use this folder, else this one ends" in lines
    assert "taken by another run" in lines[-1]
    assert iterations(folder) == list(range(2, iterations(folder)[-1] + 1, 2))
