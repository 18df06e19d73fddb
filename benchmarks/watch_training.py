"""Play real games with a run while it trains: `python -m benchmarks.watch_training log/Breakout-v0 --games 10`.

Each new checkpoint plays by `a3c-test.py`, in a process of its own and at the lowest priority: on busy cores training
hardly slows down, and an evaluation takes minutes. Each makes a row of `evaluation.csv` in the run's folder, two points
of TensorBoard under `evaluation`, and a folder `evaluation/N` with `results.json` and a film, where N counts updates.
`python plot.py LOG --reference LOG/evaluation.csv` draws it. Flags of `a3c-test.py` may follow. Ctrl-C ends it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time

import checkpoint
import startup
from benchmarks.common import REPOSITORY, read_rows
from settings import names_in
from startup import UserError, as_user_error, tf

COLUMNS = ["iteration", "agent_steps", "episodes", "seconds", "games", "average_score", "maximum_score"]


def evaluate(folder: str, games: int, flags: list[str], not_before: int) -> dict | None:
    """Play with the newest checkpoint of a run; return the row, or None if it has no new one since so many agent steps.

    Raises UserError if the checkpoint cannot be read or played.
    """
    found = checkpoint.all_checkpoints(folder)
    if not found:
        return None
    tensors, iteration = checkpoint.read(found[0])
    row = {name: x for name, x in json.loads(tensors["progress"]).items() if name in COLUMNS}
    if row["agent_steps"] < not_before:
        return None
    model, out = os.path.abspath(found[0]), os.path.join(os.path.abspath(folder), "evaluation", str(iteration))
    command = [sys.executable, "a3c-test.py", f"--model={model}", f"--out={out}", "--device=cpu"]
    played = subprocess.run([*command, f"--iter={games}", *flags], cwd=REPOSITORY, capture_output=True, text=True)
    if played.returncode == 2:  # a wrong flag
        sys.exit(played.stderr)
    if played.returncode:
        lines = [line for line in played.stderr.splitlines() if "rror: " in line]  # also of a traceback
        raise UserError(f"{found[0]} could not be played: {['it was stopped', *lines][-1]}")
    with open(os.path.join(out, "results.json")) as file:
        results = json.load(file)
    return row | {"games": games, "average_score": results["mean"], "maximum_score": results["maximum"]}


def add_row(path: str, row: dict) -> None:
    """Add a row to a table, below its head."""
    with as_user_error(f"cannot write {path}"), open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder of the run")
    parser.add_argument("--games", type=int, default=10, help="for each evaluation")
    parser.add_argument("--every", type=int, default=1, help="least agent steps between two evaluations")
    parser.add_argument("--once", action="store_true", help="evaluate the newest checkpoint and end")
    args, flags = parser.parse_known_args()
    if not os.path.isdir(args.folder):
        parser.error(f"{args.folder} is not a folder of a run")
    if min(args.games, args.every) < 1:
        parser.error("--games and --every must be above 0")
    if own := names_in(flags) & {"model", "out", "iter"}:
        parser.error(f"{', '.join(f'--{name}' for name in sorted(own))}: this program says that itself")
    how = "" if args.once else "; Ctrl-C ends this"
    print(f"{args.games} games with each new save in {args.folder}, by the greedy policy unless told{how}", flush=True)
    os.nice(19)
    table = os.path.join(args.folder, "evaluation.csv")
    evaluations = os.path.join(args.folder, "evaluation")
    with as_user_error(f"cannot write into {evaluations}"), tf.device(startup.choose_device("cpu")):  # no GPU
        curves = tf.summary.create_file_writer(evaluations)
    try:
        next_at = max((int(row["agent_steps"]) + args.every for row in read_rows(table)), default=0)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"watch_training: {table} is not as this program wrote it ({error}). Move it away")
    while True:
        try:
            row = evaluate(args.folder, args.games, flags, next_at)
        except UserError as error:  # a run that goes on may have removed the checkpoint meanwhile
            if args.once:
                sys.exit(f"watch_training: {error}")
            print(f"watch_training: {error}", file=sys.stderr)
            row = None
        if row:
            add_row(table, row)
            with curves.as_default(row["iteration"]):
                for name in ("average", "maximum"):  # tags as in training
                    tf.summary.scalar(f"{name}_rewards", row[f"{name}_score"])
            curves.flush()
            print(
                "{agent_steps:,} agent steps: mean {average_score:.1f}, best {maximum_score:.0f}".format(**row),
                flush=True,
            )
            next_at = row["agent_steps"] + args.every
        if args.once:
            if not row:
                print(f"{args.folder} has no save that has not been played")
            return
        time.sleep(5)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except UserError as error:
        sys.exit(f"watch_training: error: {error}")
