"""Lock the folder of a run; start a thread for each group of games, watch over them, stop them, save at the end."""

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

import startup
from async_agent import GroupAgent
from checkpoint import LAST, Saver
from environment import FRAME_SIZE, Game, make_training_envs
from network import Losses, SharedNetwork
from progress import Progress
from report import Report
from startup import UserError, as_user_error, cores_of_a_group, tf

if TYPE_CHECKING:
    from a3c import Config

STOP_GRACE = 6.0  # seconds that threads get to finish what they are at
SAVE_GRACE = 30.0  # seconds that a save which a thread has begun gets on top


@contextlib.contextmanager
def run_folder(folder: str) -> Iterator[Callable[[], None]]:
    """Keep a folder, made if need be, for this process; yield a function that checks whether it still has it.

    Raises UserError if it cannot be made or written, or another run uses it; so does the function once it was lost.
    """
    path, owner = os.path.join(folder, ".lock"), secrets.token_hex()

    def check() -> None:
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            if file.read() == owner:
                return
        raise UserError(f"log_dir = {folder!r} was removed, or taken by another run, while this run used it")

    with as_user_error(f"log_dir = {folder!r}"):
        os.makedirs(folder, exist_ok=True)
        lock = open(path, "a")  # noqa: SIM115
    with lock:
        if not startup.lock(lock, f"log_dir = {folder!r}: another run is using it"):
            print(f"{path} cannot be locked here: let no other run use this folder, else this one ends")
        with as_user_error(f"log_dir = {folder!r}"):
            lock.truncate(0)
            os.write(lock.fileno(), owner.encode())  # past Python's buffer, which would be written again at the end
        yield check


@contextlib.contextmanager
def games_of(config: "Config", game: Game) -> Iterator[tuple[type[GroupAgent], Callable, tuple[int, int]]]:
    """Yield the class of a group, what makes its games and the size [H, W] of what they show.

    They are in this process, or on hosts where `ray_address` is set: then small frames travel, not screens.
    """
    if config.ray_address is None:
        threads = cores_of_a_group(config.num_threads)
        yield GroupAgent, lambda: make_training_envs(game, config.agents_per_thread, threads, game.screen), game.screen
        return
    try:
        import environment_hosts
    except ImportError as error:
        raise UserError(f"ray_address: {error}. Run: pip install -r requirements-ray.txt") from error
    with environment_hosts.connected(config, game) as make_envs:
        yield environment_hosts.HostedAgent, make_envs, (FRAME_SIZE, FRAME_SIZE)


@dataclasses.dataclass
class Groups:
    """The groups that train one shared network, a thread each."""

    config: "Config"
    shared: SharedNetwork  # what the groups train
    progress: Progress  # what they have done so far
    saver: Saver
    report: Report
    signals: list[int]  # numbers of those that have asked the run to end; the handler appends
    on_begun: Callable[[], None] = lambda: None  # called once all groups play

    def __post_init__(self):
        self.coordinator = tf.train.Coordinator()
        self.agents, self.threads = [], []
        self.saved_at = time.monotonic()
        self.saving = None  # (name of the thread that is at it, since when)

    def run(self, game: Game, device: str) -> int:
        """Train to the end or until a signal, and save. Return the exit status.

        Raises GroupFailure if a thread failed, TimeoutError if a group stalled, UserError if the report cannot be
        written, and what `Saver.save` raises. All threads have been stopped and, if possible, all is saved.
        """
        with games_of(self.config, game) as (agent_class, *games):
            try:
                self._start(agent_class, *games, device)
                while not self._is_over():
                    self._watch()
            finally:
                self._stop()
        self.report.refresh()  # raises what could not be written
        return 128 + self.signals[0] if self.signals else 0

    def _is_over(self) -> bool:
        return bool(self.signals) or self.coordinator.should_stop()

    def _start(self, agent_class: type[GroupAgent], make_envs: Callable, size: tuple[int, int], device: str) -> None:
        """Start a thread for each group: they build their games in turn, and learn once all have begun to play."""
        config = self.config
        for index in range(config.num_threads):
            if self._is_over():
                return
            inputs = index, make_envs, self.shared, self.progress, config, self._on_update, size
            self.agents.append(agent_class(*inputs))
        for agent in self.agents:
            name, inputs = f"group {agent.index}", [self.coordinator, device]
            self.threads.append(threading.Thread(target=agent.run, args=inputs, name=name, daemon=True))
            self.threads[-1].start()
        for begun in range(config.num_threads + 1):
            while begun > self.progress.begun:
                if self._is_over():
                    return
                self._watch()
            tqdm.write(f"building games: {begun} of {config.num_threads} groups are ready")
        self.on_begun()

    def _on_update(self, losses: Losses) -> None:
        """Called by each thread after its update, with the lock held, so that rows and saves come at exact counts."""
        self.report.count_update(losses)
        now, config = time.monotonic(), self.config
        reached_multiple = self.progress.agent_steps % config.save_steps < config.steps_per_update
        if reached_multiple or now > self.saved_at + 60 * config.save_minutes:
            self.saving = threading.current_thread().name, now
            self.saver.save()
            self.saving, self.saved_at = None, now

    def _watch(self) -> None:
        """Wait for 0.2 s and show how far training is. Raises TimeoutError if a group stalls."""
        before = time.monotonic()
        self.coordinator.wait_for_stop(0.2)
        self.report.refresh()
        now, limit = time.monotonic(), self.config.stall_timeout
        if now - before > 5:  # the whole process was stopped, or waited for a ROM to load: no thread's fault
            for agent in self.agents:
                agent.alive_at += now - before
        slowest = min(self.agents, key=lambda agent: agent.alive_at)
        if now - slowest.alive_at > limit:
            name = f"group {slowest.index}"
            if self.saving and now - self.saving[1] > limit / 2:  # the others wait for it
                name = f"{self.saving[0]}, which is saving,"
            raise TimeoutError(f"{name} has not taken a step for {limit:.0f} s")

    def _stop(self) -> None:
        """Stop all threads and save, whatever happened; print after that. Raises what went wrong in a thread."""
        self.coordinator.request_stop()
        try:
            self.coordinator.join(self.threads, stop_grace_period_secs=STOP_GRACE, ignore_live_threads=True)
        finally:
            with contextlib.closing(self.report):  # after the save
                if not self.progress.lock.acquire(timeout=SAVE_GRACE):
                    raise TimeoutError("a thread keeps the network locked; the checkpoint before this stays")
                try:
                    self.saver.save()
                finally:
                    self.progress.lock.release()
            print("saved " + os.path.join(self.config.log_dir, LAST))
