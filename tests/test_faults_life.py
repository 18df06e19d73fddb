"""However a run is ended, and whatever breaks around it, nothing is lost: faults that are injected for real.

Rows 25, 26, 29, 30, 31, 34 and 35 of `docs/reliability.md`.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
from conftest import (
    ENDLESS,
    ROOT,
    Running,
    ScriptedEnv,
    command,
    iterations,
    last_iteration,
    newest,
    rows,
    run,
    use_games,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import Run
from test_faults import own_mounts

import a3c
import checkpoint
import groups
import report
import startup
from async_agent import GroupFailure
from startup import UserError, tf

RARELY = "--save_period=1000000"
SMALL = ["--num_threads=1", "--agents_per_thread=2", ENDLESS, RARELY]


@contextlib.contextmanager
def program(folder, *flags, **options):
    """Start the program with its output where `options` say; kill it at the end of the block."""
    process = subprocess.Popen(command(folder, *SMALL, *flags), cwd=ROOT, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(process, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.1)


def goes_on(process, folder, updates=10):
    """Return once the run has made so many updates more."""
    wait_for(process, lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
    before = iterations(folder)[-1]
    wait_for(process, lambda: iterations(folder)[-1] >= before + updates)


def ends_saved(process, folder, number=signal.SIGTERM):
    """End the program with a signal; check that this takes less than ten seconds and that all is saved."""
    before = iterations(folder)[-1]
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert last_iteration(folder) == newest(folder) >= before


# Row 25: output that breaks.


@contextlib.contextmanager
def pipe_without_reader():
    read, write = os.pipe()
    yield write, lambda: os.close(read)
    os.close(write)


@contextlib.contextmanager
def pipe_that_nobody_empties():
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    filler = os.dup(write)

    def fill():
        os.set_blocking(filler, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(filler, b"x")
        os.set_blocking(filler, True)  # the program has the same open file

    yield write, fill
    for end in (read, write, filler):
        os.close(end)


@contextlib.contextmanager
def full_disk():
    with open("/dev/full", "w") as file:
        yield file.fileno(), lambda: None


@contextlib.contextmanager
def terminal_that_goes_away():
    screen, program_side = pty.openpty()
    yield program_side, lambda: os.close(screen)
    os.close(program_side)


@contextlib.contextmanager
def terminal_that_is_stopped():
    screen, program_side = pty.openpty()
    yield program_side, lambda: termios.tcflow(program_side, termios.TCOOFF)  # as Ctrl-S
    os.close(program_side)
    os.close(screen)


@pytest.mark.row(n=25)
@pytest.mark.parametrize(
    "output",
    [pipe_without_reader, pipe_that_nobody_empties, full_disk, terminal_that_goes_away, terminal_that_is_stopped],
)
def test_output_that_breaks_does_not_keep_a_run_from_going_on_and_ending_saved(tmp_path, output):
    folder = tmp_path / "run"
    with output() as (place, breaks), program(folder, stdout=place, stderr=place) as process:
        goes_on(process, folder, updates=2)
        breaks()
        goes_on(process, folder)
        ends_saved(process, folder)


@pytest.mark.row(n=25)
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_output_is_never_taken_for_a_file_of_the_run(tmp_path, closed):
    folder = tmp_path / "run"
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", *command(folder, *SMALL)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            goes_on(process, folder)
            for number in range(3):
                assert os.readlink(f"/proc/{process.pid}/fd/{number}").startswith(("/dev/", "pipe:", "socket:"))
            ends_saved(process, folder)
        finally:
            process.kill()


@pytest.mark.row(n=25)
def test_reader_that_takes_the_beginning_only_leaves_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "run"
    line = " ".join([*command(folder, *SMALL), "2>&1 & echo $!"])
    shell = subprocess.run(
        ["sh", "-c", f"({line}) | head -c 300"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    pid = int(shell.stdout.split()[0])
    try:
        end = time.monotonic() + 60
        while not (folder / "progress.csv").exists() or len(rows(folder)) < 10:
            os.kill(pid, 0)
            assert time.monotonic() < end
            time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while os.path.exists(folder / ".lock") and is_alive(pid):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert last_iteration(folder) >= 20
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.row(n=25)
def test_help_and_errors_do_not_hang_on_a_reader_that_sleeps(tmp_path):
    with pipe_that_nobody_empties() as (place, fill):
        fill()
        done = subprocess.run(
            command(tmp_path, "--game=Brekout-v0"), cwd=ROOT, stdout=place, stderr=place, timeout=60, check=False
        )
    assert done.returncode == 1


@pytest.mark.row(n=25)
def test_lines_in_a_log_file_begin_at_its_left_edge(tmp_path):
    """`grep ^iteration` finds them all, because no bar goes into a file."""
    folder = tmp_path / "run"
    with Running(folder, *SMALL) as running:
        running.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 3)
        running.send(signal.SIGTERM)
    log = running.printed.read_bytes()
    assert b"\r" not in log
    assert len(re.findall(rb"(?m)^iteration \d+  steps", log)) == len(rows(folder))


@pytest.mark.row(n=25)
def test_terminal_shows_the_bar_beneath_the_lines(tmp_path):
    screen, program_side = pty.openpty()
    termios.tcsetwinsize(screen, (24, 120))
    folder, shown = tmp_path / "run", []

    def read():
        with contextlib.suppress(OSError):
            while text := os.read(screen, 4096):
                shown.append(text)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with program(folder, stdout=program_side, stderr=program_side) as process:
        goes_on(process, folder)
        ends_saved(process, folder)
    os.close(program_side)
    reader.join(10)
    text = b"".join(shown).decode()
    assert re.search(r"\d+/1000000 \[.*it/s, \d+ games", text)
    assert re.search(r"\riteration \d+  steps", text)
    assert text.rstrip().endswith(f"saved {folder}/last.ckpt")


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


# Row 26: every way of being told to end.


@pytest.mark.row(n=26)
@pytest.mark.parametrize(
    "name", ["SIGHUP", "SIGQUIT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGXCPU", "SIGUSR1"))]
)
def test_any_signal_that_ends_a_program_saves_and_ends_within_ten_seconds(tmp_path, name):
    number, folder = getattr(signal, name), tmp_path / "run"
    with Running(folder, *SMALL) as running:
        running.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
        status, output = running.send(number)
    assert status == 128 + number
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) == newest(folder) >= 4


@pytest.mark.row(n=26)
def test_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    folder = tmp_path / "run"
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731  # as nohup does
    with program(folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=ignore) as process:
        goes_on(process, folder, updates=2)
        process.send_signal(signal.SIGHUP)
        goes_on(process, folder)
        ends_saved(process, folder)


@pytest.mark.row(n=26)
@pytest.mark.row(n=34)
@pytest.mark.parametrize("fault", [False, True])
def test_handlers_of_signals_are_given_back(tmp_path, make_config, monkeypatch, fault):
    numbers = startup.STOP_SIGNALS
    before, during = [signal.getsignal(number) for number in numbers], []

    class Watched(ScriptedEnv):
        def step(self, actions):
            during.extend(signal.getsignal(number) for number in numbers)
            if fault:
                raise RuntimeError("cable pulled")
            return super().step(actions)

    use_games(monkeypatch, Watched(np.zeros([5, 2])))
    with pytest.raises(GroupFailure) if fault else contextlib.nullcontext():
        assert a3c.train(make_config(max_iteration=2)) == 0
    assert not set(during[: len(numbers)]) & set(before)
    assert [signal.getsignal(number) for number in numbers] == before


# Row 29: TensorBoard's curves are those of progress.csv.


def curves(folder):
    """Return what TensorBoard shows: tag -> steps, and all values."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag in report.COLUMNS.values()]
    shown = {tag: events.Tensors(tag) for tag in tags}
    values = [float(tf.make_ndarray(event.tensor_proto)) for tag in tags for event in shown[tag]]
    return {tag: [event.step for event in shown[tag]] for tag in tags}, values


