"""Measure speed: `python -m benchmarks.bench` prints how fast training runs, and the machine's ceiling beside it.

Three rates are measured in turn, several times, so that a noisy machine hits all alike, and medians are printed:
training as `a3c.py` runs it; its environments alone, stepped by as many threads; its network and updates alone, on a
still frame. Where the network shares the cores with the environments, one agent step cannot take less than a step of
each: ceiling = 1 / (1 / environments + 1 / network). On a GPU the ceiling is the smaller of the two.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import threading
import time

import gymnasium
import numpy as np

import a3c
from async_agent import GroupAgent, Progress
from benchmarks.common import end_on_signals, hardware, spread, training
from environment import FRAME_SIZE, Game, make_training_envs
from report import Report
from startup import tf

WARM_UP_UPDATES = 8  # of each group, not counted
SWEEP_THREADS, SWEEP_AGENTS = (1, 2, 4, 8), (16, 64)


class StillEnvs(gymnasium.vector.VectorEnv):
    """Games in which nothing ever happens: what is left of a training step is the network."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.frame = np.random.default_rng(0).integers(0, 256, (num_envs, 1, FRAME_SIZE, FRAME_SIZE), np.uint8)
        self.reward, self.ended = np.zeros(num_envs, np.int32), np.zeros(num_envs, bool)
        self.lives = np.zeros(num_envs, np.int32)

    def reset(self, *, seed=None, options=None):
        """Return the frame."""
        return self.frame, {}

    def step(self, actions):
        """Return the frame again."""
        return self.frame, self.reward, self.ended, self.ended, {"lives": self.lives}


class Bench:
    """One configuration, built once, whose parts are then measured as often as one likes."""

    def __init__(self, config: a3c.Config, game: Game, device: str, log_dir: str):
        self.config, self.device = dataclasses.replace(config, log_dir=log_dir), device
        self.progress = Progress(config.num_threads, config.agents_per_thread)
        shared = a3c.make_network(config, game, device)
        self.times = []  # of updates

        def agents(all_envs):
            return [
                GroupAgent(index, lambda envs=envs: envs, shared, self.progress, self.config, self.on_update)
                for index, envs in enumerate(all_envs)
            ]

        groups = range(config.num_threads)
        self.envs = [make_training_envs(game, config.agents_per_thread, config.num_threads) for _ in groups]
        self.training_agents = agents(self.envs)
        self.network_agents = agents([StillEnvs(config.agents_per_thread) for _ in groups])
        self.num_actions = game.num_actions

    def on_update(self, losses) -> None:
        """Do what `a3c.py` does after an update, and note the time."""
        self.report.add(losses)
        self.times.append(time.monotonic())

    def measure_updates(self, agents: list[GroupAgent], seconds: float) -> float:
        """Run the agents' threads as `a3c.py` does, with its report; return agent steps per second."""
        coordinator = tf.train.Coordinator()
        threads = [threading.Thread(target=agent.run, args=(coordinator, self.device), daemon=True) for agent in agents]
        self.times.clear()
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            contextlib.closing(Report(self.config, self.progress)) as self.report,
        ):
            for thread in threads:
                thread.start()
            warm = WARM_UP_UPDATES * len(agents)
            end = None
            while (end is None or time.monotonic() < end) and not coordinator.wait_for_stop(0.2):
                if end is None and len(self.times) > warm:
                    end = time.monotonic() + seconds
            coordinator.request_stop()
            coordinator.join(threads, stop_grace_period_secs=60)
        counted = self.times[warm:]
        steps = self.config.agents_per_thread * self.config.unroll_step
        return steps * (len(counted) - 1) / (counted[-1] - counted[0])

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
        time.sleep(0.5)
        before, start = sum(steps), time.monotonic()
        time.sleep(seconds)
        rate = (sum(steps) - before) / (time.monotonic() - start)
        stop.set()
        for thread in threads:
            thread.join(60)
        return rate


def endless(config: a3c.Config) -> a3c.Config:
    """Return `config` without what would end a run while it is measured."""
    return dataclasses.replace(config, max_iteration=a3c.LARGEST, max_agent_steps=None)


def flags(config: a3c.Config) -> list[str]:
    """Return the flags of `a3c.py` that ask for `config`."""
    return [f"--{name}={value}" for name, value in vars(config).items()]


def measure_startup(config: a3c.Config, seconds: float) -> dict[str, float]:
    """Run `a3c.py` itself until all groups learn and some seconds on; return when learning began, and peak memory."""
    with training(flags(config)) as run:
        first, all_groups = run.wait_until_all_learn()
        time.sleep(seconds)
        with open(f"/proc/{run.child.process.pid}/status") as status:
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) / 2**20
    return {"seconds_to_first_update": first, "seconds_to_all_groups": all_groups, "peak_memory_gib": round(peak, 2)}


def measure(config: a3c.Config, game: Game, device: str, seconds: float, rounds: int) -> dict:
    """Measure the three rates in turn, `rounds` times; return their medians and what follows from them."""
    with tempfile.TemporaryDirectory() as log_dir:
        bench = Bench(config, game, device, log_dir)
        rates = []
        for number in range(rounds):
            rates.append(
                [
                    bench.measure_updates(bench.training_agents, seconds),
                    bench.measure_environments(seconds),
                    bench.measure_updates(bench.network_agents, seconds),
                ]
            )
            print(f"round {number + 1} of {rounds}: " + ", ".join(f"{rate:,.0f}" for rate in rates[-1]), flush=True)
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


def sweep(config: a3c.Config, seconds: float, path: str) -> list[dict]:
    """Measure `a3c.py` for each number of threads and of agents per thread, and draw the result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = []
    for agents in SWEEP_AGENTS:
        for threads in SWEEP_THREADS:
            point = {"num_threads": threads, "agents_per_thread": agents}
            with training(flags(dataclasses.replace(config, summary_period=20, **point))) as run:
                run.wait_until_all_learn()
                rate = run.measure(seconds)
            points.append({**point, "steps_per_second": round(rate)})
            print(f"{threads} threads x {agents} agents: {rate:,.0f} steps/s", flush=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for agents in SWEEP_AGENTS:
        rates = [p["steps_per_second"] for p in points if p["agents_per_thread"] == agents]
        axes.plot(SWEEP_THREADS, rates, "o-", label=f"{agents} agents per thread")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SWEEP_THREADS, [str(threads) for threads in SWEEP_THREADS])
    axes.set(xlabel="threads", ylabel="agent steps per second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    return points


def main() -> None:
    """Run the command line."""
    parser = a3c.config_parser(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--sweep", metavar="PNG", help="vary threads and agents per thread instead, and draw this")
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.rounds <= 0:
        parser.error("--seconds and --rounds must be above 0")
    config = endless(a3c.config_from(parser, arguments))
    game, device = a3c.game_and_device(config)
    end_on_signals()
    if arguments.sweep:
        results = {"sweep": sweep(config, arguments.seconds, arguments.sweep)}
    else:
        results = measure_startup(config, arguments.seconds)
        with tf.device(device):
            results = {**measure(config, game, device, arguments.seconds, arguments.rounds), **results}
    results |= {"game": game.id, "device": device.strip("/"), "hardware": hardware(), "versions": startup.versions()}
    for name, value in results.items():
        print(f"{name:30} {f'{value:>10,}' if isinstance(value, (int, float)) else value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
