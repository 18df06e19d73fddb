"""What the benchmarks do alike: time training in a process of its own, name the machine, tell a spread.

TensorFlow is not imported: `peers.py` runs where there is none.
"""

import contextlib
import csv
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LIMIT = 300.0  # seconds that a process gets beside those that it measures

# What it calls is the same in old commits, but for the flags; their bench.py is in the folder above.
TRAIN = """
import json, sys, tempfile
try:
    from benchmarks import bench
except ImportError:
    import bench
agents, seconds, *flags = sys.argv[1:]
if hasattr(bench.a3c, "parse_config"):
    config = bench.a3c.parse_config(flags)
else:
    parser = bench.a3c.config_parser("")
    config = bench.a3c.config_from(parser, parser.parse_args(flags))
game, device = bench.a3c.game_and_device(config)
with bench.tf.device(device), tempfile.TemporaryDirectory() as log_dir:
    built = bench.Bench(config, game, device, log_dir)
    print(json.dumps(built.measure_updates(getattr(built, agents), float(seconds))), flush=True)
    if hasattr(built, "close"):
        built.close()
"""


def ask(command: list[str], folder: pathlib.Path = REPOSITORY, limit: float = LIMIT):
    """Run a program in `folder`; return the JSON that is the last line it prints. Raises RuntimeError if it fails."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{command[0]} in {folder} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train(
    flags: list[str],
    seconds: float,
    folder: pathlib.Path = REPOSITORY,
    agents: str = "training_agents",
    python: str = sys.executable,
) -> float:
    """Let the checkout in `folder` train for so many seconds, in a process of its own; return agent steps per second.

    It trains as `a3c.py` does with these flags, or without games if `agents` is "network_agents". Start-up and warm-up
    are not timed.
    """
    return ask([python, "-c", TRAIN, agents, str(seconds), *flags], folder, seconds + LIMIT)


def first_update(flags: list[str], folder: pathlib.Path = REPOSITORY) -> float:
    """Return the seconds from the start of `a3c.py` of the checkout in `folder` to its first row of progress.csv."""
    with tempfile.TemporaryDirectory() as log_dir:
        command = [sys.executable, "a3c.py", *flags, "--max_iteration=1", "--summary_period=1", f"--log_dir={log_dir}"]
        start = time.time()
        done = subprocess.run(command, cwd=folder, timeout=LIMIT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a3c.py in {folder} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        return os.path.getmtime(f"{log_dir}/progress.csv") - start


def read_rows(path: str, whole: bool = False) -> list[dict]:
    """Return the rows of a CSV file, none if there is no file. A last line without an end is no row, unless `whole`."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if whole or line.endswith("\n")))


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
