"""Try hyperparameters: `python -m benchmarks.experiments docs/experiments.txt --steps 2000000 --seeds 1 2`.

Each line of the list is a name, a colon and flags of `a3c.py`. Every configuration is run with every seed, one run on
each core at a time, until it has taken so many agent steps; then its row goes into `docs/experiments.csv`, also if it
failed. Where there are fewer runs than cores, they share all cores. What has a row of so many steps is not run again,
and what was stopped half-way is resumed, so a search may take many sittings. Each run has a folder of its own; runs of
several seeds share nothing but their flags. Runs side by side share memory and caches: compare by agent steps, and take
minutes from `python -m benchmarks.bench` with the same flags.
"""

import argparse
import csv
import math
import os
import queue
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import REPOSITORY, read_rows
from startup import available_cores, uninterrupted

MARKS = {"0.5M": 0.5e6, "1M": 1e6, "2M": 2e6, "5M": 5e6, "10M": 10e6}
COLUMNS = ["name", "flags", "seed", "cores", "agent_steps", "minutes", *MARKS, "ended"]
WINDOW = 100_000  # agent steps up to a mark that a score is averaged over
ANNEALING = "--annealing_steps=160000000"  # of the defaults; without it a short run would anneal sooner


class Trial(NamedTuple):
    """One configuration with one seed."""

    name: str
    flags: str
    seed: int


def read_list(path: str) -> dict[str, str]:
    """Return the flags by name. Raises ValueError on a line without a colon or with a name that was there before.

    Names that differ only by what `folder_of` makes of them count as the same.
    """
    found = {}
    with open(path) as file:
        for line in file:
            line = line.partition("#")[0].strip()
            name, colon, flags = line.partition(":")
            if line and (not colon or folder_of(name, 1) in {folder_of(other, 1) for other in found}):
                raise ValueError(f"{path}: {line!r} must be a new name, a colon and flags")
            shlex.split(flags)  # raises ValueError where a quote is not closed
            if line:
                found[name] = flags.strip()
    return found


def folder_of(name: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{name.replace(' ', '-')}-{seed}"


def prepare(log_dir: str, trials: list[Trial]) -> None:
    """Make the runs' folders. Raises ValueError if one has a run that was begun with other flags, which it keeps."""
    for trial in trials:
        folder = Path(log_dir, folder_of(trial.name, trial.seed))
        flags, has_run = folder / "flags.txt", any(folder.glob("*.ckpt*"))
        if has_run and flags.exists() and (others := flags.read_text()) != trial.flags:
            raise ValueError(f"{folder} has a run with other flags ({others}). Use another name or --log_dir")
        folder.mkdir(parents=True, exist_ok=True)
        flags.write_text(trial.flags)


def known(rows: list[dict], column: str) -> list[float]:
    """Return a column's numbers; nan stands where no game has ended, or for the speed of one update."""
    return [number for row in rows if not math.isnan(number := float(row[column]))]


def summary(rows: list[dict], steps: int = 0) -> dict:
    """Return the cells that a run's `progress.csv` gives. Minutes are at its median speed: it may have been paused.

    A run that has come to its end took `steps` agent steps: its last row may come less than a row's distance before.
    """
    cells = dict.fromkeys(["agent_steps", "minutes", *MARKS], "")
    if not rows:
        return cells
    before, last = [0, *(int(row["agent_steps"]) for row in rows)][-2:]
    reached = steps if last < steps < 2 * last - before else last
    speeds = known(rows, "steps_per_second")
    cells |= {"agent_steps": reached, "minutes": f"{reached / statistics.median(speeds) / 60:.1f}" if speeds else ""}
    for name, mark in MARKS.items():
        scores = known([r for r in rows if mark - WINDOW < int(r["agent_steps"]) <= mark], "average_score")
        if scores and reached >= mark:
            cells[name] = f"{sum(scores) / len(scores):.1f}"
    return cells


def run(trial: Trial, log_dir: str, steps: int, cores: list[int], stop: threading.Event) -> dict | None:
    """Train on these cores until `steps`; return the trial's row, or None where `stop` came first."""
    own = [f"--max_agent_steps={steps}", f"--random_seed={trial.seed}", f"--log_dir={log_dir}", "--device=cpu"]
    flags = shlex.split(trial.flags) if "--preset" in trial.flags else [ANNEALING, *shlex.split(trial.flags)]
    status = follow(["a3c.py", *flags, *own], cores, f"{log_dir}/output.txt", stop)
    if status is None:
        return None
    cells = summary(read_rows(f"{log_dir}/progress.csv"), steps if status == 0 else 0)
    ended = "done" if status == 0 else f"failed with exit status {status}"
    return {**trial._asdict(), "cores": len(cores), **cells, "ended": ended}


def follow(program: list[str], cores: list[int], output: str, stop: threading.Event) -> int | None:
    """Run a program of ours to its end; return its exit status, or None where `stop` came first: it is told to end.

    It is also told so where the thread that called this is no more: no training outlives a search that is killed.
    """
    words = ["setpriv", "--pdeathsig=TERM", "taskset", "-c", ",".join(map(str, cores)), sys.executable, *program]
    with open(output, "a") as file:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True)
    while process.poll() is None:
        if stop.wait(0.5):
            process.terminate()  # it saves
            process.wait()
            return None
    return process.returncode


