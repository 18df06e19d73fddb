"""Where the time of an update goes: `python -m benchmarks.breakdown`, with any flag of `a3c.py`.

One group, one thread, nothing else at work: the real `GroupAgent.iterate`, with a stopwatch around each part. On a GPU,
which computes while Python goes on, a part also waits for what the parts before it began. On a CPU,
`ONEDNN_VERBOSE=1 python -m benchmarks.breakdown` also splits the network by kernel, summed from what oneDNN,
TensorFlow's library of convolutions and matrix products, prints about each call.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages and sets TensorFlow up

import collections
import tempfile
import time
from unittest import mock

import a3c
import async_agent
from bench import WARM_UP_UPDATES, Bench, hardware
from startup import tf


def breakdown(bench: Bench, seconds: float) -> tuple[dict[str, float], int]:
    """Run the only group of `bench` for so long; return the seconds that went into each part, and the updates."""
    spent = collections.Counter()

    def timed(part, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            spent[part] += time.perf_counter() - start
            return result

        return call

    agent = bench.training_agents[0]
    agent.on_update = lambda losses: None
    agent.envs.step = timed("environments", agent.envs.step)
    agent.network.act = timed("forward", agent.network.act)
    agent.network.predict_value = timed("forward, bootstrap", agent.network.predict_value)
    agent.network.copy_from = timed("copy of the weights", agent.network.copy_from)
    agent.shared.apply_gradients = timed("RMSProp", agent.shared.apply_gradients)
    functions = {
        "push_frame": "history",
        "n_step_returns": "returns and loss",
        "a3c_loss": "returns and loss",
        "clip_gradients": "clip",
    }
    replaced = {name: timed(part, getattr(async_agent, name)) for name, part in functions.items()}
    backward = timed("backward", tf.GradientTape.gradient)
    with mock.patch.multiple(async_agent, **replaced), mock.patch.object(tf.GradientTape, "gradient", backward):
        agent.reset()
        for _ in range(WARM_UP_UPDATES):
            agent.iterate()
        spent.clear()
        updates, start = 0, time.perf_counter()
        while (whole := time.perf_counter() - start) < seconds:
            agent.iterate()
            updates += 1
    spent["Python and the rest"] = whole - spent.total()
    return dict(spent.most_common()), updates


def main() -> None:
    """Run the command line."""
    parser = a3c.config_parser(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="to measure for (%(default)s)")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error("--seconds must be above 0")
    arguments.num_threads = 1
    config = a3c.config_from(parser, arguments)
    game, device = a3c.game_and_device(config)
    with tf.device(device), tempfile.TemporaryDirectory() as log_dir:
        spent, updates = breakdown(Bench(config, game, device, log_dir), arguments.seconds)
    whole = sum(spent.values())
    size = f"{config.agents_per_thread} x {config.unroll_step} agent steps"
    print(f"{hardware()}, {device.strip('/')}; {updates} updates of {size}")
    for part, seconds in {**spent, "all": whole}.items():
        print(f"{part:20} {1000 * seconds / updates:7.1f} ms  {100 * seconds / whole:5.1f} %")


if __name__ == "__main__":
    main()
