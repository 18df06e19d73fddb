"""How a run is reported: the progress bar and its lines, `progress.csv`, TensorBoard."""

import collections
import contextlib
import csv
import dataclasses
import math
import os
import sys
import time

import numpy as np
from tqdm import tqdm

from network import Losses
from startup import reason, tf

# Averages and rates are over the `summary_period` updates up to the row; scores are raw, the last whole game of each
# environment; `seconds` counts training over all resumes.
COLUMNS = (
    "iteration",
    "agent_steps",
    "episodes",
    "seconds",
    "average_score",
    "maximum_score",
    "policy_loss",
    "value_loss",
    "entropy",
    "gradient_norm",
    "learning_rate",
    "steps_per_second",
)
# Column -> TensorBoard tag: the original's seven, so that old and new runs overlay, and two more.
TAGS = {
    "learning_rate": "learning_rate",
    "policy_loss": "policy_loss",
    "entropy": "entropy_loss",
    "value_loss": "value_loss",
    "episodes": "total_episodes",
    "average_score": "average_rewards",
    "maximum_score": "maximum_rewards",
    "steps_per_second": "steps_per_second",
    "gradient_norm": "gradient_norm",
}


class Report:
    """Reports one run. Threads call `add`; everything else is for the main thread. Use it in a `with` block."""

    def __init__(self, config, progress):
        self.config, self.progress = config, progress
        self.rows = collections.deque()  # finished, not yet written
        self.losses = []  # since the last row
        self.first_update = None  # when
        self.row_time, self.row_steps = None, 0  # of the last row
        self.recent = collections.deque(maxlen=50)  # (seconds, agent steps), the last 10 s at 5 a second
        path = os.path.join(config.log_dir, "progress.csv")
        _cut_off(path, progress.iteration)
        self.csv_file = open(path, "a", newline="")  # noqa: SIM115
        self.csv = csv.DictWriter(self.csv_file, COLUMNS)
        if self.csv_file.tell() == 0:
            self.csv.writeheader()
        lines = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
        with self._writing():
            self.by_step = tf.summary.create_file_writer(config.log_dir)
            self.by_episode = tf.summary.create_file_writer(os.path.join(config.log_dir, "per-eps"))
            with self.by_step.as_default():
                tf.summary.text("config", "\n".join(["| name | value |", "| --- | --- |", *lines]), progress.iteration)
        self.bar = tqdm(
            total=config.max_iteration,
            initial=progress.iteration,
            unit="it",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        for file in (self.csv_file, self.by_step, self.by_episode):
            with contextlib.suppress(OSError, tf.errors.OpError):  # every row is on the disk, or has raised
                file.close()

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
            "learning_rate": self.config.learning_rate_at(progress.iteration - 1),
            "steps_per_second": (progress.agent_steps - self.row_steps) / max(now - self.row_time, 1e-9),
        }
        self.rows.append(row)
        self.losses, self.row_time, self.row_steps = [], now, progress.agent_steps

    def show(self) -> None:
        """Bring the bar up to date and write the rows that have been made since."""
        while self.rows:
            self._write_row(self.rows.popleft())
        progress, scores = self.progress, self.progress.recent_scores()
        self.recent.append((time.monotonic(), progress.agent_steps))
        (then, steps_then), (now, steps) = self.recent[0], self.recent[-1]
        parts = [
            f"{(steps - steps_then) / (now - then):,.0f} steps/s" if now > then else "",
            f"{progress.episodes:,} games",
        ]
        if scores.size:
            parts.append(f"score {scores.mean():.1f}, max {scores.max():.0f}")
        self.bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
        self.bar.update(progress.iteration - self.bar.n)

    def status(self, text: str) -> None:
        """Say in front of the bar what is going on."""
        self.bar.set_description_str(text)

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def _writing(self):
        """Raise an OSError that names the folder where the block cannot write into it."""
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            raise OSError(f"cannot write the report in {self.config.log_dir}: {reason(error)}") from error

    def _write_row(self, row: dict) -> None:
        cells = {name: f"{v:.6g}" if isinstance(v, (float, np.floating)) else v for name, v in row.items()}
        with self._writing():
            self.csv.writerow(cells)
            self.csv_file.flush()
            for writer, step in ((self.by_step, row["iteration"]), (self.by_episode, row["episodes"])):
                with writer.as_default(step):
                    for column, tag in TAGS.items():
                        tf.summary.scalar(tag, row[column])
                    writer.flush()
        self.write(
            "iteration {iteration:,}  steps {agent_steps:,}  games {episodes:,}  score {average_score:.1f} "
            "max {maximum_score:.0f}  policy {policy_loss:.4f}  value {value_loss:.4f}  entropy {entropy:.3f}  "
            "gradient {gradient_norm:.2f}  {steps_per_second:,.0f} steps/s".format(**row)
        )


def _cut_off(path: str, iteration: int) -> None:
    """Drop the rows after `iteration`: the run goes on from there, and the curve stays a function of its axis."""
    if not os.path.exists(path):
        return
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["steps_per_second"] and int(row["iteration"]) <= iteration]
    with open(path + ".new", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".new", path)