def check_curves(folder):
    table = rows(folder)
    for place, axis in ((folder, "iteration"), (folder / "per-eps", "episodes")):
        steps, values = curves(place)
        assert steps["entropy_loss"] == [int(row[axis]) for row in table]
        assert np.all(np.isfinite(values))
        scored = [int(row[axis]) for row in table if row["average_score"] != "nan"]
        assert steps.get("average_rewards", []) == scored


@pytest.mark.row(n=29)
def test_killed_and_resumed_run_has_the_curves_of_its_csv(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, "--save_period=30", "--num_threads=1") as running:
        running.wait_for(lambda: checkpoint.numbered(str(folder)))
        running.wait_for(lambda: iterations(folder)[-1] >= newest(folder) + 6)
        running.process.kill()
        running.process.wait()
    assert iterations(folder)[-1] > newest(folder)
    end = newest(folder) + 2  # before the rows that were lost
    assert run(folder, f"--max_iteration={end}", "--num_threads=1").returncode == 0
    assert iterations(folder) == list(range(2, end + 1, 2))
    check_curves(folder)


@pytest.mark.row(n=29)
@pytest.mark.parametrize("ended", [3, 0])
def test_curves_by_episode_hold_where_rows_that_were_lost_have_as_many_games_as_those_that_stay(
    tmp_path, main, monkeypatch, ended
):
    """Games end in the first steps only, or never."""
    for end in (6, 20, 8):
        games = ScriptedEnv(np.ones([200, 4]), np.arange(200)[:, None] < np.full(4, ended))
        use_games(monkeypatch, games)
        assert main(f"--log_dir={tmp_path}/run", "--num_threads=1", f"--max_iteration={end}")[0] == 0
        if end == 6:
            shutil.copytree(tmp_path / "run", tmp_path / "saved", ignore=shutil.ignore_patterns("*.csv", "*tfevents*"))
        if end == 20:  # killed before it has saved again
            for path in tmp_path.glob("run/*.ckpt*"):
                path.unlink()
            shutil.copytree(tmp_path / "saved", tmp_path / "run", dirs_exist_ok=True)
    assert iterations(tmp_path / "run") == [2, 4, 6, 8]
    check_curves(tmp_path / "run")


