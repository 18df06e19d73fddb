"""Where the time of an update goes: `python -m benchmarks.breakdown`, with any flag of `a3c.py`.

One group on one core of a CPU, nothing else at work: the real `GroupAgent.iterate`, whose operations run one after the
other here, each timed by TensorFlow's own profiler. While the graphs are traced, the names of the operations are made
to begin with the part that they belong to. `ONEDNN_VERBOSE=1 python -m benchmarks.breakdown` also splits the network by
kernel, summed from what oneDNN, TensorFlow's library of convolutions and matrix products, prints about each call.
"""

import startup  # isort: skip  # noqa: F401  # first: it checks the packages and sets TensorFlow up

import argparse
import collections
import contextlib
import glob
import re
import sys
import tempfile
import time
from unittest import mock

import a3c
import async_agent
from benchmarks.bench import WARM_UP_UPDATES, endless
from benchmarks.common import processor
from environment import make_training_envs
from network import ActorCritic, SharedNetwork
from progress import Progress
from startup import UserError, tf

# Part -> what is traced into it.
PARTS = {
    "forward": (ActorCritic, "__call__"),
    "actions": (async_agent, "draw_action"),
    "resize": (async_agent, "preprocess"),
    "history": (async_agent, "push_frame"),
    "returns": (async_agent, "n_step_returns"),
    "loss": (async_agent, "a3c_loss"),
    "clip": (async_agent, "clip_gradients"),
    "optimizer": (SharedNetwork, "apply_gradients"),
    "copy": (ActorCritic, "copy_from"),
}
# What the name of an operation begins with -> part.
NAMES = {
    **{part: part for part in (*PARTS, "environments")},
    "gradient_tape": "backward",
    "AddN": "backward",  # of the gradients of the steps
    "PyFunc": "Python around the games",
}


def make_agent(config: a3c.Config, game, device: str) -> async_agent.GroupAgent:
    """Return the only group, its operations named by part, its games on one core and timed as "environments"."""

    def named(part, function):
        def call(*arguments, **options):
            with tf.name_scope(part):
                return function(*arguments, **options)

        return call

    envs = make_training_envs(game, config.agents_per_thread, 1, game.screen)
    step = envs.step

    def timed_step(actions):
        with tf.profiler.experimental.Trace("environments:step"):
            return step(actions)

    envs.step = timed_step
    with contextlib.ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            patches.enter_context(mock.patch.object(owner, name, named(part, getattr(owner, name))))
        shared, progress = a3c.make_network(config, game, device), Progress(1, config.agents_per_thread)
        agent = async_agent.GroupAgent(0, None, shared, progress, config, lambda losses: None, game.screen)
    agent.envs = envs
    agent.reset()
    return agent


def run(agent: async_agent.GroupAgent, seconds: float) -> tuple[float, int]:
    """Let the group learn for so long; return the seconds it took and its updates."""
    updates, start = 0, time.perf_counter()
    while (whole := time.perf_counter() - start) < seconds:
        agent.iterate()
        updates += 1
    return whole, updates


def seconds_by_part(log_dir: str) -> collections.Counter:
    """Return the sums of the times of all operations in a profile."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2  # not above: `startup` imports TensorFlow without its noise

    (path,) = glob.glob(f"{log_dir}/**/*.xplane.pb", recursive=True)
    with open(path, "rb") as file:
        planes = xplane_pb2.XSpace.FromString(file.read()).planes
    spent = collections.Counter()
    for plane in planes:
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            if found := re.match(r"(\w+?)(_\d+)?(/.*)?:\w+$", name):  # forward_2/Relu:_FusedConv2D
                spent[NAMES.get(found[1], "rest of the graph")] += event.duration_ps / 1e12
    spent["Python around the games"] -= spent["environments"]  # which are within
    return spent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10, help="to measure for (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if not 0 < arguments.seconds < float("inf"):
        parser.error("--seconds must be above 0")
    config = endless(a3c.parse_config([*flags, "--num_threads=1"]))
    game, device = a3c.game_and_device(config)
    if "CPU" not in device:
        parser.error(f"device = {config.device!r}: a GPU computes while others go on; only a CPU's time adds up")
    tf.config.threading.set_inter_op_parallelism_threads(1)  # one operation at a time, so that their times add up
    tf.config.threading.set_intra_op_parallelism_threads(1)
    with tf.device(device), tempfile.TemporaryDirectory() as log_dir:
        agent = make_agent(config, game, device)
        for _ in range(WARM_UP_UPDATES):
            agent.iterate()
        alone, updates_alone = run(agent, arguments.seconds)
        tf.profiler.experimental.start(log_dir)
        whole, updates = run(agent, arguments.seconds)
        tf.profiler.experimental.stop()
        spent = seconds_by_part(log_dir)
    spent["between operations, and Python"] = whole - spent.total()
    size = f"{config.agents_per_thread} x {config.unroll_step} agent steps"
    print(f"{processor()}, one core; {updates} updates of {size}, {agent.network.compute_dtype.name}")
    for part, seconds in (*spent.most_common(), ("all", whole)):
        print(f"{part:30} {1000 * seconds / updates:7.1f} ms  {100 * seconds / whole:5.1f} %")
    print(f"{'without the profiler':30} {1000 * alone / updates_alone:7.1f} ms")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"breakdown.py: error: {error}")
