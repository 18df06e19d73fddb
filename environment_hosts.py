"""The same games on other machines, through Ray: actions go out, frames and rewards come in, the network stays here.

Each group's games live in an actor of Ray: a process on a host of the cluster. A host needs `requirements-ray.txt` but
not this repository, because the functions that build the games travel to the actor. If a host is lost, its group
leaves out the unroll that it was in and begins other games on what is left of the cluster; the other groups go on.

`docs/scaling.md` says how to start a cluster and when it pays.
"""

import contextlib
import functools
import importlib.metadata
import os
import pickle
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from tqdm import tqdm

import environment
import startup
from async_agent import GroupAgent
from startup import UserError

if TYPE_CHECKING:
    from a3c import Config

PIECE = 90_000  # bytes: Ray sends what is below 100 KB with its answer, and fetches more in a second exchange
SHUTDOWN = 5.0  # seconds that Ray gets to end its processes; after that they end because this one does

for _module in (sys.modules[__name__], environment, startup):
    ray.cloudpickle.register_pickle_by_value(_module)  # a host does not have them


@contextlib.contextmanager
def connected(config: "Config", game: environment.Game) -> Iterator[Callable[[], "HostedGames"]]:
    """Take part in the cluster at `ray_address`; yield what makes the games of a group. For the main thread.

    `local` starts a cluster of this machine alone, which listens on loopback only and ends with the block. Raises
    UserError if there is no such cluster.
    """
    options, handler = {"log_to_driver": False, "logging_level": "ERROR"}, signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        if config.ray_address == "local":
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # is Ray's word for loopback, on Linux too
            options |= {"num_cpus": max(startup.available_cores(), config.num_threads), "num_gpus": 0}
            options |= {"object_store_memory": 100 * 2**20, "include_dashboard": False, "_temp_dir": folder}
        try:
            ray.init(config.ray_address, **options)
        except Exception as error:  # of many kinds
            raise UserError(f"ray_address = {config.ray_address!r}: {startup.reason(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own
        try:
            cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            fitting = [t for t in range(1, max(cpus) + 1) if sum(cpu // t for cpu in cpus) >= config.num_threads]
            threads = max(fitting, default=1)
            print(f"{sum(cpus)} CPUs on {sum(map(bool, cpus))} environment hosts, {threads} for each group", flush=True)
            groups_on_host = max(1, max(cpus) // threads)
            make = functools.partial(environment.make_training_envs, game, config.agents_per_thread, groups_on_host)
            limit = 0.9 * config.stall_timeout  # names the host before the watchdog names the group
            yield functools.partial(HostedGames, make, config.agents_per_thread, threads, limit)
        finally:
            ending = threading.Thread(target=ray.shutdown, daemon=True)
            ending.start()
            ending.join(SHUTDOWN)


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all hosts."""
    found = {"Python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["ale-py"] = importlib.metadata.version("ale-py")
    return found


@ray.remote(max_restarts=0)
class Games:
    """The games of a group, on a host. Answers are pickled and cut into `pieces`, each small enough for `PIECE`."""

    def __init__(self, pieces: int):
        self.pieces = pieces

    def about(self) -> tuple[str, dict[str, str]]:
        """Return the name of the host, and its versions."""
        return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:6]}", versions()

    def reset(self, make_envs: Callable, seed: np.ndarray) -> list[bytes]:
        """Build the games and start them: frames [B, 1, 84, 84] uint8."""
        self.envs = make_envs()
        return self._cut(self.envs.reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> list[bytes]:
        """Take a step in each game: what `VectorEnv.step` returns, with only the lives in `info`."""
        *outcome, info = self.envs.step(actions)
        return self._cut((*outcome, {"lives": info["lives"]}))

    def _cut(self, answer) -> list[bytes]:
        answer = pickle.dumps(answer, protocol=5)
        length = len(answer) // self.pieces + 1
        return [answer[start : start + length] for start in range(0, length * self.pieces, length)]


class HostLost(Exception):
    """The host of a group's games has died, has left the cluster or does not answer; the message names it."""


class HostedGames(gymnasium.vector.VectorEnv):
    """B games on a host of the cluster; `reset` asks Ray for the host, and for another one after a loss.

    Args:
      make_envs: builds the games, on the host.
      num_envs: B.
      num_cpus: CPUs of a host that the games need; after a loss they take what is left.
      limit: seconds that `reset` waits for a host; `step` waits a third of it for an answer.
    """

    def __init__(self, make_envs: Callable, num_envs: int, num_cpus: int, limit: float):
        self.make_envs, self.num_envs, self.num_cpus, self.limit = make_envs, num_envs, num_cpus, limit
        self.pieces = 2 + num_envs * environment.FRAME_SIZE**2 // PIECE
        self.games, self.host = None, "none yet"

    def reset(self, *, seed=None, options=None):
        """Start other games on a host. Raises TimeoutError if none begins in time, UserError if its versions differ."""
        end = time.monotonic() + self.limit
        while (left := end - time.monotonic()) > 0:
            self.games = Games.options(num_cpus=self.num_cpus, scheduling_strategy="SPREAD").remote(self.pieces)
            try:
                self.host, theirs = self._get(self.games.about.remote(), left)
                if theirs != versions():
                    raise UserError(f"environment host {self.host} has {theirs}, but here is {versions()}")
                return self._ask(self.games.reset, end - time.monotonic(), self.make_envs, seed), {}
            except HostLost:
                time.sleep(1)
        raise TimeoutError(f"no environment host began its games for {self.limit:.0f} s; the last one was {self.host}")

    def step(self, actions):
        """Take a step in each game. Raises HostLost."""
        return self._ask(self.games.step, self.limit / 3, actions)

    def _ask(self, method, seconds: float, *args):
        pieces = self._get(method.options(num_returns=self.pieces).remote(*args), seconds)
        return pickle.loads(b"".join(pieces))

    def _get(self, answer, seconds: float):
        try:
            return ray.get(answer, timeout=max(0.0, seconds))
        except RayTaskError:  # an exception of the games
            raise
        except RayError as error:
            self.num_cpus = 0
            ray.kill(self.games)
            why = f"no answer for {seconds:.0f} s" if isinstance(error, GetTimeoutError) else startup.reason(error)
            raise HostLost(f"environment host {self.host} is lost: {why}") from error


class HostedAgent(GroupAgent):
    """A group whose games are on a host. If that is lost, the unroll is left out and other games begin."""

    def reset(self) -> None:
        """Start all games on a host."""
        super().reset()
        tqdm.write(f"group {self.index} plays on {self.envs.host}")

    def iterate(self) -> None:
        """Play T steps in each game and update the shared network once, unless the host is lost."""
        try:
            super().iterate()
        except HostLost as lost:
            tqdm.write(f"group {self.index}: {lost}")
            self.failure, self.alive_at = None, time.monotonic()
            self.episode_score[:], self.lives[:] = 0.0, 0.0
            self.seeds[1:] = np.random.default_rng(self.seeds + self.steps).integers(2**31, size=self.envs.num_envs)
            self.reset()
