"""Draw learning curves: `python plot.py log/Breakout-v0` writes scores.png and losses.png into the run's folder.

Give several runs to compare them, `--steps N` as far as N agent steps. `--reference FILE.csv` adds dashed curves or
points of `average_score` by `agent_steps` and, if it has the columns, by `episodes` and `seconds`; one for each `run`.
`--by_game` writes games.png in their place: a panel for each game that the names of runs and references begin with.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages

import argparse
import csv
import itertools
import math
import os
import sys

os.environ["MPLBACKEND"] = "Agg"  # Jupyter sets one that may not be there

import numpy as np
from matplotlib.figure import Figure

from startup import UserError

Curves = list[tuple[str, dict[str, np.ndarray]]]  # labels and columns
AXES = {"agent_steps": "agent steps, millions", "episodes": "games played, thousands", "seconds": "hours of training"}
UNITS = {"agent_steps": 1e6, "episodes": 1e3, "seconds": 3600}
LOSSES = ("policy_loss", "value_loss", "entropy", "gradient_norm", "learning_rate", "steps_per_second")


def read_columns(path: str, needed: tuple[str, ...], steps: float = math.inf) -> dict[str, np.ndarray]:
    """Read up to so many agent steps of a CSV file: the columns `needed`, and of `run` and the axes those that it has.

    Raises UserError if it cannot be read or has no rows, or if a column, but for `run`, has other than numbers.
    """
    path = os.path.join(path, "progress.csv") if os.path.isdir(path) else path
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet puts a mark at its beginning
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    rows = [row for row in rows if None not in row.values()]  # the last one may be half written
    if not rows:
        raise UserError(f"{path!r} has no rows yet")
    columns = {}
    for name in (*needed, *({"run", *AXES} & rows[0].keys())):
        try:
            columns[name] = np.array([row[name] for row in rows], str if name == "run" else float)
        except (KeyError, ValueError):
            raise UserError(f"{path!r}: column {name} is missing or not all numbers; is it CSV with commas?") from None
    near = columns["agent_steps"] <= steps
    if not near.any():
        raise UserError(f"--steps {steps:,.0f}: {path!r} begins with {columns['agent_steps'][0]:,.0f} agent steps")
    return {name: column[near] for name, column in columns.items()}


def read_references(path: str) -> Curves:
    """Read the curves of a reference file."""
    columns = read_columns(path, ("agent_steps", "average_score"))
    names = columns.get("run", np.full(len(columns["agent_steps"]), os.path.basename(path)))
    return [(shown(name), {k: v[names == name] for k, v in columns.items()}) for name in dict.fromkeys(names.tolist())]


def shown(name: str) -> str:
    """Return a name that Matplotlib shows as it is: it hides those with a leading `_` and sets formulas between `$`."""
    return " " * name.startswith("_") + name.encode(errors="replace").decode().replace("$", r"\$")


def draw_scores(runs: Curves, references: Curves, path: str) -> None:
    """Draw average (thick) and maximum (thin) score of recent games by agent steps, games and hours."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        for index, (name, run) in enumerate(runs):
            x = run[axis] / UNITS[axis]
            panel.plot(x, run["average_score"], "-" if len(x) > 1 else "o", color=f"C{index}", label=name)
            panel.plot(x, run["maximum_score"], color=f"C{index}", linewidth=0.6, alpha=0.5)
        for index, (name, reference) in enumerate(references, len(runs)):
            x, y = reference.get(axis, math.nan * reference["agent_steps"]), reference["average_score"]
            if axis == "agent_steps":
                x = np.where(x > 1.1 * max(run["agent_steps"].max() for _, run in runs), math.nan, x)  # hardly farther
            panel.plot(x / UNITS[axis], y, "--" if len(y) > 1 else "o", color=f"C{index}", label=name)
        panel.set_xlabel(AXES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("raw score of recent games: average, maximum (thin)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)


def game_and_rest(name: str) -> tuple[str, str]:
    """Return the game that a name says and what follows: Pong and 1 for Pong-1, Pong and v5 for ALE/Pong-v5."""
    game, dash, rest = os.path.basename(name).partition("-")
    return (game, rest) if dash else (name, name)


def draw_games(runs: Curves, references: Curves, path: str) -> None:
    """Draw the average score by agent steps, a panel for each game that has runs."""
    runs = [(game_and_rest(name)[0], run) for name, run in runs]
    references = [(*game_and_rest(name), reference) for name, reference in references]
    games = list(dict.fromkeys(game for game, _ in runs))
    peers = list(dict.fromkeys(peer for game, peer, _ in references if game in games))
    rows = math.ceil(len(games) / 4)
    figure = Figure(figsize=(15, 0.6 + 3 * rows), layout="constrained")
    panels = figure.subplots(rows, min(4, len(games)), squeeze=False).flat
    for panel, shown_game in itertools.zip_longest(panels, games):
        panel.set_visible(shown_game is not None)
        panel.set_title(shown_game)
        panel.grid(alpha=0.3)
        for game, run in runs:
            if game == shown_game:
                x = run["agent_steps"] / UNITS["agent_steps"]
                panel.plot(x, run["average_score"], color="C0", label="these runs")
        for game, peer, reference in references:
            if game == shown_game:
                x, y = reference["agent_steps"] / UNITS["agent_steps"], reference["average_score"]
                panel.plot(x, y, "--" if len(y) > 1 else "o", color=f"C{1 + peers.index(peer) % 9}", label=peer)
    figure.supxlabel(AXES["agent_steps"])
    figure.supylabel("average raw score of recent games")
    legend = {artist.get_label(): artist for panel in figure.axes for artist in panel.lines}
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)


def draw_losses(runs: Curves, _: Curves, path: str) -> None:
    """Draw the losses, the entropy, the gradient norm, the learning rate and the speed by agent steps."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    for panel, column in zip(figure.subplots(2, 3, sharex=True).flat, LOSSES, strict=True):
        for name, run in runs:
            x = run["agent_steps"] / UNITS["agent_steps"]
            panel.plot(x, run[column], "-" if len(x) > 1 else "o", linewidth=0.8, label=name)
        panel.set_title(column)
        panel.grid(alpha=0.3)
    figure.supxlabel(AXES["agent_steps"])
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the command line."""
    parser, path = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False), os.path.expanduser
    parser.add_argument("runs", type=path, nargs="+", help="folders of runs, or their progress.csv")
    parser.add_argument("--out", type=path, help="folder for the pictures (by default that of the first run)")
    parser.add_argument("--reference", type=path, nargs="+", default=[], metavar="FILE", help="curves to compare with")
    parser.add_argument("--by_game", action="store_true", help="a panel for each game; names begin with GAME-")
    parser.add_argument("--steps", type=float, default=math.inf, help="draw only this many agent steps of each run")
    flags = parser.parse_args()
    out = flags.out or (flags.runs[0] if os.path.isdir(flags.runs[0]) else os.path.dirname(flags.runs[0]) or ".")
    drawn = {"games.png": draw_games} if flags.by_game else {"scores.png": draw_scores, "losses.png": draw_losses}
    paths = [os.path.abspath(path).removesuffix(os.sep + "progress.csv") for path in flags.runs]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    try:
        columns = (*AXES, "average_score", "maximum_score", *LOSSES)
        runs = [(shown(os.path.relpath(path, shared)), read_columns(path, columns, flags.steps)) for path in paths]
        references = [curve for path in flags.reference for curve in read_references(path)]
        os.makedirs(out, exist_ok=True)
        for name, draw in drawn.items():
            draw(runs, references, os.path.join(out, name))
    except (OSError, UserError) as error:
        sys.exit(f"plot.py: error: {error}")
    for name, run in runs:
        if np.isnan(run["average_score"]).all():
            print(f"{name.encode(errors='replace').decode()}: no game has ended yet, so there is no score to draw")
    print(("wrote " + " and ".join(os.path.join(out, name) for name in drawn)).encode(errors="replace").decode())


if __name__ == "__main__":
    main()
