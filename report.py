"""How a run is reported: the progress bar and its lines, `progress.csv`, TensorBoard."""

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from network import Losses
from progress import Progress
from startup import BackgroundWriter, UserError, as_user_error, tf

if TYPE_CHECKING:
    from a3c import Config

# Columns of progress.csv -> tags of TensorBoard: the original's seven, so that old and new runs overlay, and two more.
# Averages and rates are over the `summary_period` updates up to the row; scores are raw, the last whole game of each
# environment; `seconds` counts training over all resumes.
COLUMNS = {
    "iteration": None,
    "agent_steps": None,
    "episodes": "total_episodes",
    "seconds": None,
    "average_score": "average_rewards",
    "maximum_score": "maximum_rewards",
    "policy_loss": "policy_loss",
    "value_loss": "value_loss",
    "entropy": "entropy_loss",
    "gradient_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "steps_per_second": "steps_per_second",
}
LINE = (
    "iteration {iteration:,}  steps {agent_steps:,}  games {episodes:,}  score {average_score:.1f} "
    "max {maximum_score:.0f}  policy {policy_loss:.4f}  value {value_loss:.4f}  entropy {entropy:.3f}  "
    "gradient {gradient_norm:.2f}  {steps_per_second:,.0f} steps/s"
)


class Report:
    """Reports one run. Its files are written in the background: slow writing never delays training.

    The groups' threads call `count_update`, the main thread everything else.
    """

    def __init__(self, config: "Config", progress: Progress, check_folder=lambda: None):
        self.config, self.progress, self.check_folder = config, progress, check_folder
        self.losses = []  # of the updates since the last row
        self.since = None  # (time, agent steps) of the last row; at first, of the first update
        folder = Path(config.log_dir)
        path, unfinished = folder / "progress.csv", folder / "progress.csv.new"
        with as_user_error(f"cannot write the report in {folder}"):
            rows = _read_rows(path, progress.iteration)
            self.table = open(unfinished, "w", newline="")  # noqa: SIM115
            csv.writer(self.table).writerow(COLUMNS)
            self._add_to_table(rows)
            unfinished.replace(path)
            places = ("iteration", folder), ("episodes", folder / "per-eps")  # two runs in TensorBoard, by what x is
            self.curves = {x_axis: _begin_curves(place, x_axis, rows) for x_axis, place in places}
        # There is no bar where stderr is a file: the lines would follow its carriage returns.
        length = {"initial": progress.agent_steps, "total": max(config.total_steps, progress.agent_steps)}
        self.bar = tqdm(**length, unit=" steps", unit_scale=True, dynamic_ncols=True, disable=None)
        self.background = BackgroundWriter(take=lambda task: task())  # what is "written" is called

    def count_update(self, losses: Losses) -> None:
        """Take the losses of an update; report every `summary_period` updates. The caller holds the progress lock."""
        progress, now = self.progress, time.monotonic()
        self.losses.append(losses)
        self.since = self.since or (now, progress.agent_steps)
        if progress.iteration % self.config.summary_period == 0:
            row = self._make_row(now)
            self.background.write(lambda: self._write(row))
            self.losses, self.since = [], (now, progress.agent_steps)

    def _make_row(self, now: float) -> dict[str, float]:
        progress, scores = self.progress, self.progress.recent_scores()
        then, steps_then = self.since
        steps = progress.agent_steps - steps_then  # none where the first update makes a row by itself
        return {
            "iteration": progress.iteration,
            "agent_steps": progress.agent_steps,
            "episodes": progress.episodes,
            "seconds": round(progress.total_seconds(), 2),
            "average_score": scores.mean() if scores.size else np.nan,
            "maximum_score": scores.max() if scores.size else np.nan,
            **dict(zip(Losses._fields, np.mean(self.losses, axis=0), strict=True)),
            "learning_rate": self.config.learning_rate_at(progress.agent_steps - self.config.steps_per_update),
            "steps_per_second": steps / max(now - then, 1e-9) if steps else np.nan,
        }

    def _write(self, row: dict[str, float]) -> None:
        """Write a row into the files and onto the screen."""
        with as_user_error(f"cannot write the report in {self.config.log_dir}"):
            self._add_to_table([row])
            for x_axis, file in self.curves.items():
                _add_event(file, row[x_axis], summary=_points(row))
        tqdm.write(LINE.format(**row).replace("nan", "-"))

    def _add_to_table(self, rows: list[dict[str, float]]) -> None:
        csv.writer(self.table).writerows([f"{row[column]:.10g}" for column in COLUMNS] for row in rows)
        self.table.flush()

    def refresh(self) -> None:
        """Bring the bar up to date. Raises UserError once a file could not be written or the folder was lost."""
        if self.background.failure:
            raise self.background.failure
        if self.background.items.empty():
            self.background.write(self.check_folder)
        progress, scores = self.progress, self.progress.recent_scores()
        score = f", score {scores.mean():.1f}, max {scores.max():.0f}" if scores.size else ""
        self.bar.set_postfix_str(f"{progress.episodes:,} games{score}", refresh=False)
        self.bar.update(progress.agent_steps - self.bar.n)

    def close(self) -> None:
        """Write what is left, for 2 s at most."""
        self.background.close(2)
        self.bar.close()


def _read_rows(path: Path, iteration: int) -> list[dict[str, float]]:
    """Return a table's rows up to `iteration`, from where the run goes on. A kill may have cut the last one off."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            whole = [row for row in csv.DictReader(file) if row["steps_per_second"]]
        return [{k: float(row[k]) for k in COLUMNS} for row in whole if int(row["iteration"]) <= iteration]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not as this program wrote it. Move it away to go on without it") from error


def _points(row: dict[str, float]) -> dict:
    shown = {tag: row[column] for column, tag in COLUMNS.items() if tag and not np.isnan(row[column])}
    return {"value": [{"tag": tag, "simple_value": value} for tag, value in shown.items()]}


def _begin_curves(folder: Path, x_axis: str, rows: list[dict[str, float]]) -> tf.io.TFRecordWriter:
    """Begin a file of TensorBoard that hides what a killed run wrote after the last of `rows`."""
    folder.mkdir(exist_ok=True)
    file = tf.io.TFRecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}"))
    last = rows[-1][x_axis] if rows else 0
    _add_event(file, 0, file_version="brain.Event:2")
    _add_event(file, last, session_log={"status": tf.compat.v1.SessionLog.START})  # drops all from this step on
    for row in rows:
        if row[x_axis] >= last:
            _add_event(file, row[x_axis], summary=_points(row))
    return file


def _add_event(file: tf.io.TFRecordWriter, step: float, **what) -> None:
    file.write(tf.compat.v1.Event(step=int(step), wall_time=time.time(), **what).SerializeToString())
    file.flush()
