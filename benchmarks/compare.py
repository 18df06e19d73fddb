"""Time a commit beside the working tree: `python -m benchmarks.compare COMMIT`, with any flags of `a3c.py`.

COMMIT is unpacked into a temporary folder. Both sides start once, and then take turns: one is stopped while the other
is timed, and who begins alternates, so that a machine whose speed drifts slows both alike. Each round gives one ratio.

Training is timed as `a3c.py` does it, from the rows of its own progress.csv, once all its groups learn. With
`--network_alone` it is updates without games, by each side's own `bench.py`. With `--startup` it is the time from the
start of `a3c.py` until all its groups learn, in a new process for every turn.
"""

import argparse
import contextlib
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from benchmarks.common import LIMIT, REPOSITORY, Child, end_on_signals, hardware, spread, training

SETTLE = 1.0  # seconds for a process that goes on: it writes the rows of before, and fills its caches
# Measures for as many seconds as each line says, in the checkout that it is started in. What it calls is the same in
# old commits, whose bench.py is in the folder above.
NETWORK_ALONE = """
import importlib, sys, tempfile
try:
    bench = importlib.import_module("benchmarks.bench")
except ModuleNotFoundError:
    bench = importlib.import_module("bench")
parser = bench.a3c.config_parser("")
config = bench.a3c.config_from(parser, parser.parse_args())
game, device = bench.a3c.game_and_device(config)
with bench.tf.device(device), tempfile.TemporaryDirectory() as log_dir:
    side = bench.Bench(config, game, device, log_dir)
    print("ready", flush=True)
    for line in sys.stdin:
        steps = side.measure_updates(side.network_agents, float(line))
        print("rate", steps / config.agents_per_thread / config.unroll_step, flush=True)
"""
Measure = Iterator[Callable[[float], float]]  # seconds to measure for -> rate


@contextlib.contextmanager
def trained(root: pathlib.Path, flags: list[str]) -> Measure:
    """Yield a function that lets `a3c.py` of `root` go on for so many seconds and returns its agent steps/s."""
    with training(flags, root=root) as run:
        run.wait_until_all_learn()
        run.child.process.send_signal(signal.SIGSTOP)

        def measure(seconds: float) -> float:
            run.child.process.send_signal(signal.SIGCONT)
            time.sleep(SETTLE)
            rate = run.measure(seconds)
            run.child.process.send_signal(signal.SIGSTOP)
            return rate

        yield measure


@contextlib.contextmanager
def network_alone(root: pathlib.Path, flags: list[str]) -> Measure:
    """Yield a function that returns the updates/s of the network of `root` without games."""
    with Child([sys.executable, "-c", NETWORK_ALONE, *flags], cwd=root, stdin=subprocess.PIPE) as child:
        child.wait_for(lambda: "ready" in child.printed())

        def measure(seconds: float) -> float:
            print(seconds, file=child.process.stdin, flush=True)
            return child.next_rate(seconds + LIMIT)

        yield measure


@contextlib.contextmanager
def started(root: pathlib.Path, flags: list[str]) -> Measure:
    """Yield a function that starts `a3c.py` of `root` and returns the seconds until all groups learn."""

    def measure(_: float) -> float:
        with training(flags, root=root) as run:
            return run.wait_until_all_learn()[1]

    yield measure


def check_out(commit: str, folder: pathlib.Path) -> None:
    """Unpack the repository as of `commit` into a new folder. Raises ValueError where there is no such commit."""
    git = ["git", "-C", str(REPOSITORY)]
    if subprocess.run([*git, "rev-parse", "--verify", "--quiet", commit + "^{commit}"], capture_output=True).returncode:
        raise ValueError(f"no commit {commit!r} in {REPOSITORY}. A shallow clone gets it by: git fetch --unshallow")
    subprocess.run([*git, "archive", f"--output={folder}.tar", commit], check=True)
    shutil.unpack_archive(f"{folder}.tar", folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("commit", help="what git calls it; every flag not named here is a3c.py's, for both sides")
    parser.add_argument("--base_flags", help="a3c.py's flags for COMMIT, in place of those for both")
    parser.add_argument("--seconds", type=float, default=20, help="of each turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of one turn for each side (%(default)s)")
    parser.set_defaults(what=(trained, "steps/s"))
    for flag, what in (("--network_alone", (network_alone, "updates/s")), ("--startup", (started, "s"))):
        parser.add_argument(flag, dest="what", action="store_const", const=what, help="time this; see above")
    arguments, flags = parser.parse_known_args()
    if arguments.seconds <= 0 or arguments.rounds <= 0:
        parser.error("--seconds and --rounds must be above 0")
    base_flags = flags if arguments.base_flags is None else shlex.split(arguments.base_flags)
    (side, unit), names = arguments.what, (arguments.commit, "working tree")
    end_on_signals()
    rates = ([], [])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = pathlib.Path(folder, "base")
        check_out(arguments.commit, base)
        print(f"{hardware()}; {names[0]}: {shlex.join(base_flags)}; {names[1]}: {shlex.join(flags)}", flush=True)
        measures = [stack.enter_context(side(*x)) for x in ((base, base_flags), (REPOSITORY, flags))]
        for number in range(1, arguments.rounds + 1):
            for index in (0, 1) if number % 2 else (1, 0):
                rates[index].append(measures[index](arguments.seconds))
            pair = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in zip(names, rates, strict=True))
            ratio = rates[1][-1] / rates[0][-1]
            print(f"round {number} of {arguments.rounds}: {pair} {unit}, ratio {ratio:.3f}", flush=True)
    print(f"median (min - max) of {arguments.rounds} rounds")
    for name, values in zip(names, rates, strict=True):
        print(f"{name:20} {spread(values, ',.1f')} {unit}")
    print(f"{'ratio':20} {spread([new / old for old, new in zip(*rates, strict=True)], '.3f')}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        sys.exit(f"compare.py: error: {error}")
