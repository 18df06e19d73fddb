"""What every command does first and last: packages, a quiet import, the device; output, signals, the end."""

import contextlib
import fcntl
import importlib.metadata
import math
import os
import queue
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

for _name in ("stdin", "stdout", "stderr"):
    if getattr(sys, _name) is None:  # closed, as by `>&-`; the next file opened, a checkpoint, would get its number
        setattr(sys, _name, open(os.devnull, "r+"))  # noqa: SIM115

REQUIRED = dict(re.findall(r"(?m)^([\w-]+)>=([\d.]+)", Path(__file__).with_name("requirements.txt").read_text()))
# Ctrl-C; kill; a closed window; time is over, or soon (batch systems); Ctrl-\\.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGQUIT)


class UserError(ValueError):
    """A refusal of this program; the message says in one line what to change. All other errors show a traceback."""


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Raise a UserError of `what` and the reason where the system or TensorFlow refuses something inside the block."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why the system or TensorFlow refused something."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    return re.sub(r"^\{\{.*?\}\} *", "", (text or type(error).__name__).splitlines()[0])  # {{node of its graph}}


def lock(file, refusal: str) -> bool:
    """Keep an open file or folder for this process, until it is closed; return False where no file can be locked.

    Raises UserError, with the refusal, if another process keeps it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:  # not every file system has locks
        return False
    return True


def check_packages(required: dict[str, str] = REQUIRED) -> None:
    """Exit with one line that names the first package that is missing or older than the version it needs."""
    for package, oldest in required.items():
        try:
            found = importlib.metadata.version(package)
            state = f"{found} is too old"
        except importlib.metadata.PackageNotFoundError:
            found, state = "", "is not installed"
        found, needed = ([int(n) for n in re.findall(r"\d+", text)[:2]] for text in (found, oldest))  # of 2.21.0rc1
        if found < needed:
            sys.exit(f"{package} {state}: {package}>={oldest} is needed. Run: pip install -r requirements.txt")


check_packages()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # else off where the CPU lacks AVX512-VNNI: a third slower


def __getattr__(name: str):
    """Import TensorFlow at the first `from startup import tf` (a hook of Python): plot.py does without."""
    global tf
    if name != "tf":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        sys.exit("TensorFlow needs a folder for temporary files: set TMPDIR to one that can be written")
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow as tf  # prints a dozen lines before any log level applies

        tf.config.list_physical_devices("GPU")  # prints an error, once, where there is no driver
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # it takes seconds, and nobody has a use for the traceback
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    tf.get_logger().setLevel("ERROR")  # it takes a trace for each thread's copy of the network for a mistake
    return tf


def available_cores() -> int:
    """Return how many cores this process may use, by its CPU mask and the quotas of Linux' control groups around it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        version_1 = "cpu" in controllers.split(",")
        if version_1 or not controllers:
            folder = Path("/sys/fs/cgroup", "cpu" if version_1 else "", group.strip("/"))
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version_1 else ("cpu.max",)
            for place in (folder, *folder.parents):  # inside a container the folder itself may not be there
                with contextlib.suppress(OSError, ValueError):  # no file, or "max"
                    quota, period = map(int, " ".join((place / name).read_text() for name in names).split())
                    cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores  # -1 is no limit
    return cores


def cores_of_a_group(num_groups: int) -> int:
    """Return the share of the cores that each of so many groups gets, at least one."""
    return max(1, available_cores() // num_groups)


def choose_device(device: str, num_groups: int = 1) -> str:
    """Turn `auto`, `cpu`, `gpu` or `gpu:N` into a TensorFlow device; set TensorFlow up for it and for the groups.

    TensorFlow sees no other GPU then. If at work already, it stays as it is. Raises UserError: no such device.
    """
    if not re.fullmatch(r"auto|cpu|gpu(:\d+)?", device.lower()):
        raise UserError(f"device = {device!r}: must be auto, cpu, gpu or gpu:N")
    kind, _, number = device.lower().partition(":")
    gpus = tf.config.list_physical_devices("GPU")
    wanted = [] if kind == "cpu" else gpus[int(number or 0) :][:1]
    if kind == "gpu" and not wanted:
        raise UserError(
            f"device = {device!r}: TensorFlow sees {len(gpus)} GPUs here. Use --device cpu, or --device auto to take "
            "a GPU only if there is one; on Linux with an NVIDIA driver, pip install 'tensorflow[and-cuda]'"
        )
    try:
        tf.config.set_visible_devices(wanted, "GPU")  # TensorFlow takes memory on every GPU that it sees
        for gpu in wanted:
            tf.config.experimental.set_memory_growth(gpu, True)
        # The groups compute at once: one operation takes no more than its group's share of the cores. And a group
        # that waits for its games inside the graph occupies a thread, beside those that compute.
        tf.config.threading.set_intra_op_parallelism_threads(cores_of_a_group(num_groups))
        tf.config.threading.set_inter_op_parallelism_threads(available_cores() + num_groups)
    except RuntimeError:
        print("TensorFlow was already at work in this process: its threads and GPUs stay as they were set up")
    visible = tf.config.get_visible_devices("GPU")
    if not set(wanted) <= set(visible):
        raise UserError(f"device = {device!r}: this process has been set up for another. Use a new process")
    return f"/GPU:{visible.index(wanted[0])}" if wanted else "/CPU:0"


class BackgroundWriter:
    """Takes what is written to it in a thread of its own, so that writing never fails and never waits.

    It is a text stream that stands for `stream`; or else `take` is called with each item. It keeps the first `failure`.
    """

    def __init__(self, stream=None, take: Callable | None = None):
        self.take = take or (lambda text: print(text, end="", file=stream, flush=True))
        self.stream, self.items, self.failure = stream, queue.SimpleQueue(), None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        for item in iter(self.items.get, None):
            try:
                self.take(item)
            except Exception as error:
                self.failure = self.failure or error

    def write(self, item) -> None:
        """Let the thread take `item`, unless so many wait already that it is dropped."""
        if self.items.qsize() < 10_000:
            self.items.put(item)

    def close(self, seconds: float = 1.0) -> None:
        """Let the thread take what is left, for so long at most."""
        self.items.put(None)
        self.thread.join(seconds)

    def flush(self) -> None:
        """Do nothing: the thread flushes each text."""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # isatty, encoding, fileno


@contextlib.contextmanager
def uninterrupted(handle: Callable[[int], None]) -> Iterator[None]:
    """Let nothing from outside end or hold up the block: neither output that breaks or is not read, nor a signal.

    `handle` is called with the number of each signal that asks to end, unless that was ignored before, as by `nohup`.
    Stdout, stderr and the handlers are given back. Outside the main thread Python handles no signals.
    """
    one_place, before = False, {}
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no files, as in a notebook
        one_place = os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    out = BackgroundWriter(sys.stdout)
    errors = out if one_place else BackgroundWriter(sys.stderr)  # one keeps the order
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by other than Python
                before[number] = signal.signal(number, lambda number, _: handle(number))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            yield
    finally:
        out.close()
        errors.close()
        for number, handler in before.items():
            signal.signal(number, handler)
