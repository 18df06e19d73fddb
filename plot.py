"""Draw learning curves: `python plot.py log/Breakout-v0` writes scores.png and losses.png into the run's folder.

Give several runs to compare them, `--steps N` as far as N agent steps; `--reference FILE.csv` adds dashed curves and
single points of average score by agent steps, and by hours where the file knows seconds.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages

import argparse
import csv
import functools
import math
import os
import sys

os.environ["MPLBACKEND"] = "Agg"  # pictures into files, without a display; Jupyter sets one of its own

import numpy as np
from matplotlib.figure import Figure

from startup import UserError

Curves = list[tuple[str, dict[str, np.ndarray]]]  # labels and columns
AXES = {"agent_steps": "agent steps, millions", "episodes": "games played, thousands", "seconds": "hours of training"}
UNITS = {"agent_steps": 1e6, "episodes": 1e3, "seconds": 3600.0}
LOSSES = ("policy_loss", "value_loss", "entropy", "gradient_norm", "learning_rate", "steps_per_second")


def read_columns(path: str, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read a CSV file with a header into one array per column; what is not a number stays text.

    A spreadsheet may have saved it, with a mark of its encoding, semicolons or tabs, and commas in the numbers.

    Raises:
      UserError: there is no such file, or it has no rows, or one of the columns `needed` is missing or not numbers.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "progress.csv")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in file if line.strip(",;\t\r\n") and not line.startswith("#")]
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        reader = csv.DictReader(lines, delimiter=delimiter)
        rows = [row for row in reader if None not in row.values()]  # the last may be on its way
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"{path!r} has no rows yet")

    def column(name: str) -> np.ndarray:
        texts = [row[name] for row in rows]
        try:
            return np.array(texts if delimiter == "," else [text.replace(",", ".") for text in texts], float)
        except ValueError:
            return np.array(texts)

    columns = {name: column(name) for name in reader.fieldnames}
    for name in (*needed, *(AXES.keys() & columns.keys())):
        if name not in columns or columns[name].dtype != float:
            raise UserError(f"{path!r}: column {name} {'is not all numbers' if name in columns else 'is missing'}")
    return columns


def first_steps(run: dict[str, np.ndarray], steps: float) -> dict[str, np.ndarray]:
    """Return the rows of a run up to so many agent steps. Raises UserError where there are none."""
    if run["agent_steps"][0] > steps:
        raise UserError(f"--steps {steps:,.0f}: a run's first row is after {run['agent_steps'][0]:,.0f} agent steps")
    return {name: column[run["agent_steps"] <= steps] for name, column in run.items()}


def draw_scores(runs: Curves, references: Curves, path: str) -> None:
    """Draw average (thick) and maximum (thin) score of recent games by agent steps, games and hours."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    farthest = max(run["agent_steps"].max() for _, run in runs) / UNITS["agent_steps"] * 1.02
    panels[0].set_xlim(0, farthest)
    seen = [np.zeros(1)]
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for index, (name, run) in enumerate(runs):
            x = run[axis] / UNITS[axis]
            panel.plot(x, run["average_score"], color=f"C{index}", label=name)
            panel.plot(x, run["maximum_score"], color=f"C{index}", linewidth=0.6, alpha=0.5)
            seen += [run["average_score"], run["maximum_score"]]
        for index, (name, reference) in enumerate(references, len(runs)):
            y = reference["average_score"]
            x = reference.get(axis, np.full(len(y), np.nan)) / UNITS[axis]
            panel.plot(x, y, "--" if len(y) > 1 else "o", color=f"C{index}", label=name)
            seen += [y[x <= (farthest if panel is panels[0] else math.inf)]]
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("raw score of recent games: average, maximum (thin)")
    lowest, highest = (edge(np.concatenate(seen)) for edge in (np.nanmin, np.nanmax))  # NaN until a game has ended
    panels[0].set_ylim(lowest * 1.05, highest + 0.05 * (highest - lowest) or 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)


def draw_losses(runs: Curves, path: str) -> None:
    """Draw the losses, the entropy, the gradient norm, the learning rate and the speed by agent steps."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for panel, name in zip(panels.flat, LOSSES, strict=True):
        for run_name, run in runs:
            panel.plot(run["agent_steps"] / UNITS["agent_steps"], run[name], linewidth=0.8, label=run_name)
        panel.set_title(name)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel(AXES["agent_steps"])
    panels[0, 0].legend()
    figure.savefig(path, dpi=100)


def split_references(path: str) -> Curves:
    """Read a reference file; where its column `run` names several curves, each becomes one."""
    columns = read_columns(path, ("agent_steps", "average_score"))
    if "run" not in columns:
        return [(_label(os.path.basename(path)), columns)]
    names = columns["run"].astype(str)
    return [(_label(name), {k: v[names == name] for k, v in columns.items()}) for name in dict.fromkeys(names.tolist())]


def labels(paths: list[str]) -> list[str]:
    """Return for each run the end of its path, as short as tells the runs apart."""
    parts = [os.path.abspath(path).removesuffix(os.sep + "progress.csv").split(os.sep) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = [os.sep.join(part[-length:]) for part in parts]
        if len(set(ends)) == len(set(map(tuple, parts))):
            break
    return [_label(end) for end in ends]


def _label(name: str) -> str:
    """Return a name that Matplotlib shows as it is: it hides those with a leading `_` and sets formulas between `$`."""
    name = name.encode(errors="replace").decode().replace("$", r"\$")
    return " " * name.startswith("_") + name


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = functools.partial(parser.add_argument, type=os.path.expanduser)
    add("runs", nargs="+", help="folders of runs, or their progress.csv")
    add("--out", help="folder for the pictures (by default that of the first run)")
    add(
        "--reference",
        nargs="+",
        default=[],
        metavar="FILE",
        help="CSV with agent_steps, average_score and, if it has them, seconds and (for several curves) run",
    )
    parser.add_argument("--steps", type=float, default=math.inf, help="draw only this many agent steps of each run")
    arguments = parser.parse_args()
    try:
        columns = (*AXES, "average_score", "maximum_score", *LOSSES)
        runs = [first_steps(read_columns(path, columns), arguments.steps) for path in arguments.runs]
        runs = list(zip(labels(arguments.runs), runs, strict=True))
        references = [curve for path in arguments.reference for curve in split_references(path)]
        first = arguments.runs[0]
        out = arguments.out or (first if os.path.isdir(first) else os.path.dirname(first) or ".")
        scores, losses = (os.path.join(out, name) for name in ("scores.png", "losses.png"))
        try:
            os.makedirs(out, exist_ok=True)
            draw_scores(runs, references, scores)
            draw_losses(runs, losses)
        except OSError as error:
            raise UserError(f"cannot write the pictures: {error}") from None
    except UserError as error:
        sys.exit(f"plot.py: error: {error}")
    print(f"wrote {scores} and {losses}".encode(errors="replace").decode())


if __name__ == "__main__":
    main()
