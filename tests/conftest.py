"""What several tests share: TensorFlow set up as the program does, a small Config, and games whose course is known."""

import startup  # isort: skip  # first: it sets TensorFlow up

import gymnasium
import numpy as np
import pytest

from a3c import Config

startup.choose_device("cpu")  # one thread per operation, as in training; it cannot be set later


class ScriptedEnv(gymnasium.vector.VectorEnv):
    """B games that pay and end by a script, whatever is played, and that restart in the same step.

    Args:
      rewards: [S, B] raw rewards of the steps; after the last step the script starts again.
      ends, cuts: [S, B] bool, whether a game is over (terminated) or is cut off (truncated) with the step.
    """

    def __init__(self, rewards, ends=None, cuts=None):
        self.rewards = np.asarray(rewards, np.float64)
        shape = steps, self.num_envs = self.rewards.shape
        self.ends, self.cuts = (np.zeros(shape, bool) if x is None else np.asarray(x, bool) for x in (ends, cuts))
        # What `reset` and then the steps show. Noise, nowhere black.
        self.frames = np.random.default_rng(0).integers(1, 256, [steps + 1, self.num_envs, 84, 84], np.uint8)
        self.actions = []  # of the steps so far, each [B]
        self.seeds = []  # of the resets so far

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return self.frames[0][:, None], {}

    def step(self, actions):
        now = len(self.actions) % len(self.rewards)
        self.actions.append(np.array(actions))
        return self.frames[now + 1][:, None], self.rewards[now], self.ends[now], self.cuts[now], {}


@pytest.fixture
def make_config(tmp_path):
    """Return a function that makes the Config of a small one-thread run into `tmp_path`."""

    def make(**fields):
        small = {
            "log_dir": str(tmp_path),
            "device": "cpu",
            "num_threads": 1,
            "agents_per_thread": 2,
            "max_iteration": 1000,
        }
        return Config(**{**small, **fields})

    return make
