"""Count how often an agent misses the ball in Breakout: `python -m benchmarks.misses models/breakout-v0 --games 36`.

Plays the registered Breakout-v0 as `a3c-test.py` does, and prints a table: how many balls came down to the paddle and
which share of them was missed, by the score at that time and by the speed of the ball's fall, in pixels of the screen
per frame; of the fastest balls, also those that came to the narrow paddle, which the game gives once the ball has been
at the top. The last column is the mean of what the agent expected as the fastest balls began to fall: what a miss
costs where a lost life ends the return. Ball, paddle and speed are read from the console's memory.
"""

import argparse
import functools
import importlib
import itertools
import sys
from typing import NamedTuple

import gymnasium

import checkpoint
import startup
from environment import find_game, make_watching_env
from startup import UserError, tf

watching = importlib.import_module("a3c-test")  # no name that `import` can say

BALL_Y, SPEED_Y, WIDTH = 101, 103, 108  # bytes of memory: ball's height, its vertical speed (< 0 is up), half paddle
SPEEDS = {1: 1.5, 2: 2.0, 3: 3.4}  # what a falling ball's speed byte means in pixels per frame
FASTEST, WIDE = 3, 8
PADDLES = {"wide": False, "narrow": True}  # 16 and 12 pixels
BELOW_ALL_BRICKS = 120  # a ball that turns upwards beneath this was hit by the paddle
SCORES = (0, 60, 150, 300, 350, 400, 432, float("inf"))  # a wall is worth 432 points


class Ball(NamedTuple):
    """A ball that came down to the paddle: score and speed byte then, and the value as it began to fall."""

    score: float
    speed: int
    narrow: bool
    value: float
    missed: bool


class CountBalls(gymnasium.Wrapper):
    """A game of Breakout that notes in `balls` what came down to the paddle. `value` is to be set before each step."""

    def __init__(self, env: gymnasium.Env, balls: list[Ball]):
        super().__init__(env)
        self.balls, self.score, self.lives, self.falling, self.value = balls, 0.0, 0, None, 0.0

    def reset(self, **options):
        """Begin a game."""
        observation, info = self.env.reset(**options)
        self.score, self.lives, self.falling = 0.0, info["lives"], None
        return observation, info

    def step(self, action):
        """Take one step, and look where the ball is."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        memory = self.env.unwrapped.ale.getRAM()
        speed = int(memory[SPEED_Y].astype("int8"))
        self.score += float(reward)
        missed = info["lives"] < self.lives
        if self.falling and (missed or (speed < 0 and memory[BALL_Y] > BELOW_ALL_BRICKS)):
            self.balls.append(self.falling._replace(score=self.score, missed=missed))
        self.lives = info["lives"]
        if speed in SPEEDS and memory[BALL_Y] and not missed:
            value = self.falling.value if self.falling else self.value
            self.falling = Ball(self.score, speed, bool(memory[WIDTH] < WIDE), value, False)
        else:
            self.falling = None
        return observation, reward, terminated, truncated, info


def play(model: str, games: int, policy: str) -> tuple[list[Ball], list[float]]:
    """Play games with seeds 0, 1, 2 and so on; return all balls and the scores. Raises UserError if it cannot."""
    game, balls = find_game("Breakout-v0"), []
    flags = watching.Flags(iter=games, film=0, policy=policy)
    network, _ = checkpoint.load_network(checkpoint.resolve(model), game.num_actions)
    graph = tf.function(functools.partial(watching.decide, network), autograph=False)
    envs = [CountBalls(make_watching_env(game), balls) for _ in range(min(watching.ROWS, games))]

    def decide(*inputs):
        outputs = graph(*inputs)
        for env, value in zip(envs, outputs[-1].numpy(), strict=True):
            env.value = float(value)
        return outputs

    played = watching.play_games(envs, decide, network.initial_state(len(envs)), flags)
    return balls, [score for score, _, _ in played]


def table(balls: list[Ball]) -> str:
    """Return the table: of each range of scores and each speed, the share that was missed and the number of balls."""
    kinds = {f"{SPEEDS[speed]} pixels per frame": (speed, (False, True)) for speed in SPEEDS if speed != FASTEST}
    kinds |= {f"{SPEEDS[FASTEST]}, {name} paddle": (FASTEST, (narrow,)) for name, narrow in PADDLES.items()}
    lines = ["| score | " + " | ".join(kinds) + " | value |", "| --- " * (2 + len(kinds)) + "|"]
    for low, high in itertools.pairwise(SCORES):
        cells = [f"{low} - {high}" if high < float("inf") else f"{low} and more"]
        here = [ball for ball in balls if low <= ball.score < high]
        for speed, paddles in kinds.values():
            missed = [ball.missed for ball in here if ball.speed == speed and ball.narrow in paddles]
            cells.append(f"{100 * sum(missed) / len(missed):.1f} % of {len(missed)}" if missed else "none came")
        values = [ball.value for ball in here if ball.speed == FASTEST]
        cells.append(f"{sum(values) / len(values):.1f}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="checkpoint, or folder of a run: its newest one")
    parser.add_argument("--games", type=int, default=36, help="to play (%(default)s)")
    parser.add_argument("--policy", choices=["softmax", "greedy"], default="softmax", help="(%(default)s)")
    args = parser.parse_args()
    try:
        with tf.device(startup.choose_device("cpu")):
            balls, scores = play(args.model, args.games, args.policy)
    except UserError as error:
        sys.exit(f"misses.py: error: {error}")
    print(table(balls))
    missed = sum(ball.missed for ball in balls)
    print(f"{len(scores)} games, mean {sum(scores) / len(scores):.1f}: {missed} of {len(balls)} balls were missed")


if __name__ == "__main__":
    main()