@pytest.mark.row(n=29)
def test_long_runs_and_high_scores_keep_their_digits(tmp_path, main, monkeypatch):
    use_games(monkeypatch, ScriptedEnv(np.full([5, 4], 246913.4), np.arange(5)[:, None] == np.full(4, 4)))
    real = a3c.Progress.total_seconds
    monkeypatch.setattr(a3c.Progress, "total_seconds", lambda self: real(self) + 1_234_567)
    assert main(f"--log_dir={tmp_path}", "--num_threads=1", "--max_iteration=2")[0] == 0
    (row,) = rows(tmp_path)
    assert float(row["average_score"]) == float(row["maximum_score"]) == 1234567.0
    assert 1_234_567 < float(row["seconds"]) < 1_234_567 + 100
    assert "." in row["seconds"]


# Row 30: how much a kill can lose.


def test_a_run_saves_at_least_every_ten_minutes_unless_told_otherwise():
    assert a3c.Config().save_minutes == 10


@pytest.mark.row(n=30)
def test_run_is_saved_by_the_clock_too_and_last_is_always_the_newest(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, *SMALL, "--save_minutes=0.02") as running:
        for _ in range(3):
            before = newest(folder) if checkpoint.numbered(str(folder)) else 0
            running.wait_for(lambda: checkpoint.numbered(str(folder)) and newest(folder) > before)  # noqa: B023
        running.process.kill()
        running.process.wait()
    state = Run(folder)
    assert state.resume() == f"{folder}/model.ckpt-{newest(folder)}"
    assert last_iteration(folder) >= before  # the kill may have come before the newest was copied


class Killed(BaseException):
    pass


