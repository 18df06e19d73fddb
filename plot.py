"""Draw learning curves: `python plot.py log/Breakout-v0` writes scores.png and losses.png into the run's folder.

Give several runs to compare them, `--steps N` as far as N agent steps; `--reference FILE.csv` adds dashed curves and
single points of average score by agent steps, and by hours where the file knows seconds.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages

import argparse
import csv
import math
import os
import sys

import matplotlib

matplotlib.use("Agg")  # pictures into files; needs no display
import matplotlib.pyplot as plt
import numpy as np

AXES = {"agent_steps": "agent steps, millions", "episodes": "games played, thousands", "seconds": "hours of training"}
UNITS = {"agent_steps": 1e6, "episodes": 1e3, "seconds": 3600.0}
LOSSES = ("policy_loss", "value_loss", "entropy", "gradient_norm", "learning_rate", "steps_per_second")


def read_columns(path: str) -> dict[str, np.ndarray]:
    """Read a CSV file with a header into one array per column; what is not a number stays text.

    Raises:
      ValueError: there is no such file, or it holds no rows.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "progress.csv")
    if not os.path.exists(path):
        raise ValueError(f"no {path}")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(line for line in file if not line.startswith("#"))]
    if not rows:
        raise ValueError(f"{path} has no rows yet")

    def column(name: str) -> np.ndarray:
        texts = [row[name] for row in rows]
        try:
            return np.array(texts, float)
        except ValueError:
            return np.array(texts)

    return {name: column(name) for name in rows[0]}


def first_steps(run: dict[str, np.ndarray], steps: float) -> dict[str, np.ndarray]:
    """Return the rows of a run up to so many agent steps. Raises ValueError where there are none."""
    if run["agent_steps"][0] > steps:
        raise ValueError(f"--steps {steps:,.0f}: a run's first row is after {run['agent_steps'][0]:,.0f} agent steps")
    return {name: column[run["agent_steps"] <= steps] for name, column in run.items()}


def draw_scores(runs: dict[str, dict], references: dict[str, dict], path: str) -> None:
    """Draw average (thick) and maximum (thin) score of recent games by agent steps, games and hours."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for index, (name, run) in enumerate(runs.items()):
            x = run[axis] / UNITS[axis]
            panel.plot(x, run["average_score"], color=f"C{index}", label=name)
            panel.plot(x, run["maximum_score"], color=f"C{index}", linewidth=0.6, alpha=0.5)
        for index, (name, reference) in enumerate(references.items(), len(runs)):
            y = reference["average_score"]
            x = reference.get(axis, np.full(len(y), np.nan)) / UNITS[axis]
            panel.plot(x, y, "--" if len(y) > 1 else "o", color=f"C{index}", label=name)
        if axis == "agent_steps":
            farthest = max(run[axis].max() for run in runs.values()) / UNITS[axis]
            panel.set_xlim(0, farthest * 1.02)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("raw score of recent games: average, maximum (thin)")
    highest = max(np.nan_to_num(run["maximum_score"]).max() for run in runs.values())  # NaN until a game has ended
    lowest = min(0, *(np.nan_to_num(run["average_score"]).min() for run in runs.values()))  # Pong's go down to -21
    panels[0].set_ylim(lowest * 1.05, highest * 1.05 or 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_losses(runs: dict[str, dict], path: str) -> None:
    """Draw the losses, the entropy, the gradient norm, the learning rate and the speed by agent steps."""
    figure, panels = plt.subplots(2, 3, figsize=(15, 7), sharex=True, layout="constrained")
    for panel, name in zip(panels.flat, LOSSES, strict=True):
        for run_name, run in runs.items():
            panel.plot(run["agent_steps"] / UNITS["agent_steps"], run[name], linewidth=0.8, label=run_name)
        panel.set_title(name)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel(AXES["agent_steps"])
    panels[0, 0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def split_references(path: str) -> dict[str, dict]:
    """Read a reference file; where its column `run` names several curves, each becomes one."""
    columns = read_columns(path)
    if "run" not in columns:
        return {os.path.basename(path): columns}
    names = dict.fromkeys(columns["run"].tolist())
    return {name: {k: v[columns["run"] == name] for k, v in columns.items()} for name in names}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs, or their progress.csv")
    parser.add_argument("--out", help="folder for the pictures (by default that of the first run)")
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="FILE",
        help="CSV with agent_steps, average_score and, if it has them, seconds and (for several curves) run",
    )
    parser.add_argument("--steps", type=float, default=math.inf, help="draw only this many agent steps of each run")
    arguments = parser.parse_args()
    try:
        runs = {_run_name(path): first_steps(read_columns(path), arguments.steps) for path in arguments.runs}
        references = {name: curve for path in arguments.reference for name, curve in split_references(path).items()}
        first = arguments.runs[0]
        out = arguments.out or (first if os.path.isdir(first) else os.path.dirname(first) or ".")
        os.makedirs(out, exist_ok=True)
        draw_scores(runs, references, os.path.join(out, "scores.png"))
        draw_losses(runs, os.path.join(out, "losses.png"))
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"plot.py: error: {error}")
    print(f"wrote {os.path.join(out, 'scores.png')} and {os.path.join(out, 'losses.png')}")


def _run_name(path: str) -> str:
    folder = os.path.dirname(path) if path.endswith(".csv") else path
    return os.path.basename(os.path.normpath(folder)) or path


if __name__ == "__main__":
    main()
