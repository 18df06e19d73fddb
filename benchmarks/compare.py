"""Time a commit beside the working tree: `python -m benchmarks.compare COMMIT`, with any flags of `a3c.py`.

COMMIT is unpacked into a temporary folder. The two sides take turns, each turn in a new process, and who begins
alternates, so that a machine whose speed drifts slows both alike. Each round gives one ratio.

Timed is training, in agent steps per second, by each side's own `bench.py`. With `--network_alone` it is training
without games. With `--startup` it is the seconds from the start of `a3c.py` to its first update.
"""

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

from benchmarks.common import REPOSITORY, first_update, hardware, spread, train


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
    parser.add_argument("--network_alone", action="store_true", help="time training without games")
    parser.add_argument("--startup", action="store_true", help="time the start")
    arguments, flags = parser.parse_known_args()
    if not (0 < arguments.seconds < float("inf") and arguments.rounds > 0):
        parser.error("--seconds and --rounds must be above 0")
    base_flags = flags if arguments.base_flags is None else shlex.split(arguments.base_flags)
    agents = "network_agents" if arguments.network_alone else "training_agents"
    unit, names, values = "s" if arguments.startup else "steps/s", (arguments.commit, "working tree"), ([], [])
    with tempfile.TemporaryDirectory() as folder:
        sides = [(base_flags, pathlib.Path(folder, "base")), (flags, REPOSITORY)]
        check_out(arguments.commit, sides[0][1])
        print(f"{hardware()}; {names[0]}: {shlex.join(base_flags)}; {names[1]}: {shlex.join(flags)}", flush=True)
        for number in range(1, arguments.rounds + 1):
            for index in (0, 1) if number % 2 else (1, 0):
                side, checkout = sides[index]
                if arguments.startup:
                    values[index].append(first_update(side, checkout))
                else:
                    values[index].append(train(side, arguments.seconds, checkout, agents))
            (*_, base), (*_, own) = values
            pair = f"{names[0]} {base:,.1f}, {names[1]} {own:,.1f} {unit}, ratio {own / base:.3f}"
            print(f"round {number} of {arguments.rounds}: {pair}", flush=True)
    print(f"median (min - max) of {arguments.rounds} rounds")
    for name, numbers in zip(names, values, strict=True):
        print(f"{name:20} {spread(numbers, ',.1f')} {unit}")
    print(f"{'ratio':20} {spread([own / base for base, own in zip(*values, strict=True)], '.3f')}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"compare.py: error: {error}")
