"""What the benchmarks do alike: own a process, time training in it, name the machine, tell a spread.

TensorFlow is not imported: `peers.py` runs where there is none.
"""

import contextlib
import csv
import json
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
from collections.abc import Callable, Iterator

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LIMIT = 300.0  # seconds that a child gets for whatever is waited for

# Times the checkout that it is started in, again and again: a line on stdin, `["training_agents", 20]`, asks for 20 s.
# What it calls is the same in old commits, but for the flags; their bench.py is in the folder above.
BENCH = """
import json, sys, tempfile
try:
    from benchmarks import bench
except ImportError:
    import bench
if hasattr(bench.a3c, "parse_config"):
    config = bench.a3c.parse_config(sys.argv[1:])
else:
    parser = bench.a3c.config_parser("")
    config = bench.a3c.config_from(parser, parser.parse_args())
game, device = bench.a3c.game_and_device(config)
with bench.tf.device(device), tempfile.TemporaryDirectory() as log_dir:
    built = bench.Bench(config, game, device, log_dir)
    print(json.dumps({"answer": "ready"}), flush=True)
    for line in sys.stdin:
        agents, seconds = json.loads(line)
        print(json.dumps({"answer": built.measure_updates(getattr(built, agents), seconds)}), flush=True)
"""


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
        self.grace, self.answers = grace, 0
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

    def answer(self, limit: float = LIMIT):
        """Return what the next line of JSON that it prints, `{"answer": ...}`, holds."""
        lines = self.wait_for(lambda: re.findall(r'^{"answer": .*}\n', self.printed(), re.M)[self.answers :], limit)
        self.answers += 1
        return json.loads(lines[0])["answer"]


@contextlib.contextmanager
def training(flags: list[str], root: pathlib.Path = REPOSITORY, python: str = sys.executable) -> Iterator[Callable]:
    """Build what `a3c.py` of the checkout `root` trains with, in a process of its own.

    Yields a function that lets "training_agents" or, without games, "network_agents" train for so many seconds, and
    returns agent steps per second. Between its calls nothing goes on.
    """
    with Child([python, "-c", BENCH, *flags], cwd=root, stdin=subprocess.PIPE) as child:
        child.answer()

        def measure(agents: str, seconds: float) -> float:
            print(json.dumps([agents, seconds]), file=child.process.stdin, flush=True)
            return child.answer(seconds + LIMIT)

        yield measure


def first_update(flags: list[str], root: pathlib.Path = REPOSITORY) -> float:
    """Start `a3c.py` of the checkout `root`; return the seconds until its progress.csv tells of the first update."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "a3c.py", *flags, "--summary_period=1", f"--log_dir={folder}/log"]
        with Child(command, cwd=root) as child:
            child.wait_for(lambda: read_rows(f"{folder}/log/progress.csv"))
            return time.monotonic() - start


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
