"""How far environment hosts carry: `python -m benchmarks.scaling assets/scaling.png` draws a model of them.

The model's groups wait in turn for the device (a step of their copy, or an update), for the network's answer, for their
games and for the link on which all frames arrive. Its constants are below. `--measure` trains on this machine instead,
through Ray, and adds the latency to every step.
"""

import argparse
import heapq
import re
import sys
import tempfile
import time

GAMES, UNROLL = 64, 5  # of a group
CORE = 2_500.0  # agent steps/s of a core's games: 40,000 of 16
UPDATE = 1 / 369  # seconds of an update on the device: calls alone, by four threads, whatever the network
STEP_BYTES = 84 * 84 + 14
CALL = 0.001  # seconds that Ray needs for a call and its answer
LATENCIES = (0.2, 1, 5, 20)  # ms, there and back


def simulate(groups: int, cores: int, latency: float, link: float = 25e9) -> float:
    """Return the agent steps/s of so many groups on so many cores of hosts; latency in s, link in bit/s."""
    threads = max(1, cores // groups)  # of a group
    step, play, transfer = UPDATE / (UNROLL + 1), GAMES / CORE / threads, GAMES * STEP_BYTES * 8 / link
    device_free, link_free, hosts_free, steps = 0.0, 0.0, [0.0] * (cores // threads), 0
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
            rates = [simulate(groups, 16 * n, latency / 1000) for n in hosts]
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
    from benchmarks.common import Child, read_rows

    program = (
        "import sys, time; sys.argv[0] = 'a3c.py'; import a3c, environment_hosts as hosts; "
        "step = hosts.HostedGames.step; "
        "hosts.HostedGames.step = lambda *words: time.sleep({}) or step(*words); sys.exit(a3c.main())"
    )
    for groups in (1, 2, 4):
        for latency in (0, *LATENCIES):
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, "-c", program.format(latency / 1000), "--ray_address=local", "--device=cpu"]
                words += [f"--num_threads={groups}", "--summary_period=10", f"--log_dir={folder}/log", *flags]
                with Child(words, grace=10) as child:
                    child.wait_for(lambda: re.search(f"{groups} of {groups} groups learn", child.printed()))  # noqa: B023
                    time.sleep(seconds)
                    rows = read_rows(f"{folder}/log/progress.csv")
                    last = [row for row in rows if float(row["seconds"]) > float(rows[-1]["seconds"]) - seconds]
                    steps, took = (float(last[-1][x]) - float(last[0][x]) for x in ("agent_steps", "seconds"))
            print(f"{groups} groups, {latency} ms added: {steps / took:,.0f} agent steps/s", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("picture", nargs="?", help="where to draw the model")
    parser.add_argument("--measure", action="store_true", help="train with added latency; other flags are a3c.py's")
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if arguments.picture:
        draw(arguments.picture)
    if arguments.measure:
        measure(flags, arguments.seconds)


if __name__ == "__main__":
    main()
