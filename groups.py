"""All groups of a run: start a thread for each, watch over them, stop them, save what was learnt."""

import functools
import signal
import threading
import time

import startup
from async_agent import GroupAgent, Progress
from checkpoint import Saver
from environment import Game, make_training_envs
from network import Losses, SharedNetwork
from report import Report
from startup import tf

STOP_GRACE = 6.0  # seconds that threads get to finish what they are at
SAVE_GRACE = 30.0  # seconds that a save which a thread has begun gets on top


class Groups:
    """The groups that train one shared network; made and run in the main thread.

    Args:
      config: `a3c.Config`.
      shared, progress: what the groups train and count.
      saver: saves both, every `save_period` updates and at the end.
      report: shows both.
    """

    def __init__(self, config, shared: SharedNetwork, progress: Progress, saver: Saver, report: Report):
        self.config, self.shared, self.progress, self.saver, self.report = config, shared, progress, saver, report
        self.coordinator = tf.train.Coordinator()
        self.agents, self.threads = [], []
        self.signals = []  # that have asked the run to end
        self.saving = None  # (name of the thread that is at it, since when)

    def run(self, game: Game, device: str) -> int:
        """Train until `max_iteration` or a signal, and save. Return the exit status.

        Raises:
          GroupFailure: an exception in a thread; TimeoutError: a group stalled. All have been stopped.
          OSError, FloatingPointError, CheckpointError: the last save failed; see `Saver.save`.
        """
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one changes nothing
            signal.signal(number, lambda number, _: self.signals.append(number))
        try:
            self._start(game, device)
            while not self._watch(60):
                pass
        finally:
            self._stop()
        return 128 + self.signals[0] if self.signals else 0

    def _start(self, game: Game, device: str) -> None:
        """Start a thread for each group: they build their games in turn, and each learns as soon as its own stand."""
        config = self.config
        self.report.status("preparing the network")
        make_envs = functools.partial(make_training_envs, game, config.agents_per_thread, config.num_threads)
        self.agents = [
            GroupAgent(index, make_envs, self.shared, self.progress, config, self._on_update)
            for index in range(config.num_threads)
        ]
        for agent in self.agents:
            thread = threading.Thread(
                target=agent.run, args=(self.coordinator, device), name=f"group {agent.index}", daemon=True
            )
            self.threads.append(thread)
            thread.start()
        while (learning := sum(agent.steps > config.unroll_step for agent in self.agents)) < len(self.agents):
            self.report.status(f"building games: {learning} of {len(self.agents)} groups learn")
            if self._watch(0.2):
                return
        first, now = self.report.first_update - startup.STARTED, time.monotonic() - startup.STARTED
        self.report.write(f"first update {first:.1f} s after the start, all groups learning after {now:.1f} s")
        self.report.status("")

    def _on_update(self, losses: Losses) -> None:
        """Called by each thread after its update, with the lock held, so that rows and saves fall on their number."""
        self.report.add(losses)
        if self.progress.iteration % self.config.save_period == 0:
            self.saving = threading.current_thread().name, time.monotonic()
            self.saver.save()
            self.saving = None

    def _watch(self, seconds: float) -> bool:
        """Report for up to `seconds`; return whether it is time to stop. Raises TimeoutError where a group stalls."""
        end = time.monotonic() + seconds
        while not (self.signals or self.coordinator.should_stop()) and (before := time.monotonic()) < end:
            self.coordinator.wait_for_stop(min(0.2, seconds))
            self.report.show()
            asleep = time.monotonic() - before
            if asleep > 5:  # the whole process was stopped, or waited for a ROM to load: no thread's fault
                for agent in self.agents:
                    agent.alive_at += asleep
            self._check_alive()
        return bool(self.signals) or self.coordinator.should_stop()

    def _check_alive(self) -> None:
        limit, saving, now = self.config.stall_timeout, self.saving, time.monotonic()
        slowest = min(self.agents, key=lambda agent: agent.alive_at, default=None)
        if slowest and now - slowest.alive_at > limit:
            name = f"group {slowest.index}"
            if saving and now - saving[1] > limit / 2:  # the others wait for it
                name = f"{saving[0]}, which is saving,"
            raise TimeoutError(f"{name} has not taken a step for {limit:.0f} s")

    def _stop(self) -> None:
        """Stop all threads and save under `last.ckpt`, whatever happens; raise what went wrong in a thread."""
        self.coordinator.request_stop()
        self.report.status("stopping")
        try:
            self.coordinator.join(self.threads, stop_grace_period_secs=STOP_GRACE, ignore_live_threads=True)
        finally:
            try:
                saved = self._save_last()
            finally:
                self.report.show()  # after the save, because it fails where the disk is full
            self.report.write("saved " + saved)

    def _save_last(self) -> str:
        """Return the path. Raises TimeoutError where a stalled thread keeps the lock."""
        if not self.progress.lock.acquire(timeout=SAVE_GRACE):
            raise TimeoutError("a thread that does not stop keeps the network locked; the checkpoint before this stays")
        try:
            return self.saver.save_last()
        finally:
            self.progress.lock.release()
