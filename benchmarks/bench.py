"""Measure speed: `python -m benchmarks.bench`, with any flag of `a3c.py`, prints how fast it trains here.

Three rates are measured in turn, several times, so that a noisy machine hits all alike, and medians are printed:
training as `a3c.py` runs it; its environments alone, stepped by as many threads; its network and updates alone, on a
still frame. Where the network shares the cores with the environments, one agent step cannot take less than a step of
each: ceiling = 1 / (1 / environments + 1 / network). On a GPU the ceiling is the smaller of the two.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages and sets TensorFlow up

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import threading
import time

import gymnasium
import numpy as np
from matplotlib.figure import Figure

import a3c
from async_agent import GroupAgent
from benchmarks.common import first_update, hardware, spread, train
from environment import Game
from groups import games_of
from progress import Progress
from report import Report
from settings import LARGEST, versions
from startup import UserError, tf

WARM_UP_UPDATES = 8  # of each group, not counted


class StillEnvs(gymnasium.vector.VectorEnv):
    """Games in which nothing ever happens: what is left of a training step is the network."""

    def __init__(self, num_envs: int, size: tuple[int, int]):
        self.num_envs = num_envs
        self.frame = np.random.default_rng(0).integers(0, 256, (num_envs, 1, *size), np.uint8)
        self.reward, self.ended = np.zeros(num_envs, np.int32), np.zeros(num_envs, bool)
        self.lives = np.zeros(num_envs, np.int32)

    def reset(self, *, seed=None, options=None):
        """Return the frame."""
        return self.frame, {}

    def step(self, actions):
        """Return the frame again."""
        return self.frame, self.reward, self.ended, self.ended, {"lives": self.lives}


class Bench:
    """One configuration, whose parts are each built once, when first measured, and measured as often as one likes."""

    def __init__(self, config: a3c.Config, game: Game, device: str, log_dir: str):
        self.config, self.device = endless(dataclasses.replace(config, log_dir=log_dir)), device
        self.progress = Progress(config.num_threads, config.agents_per_thread)
        self.shared, self.num_actions = a3c.make_network(config, game, device), game.num_actions
        self.times = []  # of updates
        self.hosts = contextlib.ExitStack()
        self.agent_class, self.make_envs, self.size = self.hosts.enter_context(games_of(self.config, game))

    @functools.cached_property
    def envs(self) -> list[gymnasium.vector.VectorEnv]:
        """The games of each group."""
        return [self.make_envs() for _ in range(self.config.num_threads)]

    @functools.cached_property
    def training_agents(self) -> list[GroupAgent]:
        """The groups as `a3c.py` makes them."""
        return self._make_agents(self.agent_class, self.envs)

    @functools.cached_property
    def network_agents(self) -> list[GroupAgent]:
        """The groups with games that cost nothing."""
        still = [StillEnvs(self.config.agents_per_thread, self.size) for _ in range(self.config.num_threads)]
        return self._make_agents(GroupAgent, still)

    def _make_agents(self, agent_class: type[GroupAgent], all_envs: list) -> list[GroupAgent]:
        return [
            agent_class(
                index, lambda envs=envs: envs, self.shared, self.progress, self.config, self.on_update, self.size
            )
            for index, envs in enumerate(all_envs)
        ]

    def close(self) -> None:
        """Let go of the environment hosts, if the games are there: else the process does not end."""
        self.hosts.close()

    def on_update(self, losses) -> None:
        """Do what `a3c.py` does after an update, and note the time."""
        self.report.count_update(losses)
        self.times.append(time.monotonic())

    def measure_updates(self, agents: list[GroupAgent], seconds: float) -> float:
        """Run the agents' threads as `a3c.py` does, with its report; return agent steps per second."""
        coordinator = tf.train.Coordinator()
        threads = [threading.Thread(target=agent.run, args=(coordinator, self.device), daemon=True) for agent in agents]
        warm, end = WARM_UP_UPDATES * len(agents), None
        self.times.clear()
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            contextlib.closing(Report(self.config, self.progress)) as self.report,
        ):
            for thread in threads:
                thread.start()
            try:
                while (end is None or time.monotonic() < end) and not coordinator.wait_for_stop(0.2):
                    self.report.refresh()
                    if end is None and len(self.times) > warm + 1:
                        end = time.monotonic() + seconds
            finally:  # also on Ctrl-C
                coordinator.request_stop()
                coordinator.join(threads, stop_grace_period_secs=60)
        counted = self.times[warm:]
        return self.config.steps_per_update * (len(counted) - 1) / (counted[-1] - counted[0])

    def measure_environments(self, seconds: float) -> float:
        """Step the games alone, a thread for each group, with random actions; return agent steps per second."""
        steps, stop = [0] * len(self.envs), threading.Event()

        def play(index: int) -> None:
            rng = np.random.default_rng(index)
            while not stop.is_set():
                self.envs[index].step(rng.integers(0, self.num_actions, self.config.agents_per_thread))
                steps[index] += self.config.agents_per_thread

        threads = [threading.Thread(target=play, args=(index,), daemon=True) for index in range(len(self.envs))]
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.5)
            before, start = sum(steps), time.monotonic()
            time.sleep(seconds)
            return (sum(steps) - before) / (time.monotonic() - start)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)


