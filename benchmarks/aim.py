"""See what a network can see, in minutes: `python -m benchmarks.aim original pooled deep`, with any flag of `a3c.py`.

In Breakout an agent loses its lives to fast balls and the narrow paddle: it has to know where the ball will come down.
Here an agent plays, and the console's memory tells of each fast ball where it came down, and where the paddle was on
the way. Each network then learns to say that distance, as its value: with its initial weights, its optimizer, the clips
and the rate of training, which falls to a tenth. Printed is how far off it is on the last pictures, which it has not
learnt from. A network that cannot learn this here will not learn it from rewards.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import argparse
import dataclasses
import functools
import importlib
import sys
import time

import gymnasium
import numpy as np
from tqdm import tqdm

import a3c
import checkpoint
from benchmarks.common import processor
from benchmarks.misses import BALL_Y, FASTEST, SPEED_Y, WIDE, WIDTH
from environment import empty_history, find_game, make_watching_env
from network import CONVOLUTIONS, clip_gradients
from startup import UserError, tf

watching = importlib.import_module("a3c-test")  # no name that `import` can say

BALL_X, PADDLE_X = 99, 72  # bytes of memory: where they begin, pixels
HIGH, LOW, PADDLE_Y = 90, 165, 177  # of BALL_Y: a ball is looked at from HIGH on, has to come to LOW, and is hit there
UNIT = 20.0  # pixels: what a network has to say is about as large as the values that it says in training
BATCH, TEST = 64, 0.15  # balls of an update; share of the pictures, the last ones, that are kept for the test
SHARE = 0.5  # of the pictures that are kept: those of one ball are much alike
PATIENCE = 3_000  # steps without a picture, about ten games: a weak agent meets no fast balls


class Fall(gymnasium.Wrapper):
    """A game of Breakout that tells in `known` the pictures of each fast ball that has come down.

    Set `history` to what the agent sees before each step.
    """

    def __init__(self, env: gymnasium.Env, known: list[tuple], seed: int):
        super().__init__(env)
        self.known, self.falling, self.history, self.rng = known, [], None, np.random.default_rng(seed)

    def reset(self, **options):
        """Begin a game."""
        self.falling = []
        return self.env.reset(**options)

    def step(self, action):
        """Look where the ball is, then take one step. A ball is known once its fall has ended."""
        memory = self.env.unwrapped.ale.getRAM().astype(int)
        if memory[SPEED_Y] == FASTEST and HIGH < memory[BALL_Y] < PADDLE_Y:
            self.falling.append((self.history, memory[BALL_X], memory[BALL_Y], memory[PADDLE_X], memory[WIDTH] < WIDE))
        elif self.falling:
            (_, x, y, *_), (_, last_x, last_y, *_) = (self.falling[0], *self.falling)[-2:]
            if last_y > max(LOW, y):
                lands = last_x + (last_x - x) / (last_y - y) * (PADDLE_Y - last_y)
                for history, _, _, paddle, narrow in self.falling:
                    if self.rng.random() < SHARE:
                        self.known.append((history, (lands - paddle) / UNIT, narrow))
            self.falling = []
        return self.env.step(action)


def watch(model: str, pictures: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let an agent play until there are so many pictures.

    Returns histories [N, 84, 84] uint32, distances [N] float32 from the paddle's left end to where the ball comes down,
    in UNITs, and whether the paddle was narrow, [N] bool. Raises UserError if the agent cannot be played or meets none.
    """
    game, known = find_game("Breakout-v0"), []
    network, _ = checkpoint.load_network(checkpoint.resolve(model), game.num_actions)
    graph = tf.function(functools.partial(watching.decide, network), autograph=False)
    envs = [Fall(make_watching_env(game), known, seed) for seed in range(watching.ROWS)]
    screens = np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(envs)])
    history, state = empty_history(len(envs)), network.initial_state(len(envs))
    is_first, actions = np.ones(len(envs), bool), np.zeros(len(envs), np.int32)
    rng = np.random.default_rng(0)
    with tqdm(total=pictures, unit="picture", dynamic_ncols=True) as bar:
        steps_without = 0
        while len(known) < pictures:
            history, state, logits, _ = graph(history, state, actions, screens, is_first)
            seen = history.numpy()
            for index, (env, logit) in enumerate(zip(envs, logits.numpy(), strict=True)):
                env.history = seen[index]
                actions[index] = watching.choose_action(logit, "softmax", 0.0, rng)
                screens[index], _, terminated, truncated, _ = env.step(actions[index])
                is_first[index] = terminated or truncated
                if is_first[index]:
                    screens[index], _ = env.reset()
            steps_without = 0 if len(known) > bar.n else steps_without + 1
            if steps_without == PATIENCE:
                raise UserError(f"{model} meets no fast balls: let a better agent play")
            bar.update(len(known) - bar.n)
    histories, distances, narrow = zip(*known, strict=True)
    return np.stack(histories), np.array(distances, np.float32), np.array(narrow)


