"""The same games on other machines, through Ray: actions go out, frames and rewards come in, the network stays here.

A group's games live in an actor of Ray: a process on a host, which needs `requirements-ray.txt` but not this program. A
group that loses its host leaves out its unroll and begins other games on what is left of the cluster; the rest go on.
"""

import contextlib
import functools
import importlib.metadata
import pickle
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

import environment
import startup
from async_agent import GroupAgent

if TYPE_CHECKING:
    from a3c import Config

PIECE = 90_000  # bytes; Ray sends a result of less than 100 KB with the answer, and a larger one by another exchange

for _module in (sys.modules[__name__], environment, startup):
    ray.cloudpickle.register_pickle_by_value(_module)  # a host does not have them


@contextlib.contextmanager
def connected(config: "Config", game: environment.Game) -> Iterator[Callable[[], "HostedGames"]]:
    """Yield what makes the games of a group, on the cluster at `ray_address`. Raises UserError if there is none."""
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    ray._private.utils.set_sigterm_handler = lambda _: None  # Ray's would end the program before it is saved
    if config.ray_address == "local":
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # so that it listens on loopback only
        options |= {"include_dashboard": False, "num_cpus": max(startup.available_cores(), config.num_threads)}
    try:
        if ":" in config.ray_address:  # Ray alone would try for minutes
            socket.create_connection(config.ray_address.removeprefix("ray://").rsplit(":", 1), timeout=10).close()
        ray.init(config.ray_address, **options)
    except Exception as error:  # of many kinds
        raise startup.UserError(f"ray_address = {config.ray_address!r}: {startup.reason(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray's core has set one there, too
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    ray._private.worker._worker_logs_enabled = False  # else Ray prints a page for each lost host
    try:
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        num_envs, groups = config.agents_per_thread, config.num_threads
        threads = max([1, *(n for n in range(1, max(cpus) + 1) if sum(cpu // n for cpu in cpus) >= groups)])
        print(f"{sum(cpus)} CPUs on {sum(map(bool, cpus))} hosts, {threads} for each group of games", flush=True)
        make = functools.partial(environment.make_training_envs, game, num_envs, threads)
        yield functools.partial(HostedGames, ray.cloudpickle.dumps(make), num_envs, threads, config.stall_timeout)
    finally:
        shutdown = threading.Thread(target=ray.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(5.0)


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all machines."""
    packages = importlib.metadata.distributions(name="ale-py")
    return {"Python": platform.python_version(), "ale-py": next((x.version for x in packages), "missing")}


@ray.remote
class Games:
    """The games of a group, on a host."""

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return the name of the host and its versions."""
        return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:6]}", versions()

    def build(self, make_envs: bytes) -> None:
        """Build the games."""
        self.envs = pickle.loads(make_envs)()

    def call(self, method: str, words: dict, pieces: int) -> list[bytes]:
        """Return what a method of the games returns, with only the lives in `info`, pickled and cut into pieces."""
        *result, info = getattr(self.envs, method)(**words)
        data = pickle.dumps((*result, {"lives": info["lives"]}), protocol=5)
        return [data[len(data) * i // pieces : len(data) * (i + 1) // pieces] for i in range(pieces)]


class HostLost(Exception):
    """The host of a group's games has died, has left the cluster or does not answer; the message names it."""


class HostedGames(gymnasium.vector.VectorEnv):
    """B games on a host with `num_cpus`. `make_envs` is pickled. A host is named before the watchdog's time is over."""

    def __init__(self, make_envs: bytes, num_envs: int, num_cpus: int, stall_timeout: float):
        self.make_envs, self.num_envs, self.num_cpus, self.limit = make_envs, num_envs, num_cpus, 0.9 * stall_timeout
        self.pieces = 2 + num_envs * environment.FRAME_SIZE**2 // PIECE
        self.host = "none"

    def reset(self, *, seed=None, options=None):
        """Start other games on a host. Raises TimeoutError if none begins in time, UserError if its versions differ."""
        end = time.monotonic() + self.limit
        while (left := end - time.monotonic()) > 0 and ray.is_initialized():  # else Ray would begin anew by itself
            self.games = Games.options(num_cpus=self.num_cpus, scheduling_strategy="SPREAD").remote()
            with contextlib.suppress(HostLost):
                self.host, theirs = self._get(self.games.describe.remote(), left)
                if theirs != (ours := versions()):
                    raise startup.UserError(f"environment host {self.host} has {theirs}, but here is {ours}")
                self._get(self.games.build.remote(self.make_envs), end - time.monotonic())
                tqdm.write(f"{threading.current_thread().name} plays on {self.host}")
                return self._call("reset", end - time.monotonic(), seed=seed)
            time.sleep(1)
        raise TimeoutError(f"no environment host began its games for {self.limit:.0f} s; the last one was {self.host}")

    def step(self, actions):
        """Take a step in each game. Raises HostLost."""
        return self._call("step", self.limit / 3, actions=actions)

    def _call(self, method: str, seconds: float, **words):
        call = self.games.call.options(num_returns=self.pieces)
        return pickle.loads(b"".join(self._get(call.remote(method, words, self.pieces), seconds)))

    def _get(self, result, seconds: float):
        try:
            return ray.get(result, timeout=max(0.0, seconds))
        except RayTaskError:  # an exception of the games
            raise
        except RayError as error:
            self.num_cpus = 0  # from now on these games take what is left
            ray.kill(self.games)
            raise HostLost(f"environment host {self.host} is lost: {startup.reason(error)}") from error


class HostedAgent(GroupAgent):
    """A group whose games are on a host. If that is lost, the unroll is left out and other games begin."""

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