@pytest.mark.row(n=30)
@pytest.mark.row(n=4)
def test_kill_between_any_two_steps_of_a_save_leaves_a_complete_one(tmp_path, monkeypatch):
    """`last.ckpt` is a copy of it, or of the one before, or is on its way."""
    real = {name: getattr(module, name) for module, name in ((os, "replace"), (os, "remove"), (shutil, "copyfile"))}
    clean_up = checkpoint.Saver.remove_unfinished
    steps, killed = 1, True
    while killed:
        folder, calls = tmp_path / str(steps), []
        run = Run(folder)
        run.update(10)
        folder.mkdir()
        run.saver.save()
        run.update(20)

        def dying(name):
            def call(*arguments):
                calls.append(name)  # noqa: B023
                if len(calls) == steps:  # noqa: B023
                    monkeypatch.setattr(checkpoint.Saver, "remove_unfinished", lambda self: None)  # nothing comes after
                    raise Killed
                return real[name](*arguments)

            return call

        for module, name in ((os, "replace"), (os, "remove"), (shutil, "copyfile")):
            monkeypatch.setattr(module, name, dying(name))
        try:
            run.saver.save()
            killed = False
        except Killed:
            pass
        for module, name in ((os, "replace"), (os, "remove"), (shutil, "copyfile")):
            monkeypatch.setattr(module, name, real[name])
        monkeypatch.setattr(checkpoint.Saver, "remove_unfinished", clean_up)

        for path in checkpoint.all_checkpoints(str(folder)):
            checkpoint.read(path)  # raises where it is damaged
        state = Run(folder)
        assert state.resume() in [f"{folder}/{name}" for name in ("model.ckpt-10", "model.ckpt-20")]
        state.update(30)
        state.saver.save()
        assert last_iteration(folder) == newest(folder) == 30
        steps += 1
    assert steps > 8


# Row 31: the log folder is removed, or taken by another run.


@pytest.mark.row(n=31)
def test_run_whose_folder_is_removed_says_so_and_ends(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, *SMALL) as running:
        running.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
        shutil.rmtree(folder)
        assert running.process.wait(timeout=15) == 1
        output = running.printed.read_text()
    assert output.splitlines()[-1].startswith(
        f"a3c.py: error: log_dir = '{folder}' was removed, or taken by another run"
    )
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.row(n=31)
def test_run_in_a_folder_made_anew_has_it_for_itself(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, *SMALL, "--save_minutes=0.001") as first:
        first.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
        first.process.send_signal(signal.SIGSTOP)  # it does not notice at once
        shutil.rmtree(folder)
        with Running(folder, *SMALL) as second:
            second.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
            before = sorted(path.name for path in folder.iterdir())
            first.process.send_signal(signal.SIGCONT)
            assert first.process.wait(timeout=15) == 1
            assert sorted(path.name for path in folder.iterdir()) == before
            second.process.send_signal(signal.SIGINT)
            assert second.process.wait(timeout=10) == 130
    assert iterations(folder) == list(range(2, iterations(folder)[-1] + 1, 2))
    assert last_iteration(folder) == newest(folder) >= iterations(folder)[-1]


@pytest.mark.row(n=31)
def test_check_of_a_folder_fails_once_it_is_gone_or_another_has_it(tmp_path):
    folder = str(tmp_path / "run")
    with groups.run_folder(folder) as first:
        first()
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="was removed, or taken by another run"):
            first()
        with groups.run_folder(folder) as second:
            second()
            with pytest.raises(UserError, match="was removed, or taken by another run"):
                first()


@pytest.mark.row(n=31)
def test_refused_run_does_not_disturb_the_one_that_has_the_folder(tmp_path):
    folder = str(tmp_path)
    with groups.run_folder(folder) as first:
        with pytest.raises(UserError, match="another run is using it"), groups.run_folder(folder):
            pass
        first()


# Row 34: used from a notebook or a program.


def run_code(folder, code):
    """Run a program that has Config, `train` and `small`, the settings of a tiny run."""
    start = f"""
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import a3c, startup
from startup import tf
small = dict(log_dir={str(folder)!r}, device="cpu", num_threads=1, agents_per_thread=2, summary_period=2)
"""
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.row(n=34)
def test_training_where_tensorflow_is_already_at_work_goes_on_with_a_word(tmp_path):
    output = run_code(tmp_path, "tf.constant(1.0) + 1\nprint(a3c.train(a3c.Config(**small, max_iteration=2)))")
    assert "TensorFlow was already at work in this process" in output
    assert output.splitlines()[-1] == "0"
    assert last_iteration(tmp_path) == 2


