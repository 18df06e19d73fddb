"""Train a preset on seven games, without a change for any, and score the agents: `python -m benchmarks.games`.

The protocol is that of Stable-Baselines3's zoo: `NoFrameskip-v4` ids, frame-skip 4, the maximum of two frames, up to 30
no-ops before a game, a lost life ends the return, 10 million agent steps; then 100 games by the softmax policy, raw
scores. One run goes on each core at a time; where there are fewer runs than cores, they share all cores. What has a row
in the table is not run again, what was stopped is resumed.
"""

import argparse
import json
import os
import sys
import threading

import a3c
from benchmarks.experiments import Trial, folder_of, follow, on_all_cores, prepare, read_table, run, steps_of, write

GAMES = ("BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders")
FRAMES = "--frameskip=4"
FLAGS = f"{FRAMES} --max_pool=True --noop_max=30"
FIGURES = ("mean", "standard_deviation", "games")  # of results.json
COLUMNS = ["name", "seed", "agent_steps", "minutes", "cores", "1M", "5M", "10M", *FIGURES, "ended"]


def train_and_play(
    trial: Trial, folder: str, steps: int, games: int, cores: list[int], stop: threading.Event
) -> dict | None:
    """Train until `steps`, then play; return the row, or None where `stop` came first."""
    log_dir = os.path.join(folder, folder_of(trial.name, trial.seed))
    row = run(trial, log_dir, steps, cores, stop)
    if not row or row["ended"] != "done":
        return row
    out = os.path.join(log_dir, "played")
    play = ["a3c-test.py", f"--model={log_dir}", f"--out={out}", f"--iter={games}", "--policy=softmax", "--film=0"]
    status = follow([*play, FRAMES, "--device=cpu"], cores, os.path.join(log_dir, "output.txt"), stop)
    if status is None:
        return None
    if status:
        return {**row, "ended": f"a3c-test.py failed with exit status {status}"}
    with open(os.path.join(out, "results.json")) as file:
        results = json.load(file)
    return {**row, **{name: results[name] for name in FIGURES}}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=a3c.PRESETS, default="fast", help="to train with (%(default)s)")
    parser.add_argument("--games", nargs="+", choices=GAMES, default=GAMES, metavar="GAME", help="all seven by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="to train each with (1)")
    parser.add_argument("--steps", type=int, default=10_000_000, help="agent steps of each run (%(default)s)")
    parser.add_argument("--play", type=int, default=100, help="games to score each agent by (%(default)s)")
    parser.add_argument("--out", help="table to add to (results/games-PRESET.csv)")
    parser.add_argument("--log_dir", help="folder of the runs' folders (log/games-PRESET)")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.play) < 1:
        parser.error("--steps and --play must be above 0")
    out = arguments.out or f"results/games-{arguments.preset}.csv"  # each preset has its own
    folder = os.path.abspath(arguments.log_dir or f"log/games-{arguments.preset}")  # a3c.py may run in another
    flags = f"--preset={arguments.preset} {FLAGS} --game="
    try:
        have = {
            (row["name"], int(row["seed"]))
            for row in read_table(out, COLUMNS)
            if row["ended"] == "done" and steps_of(row) >= arguments.steps and int(row["games"]) >= arguments.play
        }
        trials = [
            Trial(game, f"{flags}{game}NoFrameskip-v4", seed)
            for seed in arguments.seeds
            for game in arguments.games
            if (game, seed) not in have
        ]
        prepare(folder, trials)
    except (OSError, ValueError) as error:
        sys.exit(f"games.py: error: {error}")

    def run_trial(trial: Trial, cores: list[int], stop: threading.Event) -> dict | None:
        return train_and_play(trial, folder, arguments.steps, arguments.play, cores, stop)

    on_all_cores(trials, run_trial, lambda row: write(out, row, COLUMNS))


if __name__ == "__main__":
    main()
