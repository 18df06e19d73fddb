"""Measure speed: `python bench.py` prints how fast training runs and what share of the machine's ceiling that is.

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
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import gymnasium
import numpy as np

import a3c
from async_agent import GroupAgent, Progress
from environment import FRAME_SIZE, Game, make_training_envs
from startup import available_cores
from report import Report
from startup import tf

WARM_UP_UPDATES = 8  # of each group, not counted
STARTUP_LIMIT = 180.0  # seconds that a3c.py gets until all groups learn
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
        shared = a3c.make_network(config, game)
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


def bytes_per_step(config: a3c.Config) -> tuple[float, float]:
    """Return the bytes that go up to the device and come down from it per agent step, counted over one rollout."""
    steps = config.agents_per_thread * config.unroll_step
    frame, done, reward, seed, action = FRAME_SIZE**2, 1, 4, 8, 4
    up = steps * (frame + done) + config.unroll_step * seed + steps * (reward + done) + 4  # ... and the learning rate
    down = steps * action + 4 * 4  # the actions, and the losses
    return up / steps, down / steps


def measure_startup(flags: list[str], seconds: float, log_dir: str) -> dict[str, float]:
    """Run `a3c.py` itself until all groups learn and some seconds on; return when learning began, and peak memory."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "a3c.py"), *flags]
        process = subprocess.Popen([*command, "--log_dir", log_dir], stdout=output, stderr=subprocess.STDOUT)
        try:
            found, end = None, time.monotonic() + STARTUP_LIMIT
            while not found and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                output.seek(0)
                found = re.search(r"first update ([\d.]+) s .* after ([\d.]+) s", output.read())
            if not found:
                output.seek(0)
                raise RuntimeError(f"a3c.py did not start learning in {STARTUP_LIMIT:.0f} s:\n{output.read()[-2000:]}")
            time.sleep(seconds)
            with open(f"/proc/{process.pid}/status") as status:
                peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) / 2**20
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    return {
        "seconds_to_first_update": float(found[1]),
        "seconds_to_all_groups": float(found[2]),
        "peak_memory_gib": round(peak, 2),
    }


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
    training, environments, network = np.median(rates, axis=0)
    shared_cores = "CPU" in device
    ceiling = 1 / (1 / environments + 1 / network) if shared_cores else min(environments, network)
    up, down = bytes_per_step(config)
    return {
        "steps_per_second": round(float(training)),
        "environment_steps_per_second": round(float(environments)),
        "network_steps_per_second": round(float(network)),
        "ceiling_steps_per_second": round(float(ceiling)),
        "ceiling_share": round(float(training / ceiling), 3),
        "bytes_up_per_step": round(up, 1),
        "bytes_down_per_step": round(down, 2),
    }


def sweep(config: a3c.Config, game: Game, device: str, seconds: float, path: str) -> list[dict]:
    """Measure training for each number of threads and of agents per thread, and draw the result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = []
    for agents in SWEEP_AGENTS:
        for threads in SWEEP_THREADS:
            varied = dataclasses.replace(config, num_threads=threads, agents_per_thread=agents)
            with tempfile.TemporaryDirectory() as log_dir:
                bench = Bench(varied, game, device, log_dir)
                rate = float(np.median([bench.measure_updates(bench.training_agents, seconds / 2) for _ in range(3)]))
            points.append({"num_threads": threads, "agents_per_thread": agents, "steps_per_second": round(rate)})
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


def hardware() -> str:
    """Return the processor's name and how many cores this process may use."""
    name = platform.processor()
    with contextlib.suppress(OSError, TypeError), open("/proc/cpuinfo") as cpuinfo:
        name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read())[1]
    return f"{name}, {available_cores()} cores"


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
    config = a3c.config_from(parser, arguments)
    game, device = a3c.game_and_device(config)

    with tf.device(device):
        if arguments.sweep:
            results = {"sweep": sweep(config, game, device, arguments.seconds, arguments.sweep)}
        else:
            flags = [f"--{name}={value}" for name, value in vars(config).items() if name != "log_dir"]
            with tempfile.TemporaryDirectory() as log_dir:
                results = measure_startup(flags, arguments.seconds, log_dir)
            results = {**measure(config, game, device, arguments.seconds, arguments.rounds), **results}
    results |= {"game": game.id, "device": device.strip("/"), "hardware": hardware(), "versions": startup.versions()}
    for name, value in results.items():
        print(f"{name:30} {f'{value:>10,}' if isinstance(value, (int, float)) else value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