def endless(config: a3c.Config) -> a3c.Config:
    """Return `config` without what would end a run while it is measured."""
    return dataclasses.replace(config, max_iteration=None, max_agent_steps=LARGEST)


def measure(config: a3c.Config, game: Game, device: str, seconds: float, rounds: int) -> dict:
    """Measure the three rates in turn, `rounds` times; return their medians and what follows from them."""
    with tempfile.TemporaryDirectory() as log_dir, contextlib.closing(Bench(config, game, device, log_dir)) as bench:
        rates = []
        for number in range(1, rounds + 1):
            training = bench.measure_updates(bench.training_agents, seconds)
            environments = bench.measure_environments(seconds)
            rates.append([training, environments, bench.measure_updates(bench.network_agents, seconds)])
            print(f"round {number} of {rounds}: " + ", ".join(f"{rate:,.0f}" for rate in rates[-1]), flush=True)
    names = ("training", "environments alone", "network alone")
    for name, values in zip(names, zip(*rates, strict=True), strict=True):
        print(f"{name}: {spread(values, ',.0f')} steps/s")
    training, environments, network = np.median(rates, axis=0)
    shared_cores = "CPU" in device
    ceiling = 1 / (1 / environments + 1 / network) if shared_cores else min(environments, network)
    return {
        "steps_per_second": round(float(training)),
        "environment_steps_per_second": round(float(environments)),
        "network_steps_per_second": round(float(network)),
        "ceiling_steps_per_second": round(float(ceiling)),
        "ceiling_share": round(float(training / ceiling), 3),
    }


def sweep(arguments: argparse.Namespace, flags: list[str]) -> list[dict]:
    """Time each number of threads with each of games per thread, each in a process of its own; draw the result."""
    points, kind = [], "network_agents" if arguments.network_alone else "training_agents"
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for games in arguments.sweep_games:
        rates = []
        for threads in arguments.sweep_threads:
            point = [f"--num_threads={threads}", f"--agents_per_thread={games}"]
            rates.append(round(train([*flags, *point], arguments.seconds, agents=kind)))
            points.append({"num_threads": threads, "agents_per_thread": games, "steps_per_second": rates[-1]})
            print(f"{threads} threads x {games} games: {rates[-1]:,} steps/s", flush=True)
        axes.plot(arguments.sweep_threads, rates, "o-", label=f"{games} games per thread")
    axes.set_xscale("log", base=2)
    axes.set_xticks(arguments.sweep_threads, [str(threads) for threads in arguments.sweep_threads])
    axes.set(xlabel="threads", ylabel="agent steps per second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(arguments.sweep, dpi=100)
    return points


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--sweep", metavar="PNG", help="vary threads and games per thread instead, and draw this")
    parser.add_argument("--sweep_threads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="(1 2 4 8)")
    parser.add_argument("--sweep_games", type=int, nargs="+", default=[16, 64], metavar="N", help="per thread (16 64)")
    parser.add_argument("--network_alone", action="store_true", help="sweep training without games")
    arguments, flags = parser.parse_known_args()
    if not (0 < arguments.seconds < float("inf") and arguments.rounds > 0):
        parser.error("--seconds and --rounds must be above 0")
    if min(*arguments.sweep_threads, *arguments.sweep_games) < 1:
        parser.error("--sweep_threads and --sweep_games must be above 0")
    if arguments.sweep and not arguments.sweep.endswith(".png"):
        parser.error("--sweep draws a file whose name ends with .png")
    if arguments.network_alone and not arguments.sweep:
        parser.error("--network_alone is for --sweep; without it, the network alone is always timed too")
    config = a3c.parse_config(flags)
    game, device = a3c.game_and_device(config)
    for path in filter(None, (arguments.json, arguments.sweep)):
        open(path, "a").close()  # refuses a wrong path before the minutes that the rounds take
    if arguments.sweep:
        results = {"sweep": sweep(arguments, flags), "network_alone": arguments.network_alone, "flags": flags}
    else:
        start = {"seconds_to_first_update": round(first_update(flags), 1)}
        with tf.device(device):
            results = {**measure(config, game, device, arguments.seconds, arguments.rounds), **start}
    results |= {"game": game.id, "device": device.strip("/"), "hardware": hardware(), "versions": versions()}
    for name, value in results.items():
        print(f"{name:30} {f'{value:>10,}' if isinstance(value, (int, float)) else value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError, UserError) as error:
        sys.exit(f"bench.py: error: {error}")