@pytest.mark.row(n=34)
def test_training_in_a_thread_twice_with_numbers_of_numpy_and_a_path(tmp_path):
    code = """
small.update(log_dir=Path(small["log_dir"]), num_threads=np.int64(1), learning_rate=np.float32(1e-3))
time.sleep(4)
statuses = []
for end in (20, 40):
    config = a3c.Config(**small, max_iteration=np.int32(end))
    thread = threading.Thread(target=lambda: statuses.append(a3c.train(config)))
    thread.start()
    thread.join()
left = [thread.name for thread in threading.enumerate() if thread.name not in ("MainThread", "tqdm_monitor")]
print(statuses, left, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""
    start = time.monotonic()
    output = run_code(tmp_path, code)
    took = time.monotonic() - start
    assert output.splitlines()[-1] == "[0, 0] [] True"
    assert last_iteration(tmp_path) == 40
    times = [float(text) for text in re.findall(r"first update ([\d.]+) s after the start", output)]
    assert len(times) == 2
    assert sum(times) < took - 4  # the sleep before does not count


@pytest.mark.row(n=34)
@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_taken_as_python_s(kind):
    config = a3c.Config(learning_rate=kind(1), grad_clip=kind(2))
    assert type(config.learning_rate) is type(config.grad_clip) is float
    if issubclass(kind, np.integer):
        config = a3c.Config(num_threads=kind(2))
        assert type(config.num_threads) is int
    else:
        with pytest.raises(ValueError, match="num_threads = "):
            a3c.Config(num_threads=kind(2))
    with pytest.raises(ValueError, match="learning_rate = "):
        a3c.Config(learning_rate=kind(0))


# Row 35: restricted machines.

READ_ONLY_ROOT = """
mount -t tmpfs tmpfs "$0" && mount -o remount,bind,ro / && mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"
"""


@pytest.mark.row(n=35)
def test_read_only_root_without_a_temporary_folder_names_the_way_out_which_is_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [*own_mounts(), "sh", "-c", READ_ONLY_ROOT, str(disk), *command(disk / "run", "--max_iteration=4")]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "check": False}
    nowhere = {**os.environ, "HOME": "/nowhere"}
    nowhere.pop("TMPDIR", None)
    refused = subprocess.run(words, env=nowhere, **options)
    if "permission denied" in refused.stderr:
        pytest.skip("this system does not let a user make the root read-only")
    assert refused.returncode == 1
    assert refused.stderr == "TensorFlow needs a folder for temporary files: set TMPDIR to one that can be written\n"
    done = subprocess.run(words, env={**nowhere, "TMPDIR": str(disk)}, **options)
    assert done.returncode == 0, done.stderr
    assert f"saved {disk}/run/last.ckpt" in done.stdout


def forbid_flock():
    """Let the kernel answer this process' calls of flock with ENOLCK, as some network file systems do."""
    # A seccomp filter: load the number of the call; is it flock? if not, skip one; ENOLCK; allow.
    steps = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, {"x86_64": 73, "aarch64": 32}[platform.machine()]),
        (0x06, 0, 0, 0x00050000 | errno.ENOLCK),
        (0x06, 0, 0, 0x7FFF0000),
    ]

    class Step(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_ushort),
            ("jt", ctypes.c_ubyte),
            ("jf", ctypes.c_ubyte),
            ("k", ctypes.c_uint),
        ]

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]

    array = (Step * len(steps))(*steps)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    if libc.prctl(22, 2, ctypes.byref(Filter(len(steps), array)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


@pytest.mark.row(n=35)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="knows the number of flock on these")
def test_file_system_without_locks_is_used_with_a_word_of_warning(tmp_path):
    folder = tmp_path / "run"
    done = run(folder, "--max_iteration=4", preexec_fn=forbid_flock)
    assert done.returncode == 0, done.stderr
    assert f"{folder}/.lock cannot be locked here: let no other run use this folder" in done.stdout
    assert last_iteration(folder) == 4


@pytest.mark.slow
@pytest.mark.row(n=35)
@pytest.mark.row(n=31)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="knows the number of flock on these")
def test_two_runs_without_locks_never_write_into_one_folder(tmp_path):
    folder = tmp_path / "run"
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "preexec_fn": forbid_flock}
    with program(folder, **options) as first:
        goes_on(first, folder, updates=2)
        os.remove(folder / "progress.csv")
        with program(folder, **options) as second:
            assert first.wait(timeout=60) == 1
            assert "taken by another run" in first.stderr.read().splitlines()[-1]
            goes_on(second, folder)
            ends_saved(second, folder)
    assert iterations(folder) == list(range(2, iterations(folder)[-1] + 1, 2))