def learn(config: a3c.Config, device: str, updates: int, histories, distances, narrow) -> str:
    """Let a network learn to say the distances of the first pictures; return how it does on the last, as a line."""
    shared = a3c.make_network(config, find_game("Breakout-v0"), device)
    network, rng, known = shared.make_copy(), np.random.default_rng(config.random_seed), len(distances)
    known -= int(TEST * known)
    config = dataclasses.replace(config, annealing_steps=updates)  # the rate falls over these

    @functools.partial(tf.function, autograph=False)
    def update(history, distance, rate):
        with tf.GradientTape() as tape:
            _, value, _ = network(history, network.initial_state(BATCH))
            loss = tf.reduce_mean(tf.square(value - distance))
        gradients = tape.gradient(loss, network.trainable_variables, unconnected_gradients="zero")  # the policy's are
        shared.apply_gradients(clip_gradients(gradients, config.grad_clip, config.global_clip)[0], rate)
        network.copy_from(shared)

    start = time.process_time()
    for number in tqdm(range(updates), desc=config.network, unit="update", dynamic_ncols=True):
        batch = rng.integers(known, size=BATCH)
        rate = np.float32(config.learning_rate_at(number))
        update(tf.constant(histories[batch]), tf.constant(distances[batch]), rate)
    took = (time.process_time() - start) / updates
    says = [network(tf.constant(h), network.initial_state(len(h)))[1] for h in np.array_split(histories[known:], 40)]
    errors = UNIT * np.abs(np.concatenate(says) - distances[known:])
    narrow, half = narrow[known:], 6  # pixels: half of the narrow paddle
    rms, rms_narrow = (f"{np.sqrt(np.mean(np.square(e))):.1f}" if e.size else "none" for e in (errors, errors[narrow]))
    return f"| {config.network} | {rms} | {rms_narrow} | {np.mean(errors > half):.1%} | {1000 * took:.0f} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("networks", nargs="+", choices=CONVOLUTIONS, help="to compare; other flags are a3c.py's")
    parser.add_argument("--model", default="models/breakout-v0", help="plays, by its softmax policy (%(default)s)")
    parser.add_argument("--pictures", type=int, default=24_000, help="of falling balls (%(default)s)")
    parser.add_argument("--updates", type=int, default=3_000, help=f"of {BATCH} pictures each (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if arguments.pictures < 400 or arguments.updates < 1:
        parser.error("--pictures must be at least 400, --updates at least 1")
    try:
        config = a3c.parse_config(["--device=cpu", *flags])
        device = startup.choose_device(config.device)
        with tf.device(device):
            watched = watch(arguments.model, arguments.pictures)
            lines = []
            for network in arguments.networks:
                lines.append(learn(dataclasses.replace(config, network=network), device, arguments.updates, *watched))
    except UserError as error:
        sys.exit(f"aim.py: error: {error}")
    print(f"{processor()}: {arguments.updates:,} updates, pixels")
    print("| network | error | with the narrow paddle | more than 6 off | ms of a core per update |")
    print("| --- | --- | --- | --- | --- |", *lines, sep="\n")


if __name__ == "__main__":
    main()