def on_all_cores(trials: list, run_trial: Callable[[Any, list, threading.Event], dict | None], add: Callable) -> None:
    """Run the trials, as many at a time as there are cores, until all have run or a signal comes; `add` gets each row.

    Where there are fewer trials than cores, each gets several. Raises what went wrong with one, after all have ended.
    """
    waiting, stop, lock, failures = queue.SimpleQueue(), threading.Event(), threading.Lock(), []
    for trial in trials:
        waiting.put(trial)

    def work(cores: list[int]) -> None:
        try:
            while not (stop.is_set() or waiting.empty()):
                trial = waiting.get_nowait()
                print(f"cores {', '.join(map(str, cores))}: {trial}", flush=True)
                if row := run_trial(trial, cores, stop):
                    with lock:
                        add(row)
                    print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        except queue.Empty:  # another took the last one
            pass
        except Exception as error:
            failures.append(error)
            stop.set()

    all_cores = sorted(os.sched_getaffinity(0))[: available_cores()]
    number = min(len(trials), len(all_cores))
    workers = [threading.Thread(target=work, args=(all_cores[index::number],)) for index in range(number)]
    with uninterrupted(lambda _: stop.set()):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for failure in failures[:1]:
        raise failure


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("list", help="file with a line `name: flags` for each configuration")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configurations to run (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="to run each with (1)")
    parser.add_argument("--steps", type=int, default=2_000_000, help="agent steps of each run (%(default)s)")
    parser.add_argument("--out", default="docs/experiments.csv", help="table to add to (%(default)s)")
    parser.add_argument("--log_dir", default="log/experiments", help="folder of the runs' folders (%(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be above 0")
    log_dir = os.path.abspath(arguments.log_dir)  # a3c.py runs in another folder than this may
    try:
        configurations = read_list(arguments.list)
        names = arguments.only or list(configurations)
        trials = [Trial(name, configurations[name], seed) for seed in arguments.seeds for name in names]
        rows = read_table(arguments.out, COLUMNS)
        have = {(row["name"], int(row["seed"])) for row in rows if steps_of(row) >= arguments.steps}
        trials = [trial for trial in trials if (trial.name, trial.seed) not in have]
        prepare(log_dir, trials)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"experiments.py: error: {error}")

    def run_trial(trial: Trial, cores: list[int], stop: threading.Event) -> dict | None:
        return run(trial, os.path.join(log_dir, folder_of(trial.name, trial.seed)), arguments.steps, cores, stop)

    on_all_cores(trials, run_trial, lambda row: write(arguments.out, row, COLUMNS))


def read_table(path: str, columns: list[str]) -> list[dict]:
    """Return the rows of a table. Raises OSError if it cannot be written, ValueError if it is not of this program."""
    rows = read_rows(path, whole=True)
    if rows and list(rows[0]) != columns:
        raise ValueError(f"{path} has not the columns {', '.join(columns)}")
    with open(f"{path}.new", "w"):
        os.remove(f"{path}.new")
    return rows


def steps_of(row: dict) -> int:
    """Return the agent steps of a row of a table, 0 where none are known. Spreadsheets write 1E+07."""
    return int(float(row.get("agent_steps") or 0))


def write(path: str, row: dict, columns: list[str]) -> None:
    """Add a row, in place of the one that the same trial had; not where that has more steps, as if this has failed."""
    rows = read_rows(path, whole=True)
    same = [old for old in rows if (old["name"], old["seed"]) == (row["name"], str(row["seed"]))]
    if any(steps_of(old) > steps_of(row) for old in same):
        return
    rows = [old for old in rows if old not in same]
    with open(f"{path}.new", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    main()