@pytest.mark.row(n=35)
@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ("0::/not/seen/from/inside", {"cpu.max": "70000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/b/cpu.cfs_quota_us": "99999"}, 1),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/b/cpu.cfs_quota_us": "-1"}, None),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/cpu.cfs_quota_us": "100001"}, 2),
    ],
)
def test_quota_of_a_control_group_limits_the_cores(monkeypatch, tmp_path, groups, files, cores):
    """Version 2 and version 1 of control groups, as the kernel shows them; the paths are moved below a folder."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        if "cfs" in name:
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    real = startup.Path
    monkeypatch.setattr(startup, "Path", lambda first, *rest: real(f"{tmp_path}{first}", *rest))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert startup.available_cores() == (cores or 64)


@pytest.mark.row(n=35)
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/sys/fs/cgroup/cpu", os.W_OK), reason="needs root and cgroup v1"
)
def test_real_quota_limits_the_cores():
    group = f"/sys/fs/cgroup/cpu/test-{os.getpid()}"
    os.mkdir(group)
    try:
        with open(f"{group}/cpu.cfs_quota_us", "w") as file:
            file.write("80000")
        join = lambda: open(f"{group}/cgroup.procs", "w").write(str(os.getpid()))  # noqa: E731, SIM115
        words = [sys.executable, "-c", "import startup; print(startup.available_cores())"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, preexec_fn=join)
        assert done.stdout == "1\n"
    finally:
        os.rmdir(group)


@pytest.fixture
def three_gpus(monkeypatch):
    """Return a function that lets TensorFlow see three GPUs, and at work already or not: what is done with them."""

    def make(at_work):
        gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{n}", "GPU") for n in range(3)]
        visible, grown = list(gpus), []

        def set_visible(wanted, kind):
            assert kind == "GPU"
            if at_work and wanted != visible:
                raise RuntimeError("Visible devices cannot be modified after being initialized")
            visible[:] = wanted

        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
        monkeypatch.setattr(tf.config, "set_visible_devices", set_visible)
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: grown.append(gpu))
        return gpus, visible, grown

    return make


@pytest.mark.row(n=35)
@pytest.mark.parametrize(
    "device, chosen, name",
    [("cpu", [], "/CPU:0"), ("gpu", [0], "/GPU:0"), ("auto", [0], "/GPU:0"), ("gpu:2", [2], "/GPU:0")],
)
def test_no_other_gpu_is_opened_than_the_one_asked_for(three_gpus, device, chosen, name):
    """Simulated: the device machine of these tests has one GPU at most."""
    gpus, visible, grown = three_gpus(at_work=False)
    assert startup.choose_device(device, 1) == name
    assert visible == grown == [gpus[n] for n in chosen]


@pytest.mark.row(n=35)
@pytest.mark.row(n=34)
def test_gpu_keeps_its_number_where_tensorflow_is_at_work_already(three_gpus, capsys):
    _, visible, _ = three_gpus(at_work=True)
    assert startup.choose_device("gpu:1", 1) == "/GPU:1"
    assert "TensorFlow was already at work" in capsys.readouterr().out
    del visible[1]
    with pytest.raises(UserError, match="Use a new process"):
        startup.choose_device("gpu:1", 1)


GPUS = tf.config.list_physical_devices("GPU")


@pytest.mark.row(n=35)
@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_run_on_the_cpu_does_not_open_the_gpus(tmp_path):
    folder = tmp_path / "run"
    with program(folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        goes_on(process, folder)
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
        users = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        assert str(process.pid) not in users, users
        ends_saved(process, folder)
