"""`benchmarks/aim.py`: a fast ball is known once it has come down, and networks learn to say where that was."""

import types

import gymnasium
import numpy as np
import pytest
from conftest import Resumable
from test_misses import follow

import a3c
from benchmarks import aim
from benchmarks.misses import BALL_Y, FASTEST, SPEED_Y, WIDTH
from environment import find_game, make_watching_env
from startup import UserError


class Memory(gymnasium.Env):
    """A console of which only the memory is there: each step shows the next moment of a script."""

    observation_space = action_space = gymnasium.spaces.Discrete(1)

    def __init__(self, moments):
        self.moments, self.ale = moments, types.SimpleNamespace(getRAM=self.memory)

    def memory(self):
        x, y, speed, paddle, half = self.moments[0]
        memory = np.zeros(128, np.uint8)
        memory[[aim.BALL_X, BALL_Y, SPEED_Y, aim.PADDLE_X, WIDTH]] = x, y, np.int8(speed).astype(np.uint8), paddle, half
        return memory

    def step(self, action):
        self.moments.pop(0)
        return 0, 0.0, False, False, {}


def known(moments, monkeypatch):
    """Return what `Fall` knows of a script of (ball's x, y, speed, paddle's x, half its width)."""
    monkeypatch.setattr(aim, "SHARE", 1.1)
    found = []
    env = aim.Fall(Memory(list(moments)), found, seed=0)
    for number in range(len(moments)):
        env.history = number
        env.step(0)
    return found


@pytest.mark.parametrize("half, narrow", [(6, True), (8, False)])
def test_each_picture_of_a_fast_ball_is_known_with_its_way_to_where_that_comes_down(monkeypatch, half, narrow):
    fall = [(100 + n, 80 + 10 * n, FASTEST, 90 + 2 * n, half) for n in range(10)]  # to y = 170; it would come to 109.7
    found = known([*fall, (110, 180, -FASTEST, 110, half)], monkeypatch)
    assert [history for history, _, _ in found] == list(range(2, 10))  # from below HIGH on
    np.testing.assert_allclose([d * aim.UNIT for _, d, _ in found], [109.7 - (90 + 2 * n) for n in range(2, 10)])
    assert [is_narrow for _, _, is_narrow in found] == [narrow] * 8


@pytest.mark.parametrize(
    "moments",
    [
        [(100, 100 + n, FASTEST, 90, 8) for n in range(20)] + [(100, 120, -FASTEST, 90, 8)],  # turned above LOW
        [(100, 100 + 5 * n, FASTEST - 1, 90, 8) for n in range(16)] + [(100, 180, -FASTEST, 90, 8)],  # not fast
        [(100, 100 + 5 * n, -FASTEST, 90, 8) for n in range(16)] + [(100, 180, FASTEST - 1, 90, 8)],  # not falling
        [(100, 170, FASTEST, 90, 8), (100, 188, -FASTEST, 90, 8)],  # seen once
    ],
)
def test_other_balls_are_not_known(monkeypatch, moments):
    assert known(moments, monkeypatch) == []


def test_agent_that_meets_no_fast_balls_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(aim, "PATIENCE", 20)
    path = Resumable(tmp_path, filters=1).save(3)
    with pytest.raises(UserError, match=f"{path} meets no fast balls"):
        aim.watch(path, 10)


def test_balls_are_hit_where_it_says():
    hits, rises = [], False
    with make_watching_env(find_game("BreakoutNoFrameskip-v4", 1)) as env:
        env.reset(seed=1)
        memory = env.unwrapped.ale.getRAM().astype(int)
        for step in range(1000):
            height = memory[BALL_Y]
            env.step(follow(memory, step))
            memory = env.unwrapped.ale.getRAM().astype(int)
            if not rises and aim.LOW < memory[BALL_Y] < height:
                hits.append(height)
            rises = memory[BALL_Y] < height
    assert len(hits) > 5
    assert set(hits) == {aim.PADDLE_Y}


def test_network_learns_where_the_brightest_column_is():
    rng, number = np.random.default_rng(0), 400
    columns = rng.integers(84, size=number)
    histories = np.zeros([number, 84, 84], np.uint32)
    histories[np.arange(number), :, columns] = 2**32 - 1
    distances, narrow = (columns / aim.UNIT).astype(np.float32), columns % 2 == 0
    config = a3c.parse_config(["--preset=strong", "--filters=4", "--learning_rate=1e-3", "--compute_dtype=float32"])
    before, after = (
        float(aim.learn(config, "/CPU:0", updates, histories, distances, narrow).split("|")[2]) for updates in (1, 150)
    )
    assert after < before / 2
