"""How a run is reported: the progress bar and its lines, `progress.csv`, TensorBoard."""

import contextlib
import csv
import glob
import math
import os
import time

import numpy as np
from tqdm import tqdm

from network import Losses
from startup import Background, UserError, refusing, tf

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


class Report:
    """Reports one run. Its files are written in the background: training does not notice where that fails or waits.

    The groups' threads call `add`, the main thread everything else. Raises UserError if a file cannot be written.
    """

    def __init__(self, config, progress, check_folder=lambda: None):
        self.config, self.progress, self.check_folder = config, progress, check_folder
        self.losses = []  # since the last row
        self.first_update = None  # when
        self.row_time, self.row_steps = None, 0  # of the last row
        with refusing(f"cannot write the report in {self.config.log_dir}"):
            path = os.path.join(config.log_dir, "progress.csv")
            rows = _cut_off(path, progress.iteration)
            self.csv_file = open(path, "a", newline="")  # noqa: SIM115
            self.curves = {}  # column of the x axis -> TensorBoard's writer
            for axis, folder in (("iteration", config.log_dir), ("episodes", os.path.join(config.log_dir, "per-eps"))):
                start = int(rows[-1][axis]) if rows else 0
                _forget_from(start, folder)
                self.curves[axis] = tf.summary.create_file_writer(folder)
                for row in rows:
                    if int(row[axis]) >= start:
                        self._add_point(axis, row)
        # There is no bar where stderr is a file: the lines would follow its carriage returns.
        self.bar = tqdm(
            total=config.max_agent_steps,
            initial=progress.agent_steps,
            unit="step",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,
        )
        self.background = Background(take=self._write)

    def add(self, losses: Losses) -> None:
        """Count one update; the caller holds the progress lock. Makes a row every `summary_period` updates."""
        progress = self.progress
        self.losses.append(losses)
        if self.first_update is None:
            self.first_update = self.row_time = time.monotonic()
            self.row_steps = progress.agent_steps
        if progress.iteration % self.config.summary_period:
            return
        now, scores = time.monotonic(), progress.recent_scores()
        row = {
            "iteration": progress.iteration,
            "agent_steps": progress.agent_steps,
            "episodes": progress.episodes,
            "seconds": round(progress.total_seconds(), 2),
            "average_score": scores.mean() if scores.size else math.nan,
            "maximum_score": scores.max() if scores.size else math.nan,
            **dict(zip(Losses._fields, np.mean(self.losses, axis=0), strict=True)),
            "learning_rate": self.config.learning_rate_at(progress.agent_steps - self.config.steps_per_update),
            "steps_per_second": (progress.agent_steps - self.row_steps) / max(now - self.row_time, 1e-9),
        }
        self.background.write(row)
        self.losses, self.row_time, self.row_steps = [], now, progress.agent_steps

    def show(self) -> None:
        """Bring the bar up to date. Raises UserError once a file could not be written."""
        if self.background.failure:
            raise self.background.failure
        if self.background.items.empty():
            self.background.write({})
        progress, scores = self.progress, self.progress.recent_scores()
        score = f", score {scores.mean():.1f}, max {scores.max():.0f}" if scores.size else ""
        self.bar.set_postfix_str(f"{progress.episodes:,} games{score}", refresh=False)
        self.bar.update(progress.agent_steps - self.bar.n)

    def close(self) -> None:
        """Write what is left, for 2 s at most."""
        self.background.close(2)
        self.bar.close()

    def _write(self, row: dict) -> None:
        """Write a row, unless it is empty, into the folder, if it still is there."""
        with refusing(f"cannot write the report in {self.config.log_dir}"):
            self.check_folder()
            if not row:
                return
            cells = {k: x if isinstance(x, int) else f"{x:.6g}" if abs(x) < 1e5 else f"{x:.2f}" for k, x in row.items()}
            csv.DictWriter(self.csv_file, COLUMNS).writerow(cells)
            self.csv_file.flush()
            for axis in self.curves:
                self._add_point(axis, row)
        tqdm.write(
            "iteration {iteration:,}  steps {agent_steps:,}  games {episodes:,}  score {average_score:.1f} "
            "max {maximum_score:.0f}  policy {policy_loss:.4f}  value {value_loss:.4f}  entropy {entropy:.3f}  "
            "gradient {gradient_norm:.2f}  {steps_per_second:,.0f} steps/s".format(**row)
        )

    def _add_point(self, axis: str, row: dict) -> None:
        with self.curves[axis].as_default(int(row[axis])):
            for column, tag in COLUMNS.items():
                if tag and not math.isnan(value := float(row[column])):
                    tf.summary.scalar(tag, value)
        self.curves[axis].flush()


def _cut_off(path: str, iteration: int) -> list[dict]:
    """Drop a file's rows after `iteration`, because the run goes on from there; return those that stay."""
    rows = []
    try:
        with contextlib.suppress(FileNotFoundError), open(path, newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["steps_per_second"] and int(r["iteration"]) <= iteration]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not as this program wrote it. Move it away to go on without it") from error
    with open(path + ".new", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".new", path)
    return rows


def _forget_from(step: int, folder: str) -> None:
    """Take what a killed run noted from this step on out of the folder's TensorBoard files."""
    os.makedirs(folder, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        unfinished = os.path.join(folder, ".unfinished.events")
        cut_off = contextlib.suppress(tf.errors.DataLossError)  # by a kill
        with tf.device("/CPU:0"), tf.io.TFRecordWriter(unfinished) as file, cut_off:
            for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
                event = tf.compat.v1.Event.FromString(record)
                if event.step < step or not event.HasField("summary"):
                    file.write(record)
        os.replace(unfinished, path)
