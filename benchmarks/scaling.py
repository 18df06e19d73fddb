"""How far environment hosts carry: `python -m benchmarks.scaling --draw assets/scaling.png` draws a model of them.

The model's groups wait in turn for the device (a step of their copy, or an update), for the network's answer, for their
games and for the link on which all frames arrive. Its constants are below. `--measure` trains on this machine instead,
through Ray, and adds the latency to every step.
"""

import argparse
import contextlib
import heapq
import tempfile
import time

GAMES, UNROLL = 64, 5  # of a group
HOST = 16  # cores of a host; a group's games are on one
CORE = 2_500.0  # agent steps/s of a core's games: 40,000 of 16
UPDATE = 1 / 369  # seconds of an update on the device: calls alone, by four threads, whatever the network
STEP_BYTES = 84 * 84 + 14
CALL = 0.001  # seconds that Ray needs for a call and its answer
LATENCIES = (0.2, 1, 5, 20)  # ms, there and back


def simulate(groups: int, hosts: int, latency: float, link: float = 25e9) -> float:
    """Return the agent steps/s of so many groups on so many hosts; latency in s, link in bit/s."""
    threads = max([1, *(n for n in range(1, HOST + 1) if hosts * (HOST // n) >= groups)])  # as environment_hosts.py
    step, play, transfer = UPDATE / (UNROLL + 1), GAMES / CORE / threads, GAMES * STEP_BYTES * 8 / link
    device_free, link_free, hosts_free, steps = 0.0, 0.0, [0.0] * (hosts * (HOST // threads)), 0
    events, end = [(0.0, "frames are here", group, 0) for group in range(groups)], 20.0
    while events[0][0] < end:
        now, what, group, taken = heapq.heappop(events)
        if what == "frames are here":
            device_free = max(now, device_free) + step * (2 if taken % UNROLL == 0 else 1)  # learn, then act
            played = max(device_free + CALL + latency, heapq.heappop(hosts_free)) + play
            heapq.heappush(hosts_free, played)
            heapq.heappush(events, (played, "games have played", group, taken + 1))
        else:
            link_free = max(now, link_free) + transfer
            heapq.heappush(events, (link_free, "frames are here", group, taken))
            steps += GAMES
    return steps / end


def draw(path: str) -> None:
    """Draw agent steps/s by the number of hosts of 16 cores, for each latency and number of groups."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    hosts = (1, 2, 4, 8, 16)
    figure, panels = plt.subplots(1, len(LATENCIES), figsize=(12, 3.4), sharey=True, layout="constrained")
    for panel, latency in zip(panels, LATENCIES, strict=True):
        print(f"latency {latency} ms; agent steps/s on {hosts} hosts")
        for groups in (4, 8, 16, 32, 64):
            rates = [simulate(groups, n, latency / 1000) for n in hosts]
            print(f"{groups:4} groups " + " ".join(f"{rate:9,.0f}" for rate in rates))
            panel.plot(hosts, [rate / 1000 for rate in rates], marker="o", label=f"{groups} groups")
        panel.set(title=f"{latency} ms", xlabel="hosts of 16 cores", xscale="log", xticks=hosts, xticklabels=hosts)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("1,000 agent steps/s")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def measure(flags: list[str], seconds: float) -> None:
    """Train through Ray on this machine with added latencies."""
    import a3c
    from benchmarks.bench import Bench
    from environment_hosts import HostedGames
    from startup import tf

    config, step, added = a3c.parse_config(["--ray_address=local", *flags]), HostedGames.step, 0.0
    HostedGames.step = lambda games, actions: time.sleep(added) or step(games, actions)
    game, device = a3c.game_and_device(config)
    with (
        tf.device(device),
        tempfile.TemporaryDirectory() as log_dir,
        contextlib.closing(Bench(config, game, device, log_dir)) as bench,
    ):
        for latency in (0, *LATENCIES):
            added = latency / 1000
            rate = bench.measure_updates(bench.training_agents, seconds)
            print(f"{config.num_threads} groups, {latency} ms added: {rate:,.0f} agent steps/s", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--draw", metavar="PNG", help="draw the model")
    parser.add_argument("--measure", action="store_true", help="train with added latency; a3c.py's flags may follow")
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if not (arguments.draw or arguments.measure) or (flags and not arguments.measure):
        parser.error(f"--draw PNG or --measure is needed{f' for {flags[0]}' if flags else ''}")
    if arguments.draw:
        draw(arguments.draw)
    if arguments.measure:
        measure(flags, arguments.seconds)


if __name__ == "__main__":
    main()
