"""What the benchmarks do alike: own a process, follow `a3c.py` by what it writes, name the machine, tell a spread.

TensorFlow is not imported: `peers.py` runs where there is none.
"""

import contextlib
import csv
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LIMIT = 300.0  # seconds that a child gets for whatever is waited for


class Child:
    """A process in a session of its own, for a `with` block: at its end the process and all that it started are gone.

    Args:
      command: words of the command line.
      output: file that what it prints is added to; a temporary one if none is given.
      grace: seconds after a SIGTERM until it is killed; 0 kills at once.
      options: of `subprocess.Popen`.
    """

    def __init__(self, command: list[str], output: str | None = None, grace: float = 0.0, **options):
        options = {"cwd": REPOSITORY, "stdin": subprocess.DEVNULL, "text": True, **options}
        self.name = f"{' '.join(command[1:3]).splitlines()[0]} in {options['cwd']}"
        self.grace, self.rates_seen = grace, 0
        self.folder = tempfile.TemporaryDirectory()
        self.output = pathlib.Path(output or f"{self.folder.name}/output")
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.grace:
                self.process.terminate()
                self.process.wait(self.grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self.folder.cleanup()

    def printed(self) -> str:
        """Return all that it has printed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, look: Callable, limit: float = LIMIT):
        """Return the first true value of `look()`.

        Raises:
          RuntimeError: the process has ended before; TimeoutError: `limit` seconds have passed. Both show its output.
        """
        end = time.monotonic() + limit
        while True:
            running = self.process.poll() is None  # before the look: its last words count
            if found := look():
                return found
            if not running:
                status = self.process.returncode
                raise RuntimeError(f"{self.name} ended with status {status}:\n{self.printed()[-3000:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name}: nothing for {limit:.0f} s:\n{self.printed()[-3000:]}")
            time.sleep(0.1)

    def next_rate(self, limit: float = LIMIT) -> float:
        """Return the number in the next line `rate NUMBER` that it prints."""
        seen = self.rates_seen
        rates = self.wait_for(lambda: re.findall(r"^rate (.*)\n", self.printed(), re.MULTILINE)[seen:], limit)
        self.rates_seen += 1
        return float(rates[0])


class Training(NamedTuple):
    """`a3c.py` at work; see `training`."""

    child: Child
    progress: str  # path of its progress.csv

    def wait_until_all_learn(self) -> tuple[float, float]:
        """Return the seconds from its start to its first update, and until all groups learnt."""
        pattern = r"first update ([\d.]+) s .* after ([\d.]+) s"
        found = self.child.wait_for(lambda: re.search(pattern, self.child.printed()))
        return float(found[1]), float(found[2])

    def measure(self, seconds: float) -> float:
        """Let it train for `seconds`, from one row of its progress.csv to another; return agent steps per second."""
        first = self._next_row()
        time.sleep(seconds)
        last = self._next_row()
        steps, seconds = (float(last[name]) - float(first[name]) for name in ("agent_steps", "seconds"))
        return steps / seconds

    def _next_row(self) -> dict:
        rows = len(read_rows(self.progress))
        return self.child.wait_for(lambda: read_rows(self.progress)[rows:])[-1]


@contextlib.contextmanager
def training(flags: list[str], python: str = sys.executable, root: pathlib.Path = REPOSITORY):
    """Run `a3c.py` of the checkout `root`, into a folder of its own that is gone afterwards; yield its `Training`."""
    with tempfile.TemporaryDirectory() as log_dir:
        command = [python, "a3c.py", "--summary_period=20", *flags, f"--log_dir={log_dir}/log"]
        with Child(command, cwd=root) as child:
            yield Training(child, f"{log_dir}/log/progress.csv")


def read_rows(path: str) -> list[dict]:
    """Return the rows of a CSV file, none if there is no file. A last line that is still being written is no row."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise SystemExit, so that `with` blocks end their children; not if ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def processor() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        if found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read()):
            return found[1]
    return platform.processor()


def hardware() -> str:
    """Return the processor's name and how many of its cores this process may use."""
    return f"{processor()}, {CORES} cores"


def spread(values: list[float], form: str) -> str:
    """Return `median (min - max)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"
