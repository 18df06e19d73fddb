"""`benchmarks/misses.py`: balls that came down to the paddle are counted, and of those the missed ones."""

import collections
import statistics
import sys

import gymnasium
import pytest

from benchmarks import misses
from benchmarks.misses import Ball, CountBalls
from environment import find_game, make_watching_env

NOOP, FIRE, RIGHT, LEFT = range(4)
BALL_X, PADDLE_X = 99, 72
RED = (200, 72, 72)


def follow(memory, step, to_the_left_of_the_ball=0):
    """Return the action that brings the paddle under the ball; now and then it serves."""
    aim = memory[BALL_X] - memory[PADDLE_X] - 8 - to_the_left_of_the_ball
    return FIRE if step % 50 == 0 else RIGHT if aim > 3 else LEFT if aim < -3 else NOOP


@pytest.fixture
def counted():
    """Return Breakout, without randomness, and the list of its balls."""
    balls = []
    with CountBalls(make_watching_env(find_game("BreakoutNoFrameskip-v4", 2)), balls) as env:
        yield env, balls


def test_each_life_of_an_idle_player_is_one_ball_that_was_missed(counted):
    env, balls = counted
    env.reset(seed=1)
    ended = False
    while not ended:
        _, _, ended, _, _ = env.step(FIRE)
    assert [ball.missed for ball in balls].count(True) == 5
    assert all(ball.speed == 1 for ball in balls)


def test_each_ball_that_is_hit_brings_a_brick_and_the_score_goes_with_it(counted):
    env, balls = counted
    env.reset(seed=1)
    score, bricks = 0.0, 0
    for step in range(1500):
        _, reward, _, _, info = env.step(follow(env.unwrapped.ale.getRAM().astype(int), step))
        score, bricks = score + reward, bricks + (reward > 0)
        if info["lives"] < 5:
            break
    hits = [ball for ball in balls if not ball.missed]
    assert len(hits) > 5
    assert bricks <= len(hits) <= bricks + 1
    assert [ball.score for ball in hits] == sorted(ball.score for ball in hits)
    assert hits[0].score == 0
    assert 0 < hits[-1].score <= score
    assert hits[0].speed < hits[-1].speed or len({ball.speed for ball in hits}) > 1  # it gets faster


def test_table_has_the_share_of_each_range_and_speed(monkeypatch, capsys):
    monkeypatch.setattr(
        misses, "make_watching_env", lambda game: gymnasium.wrappers.TimeLimit(make_watching_env(game), 30)
    )
    monkeypatch.setattr(sys, "argv", ["misses", "models/breakout-v0", "--games=2"])
    misses.main()
    assert "2 games, mean" in capsys.readouterr().out
    ball = Ball(10, 3, False, 2.0, True)
    balls = [ball, ball._replace(score=59, value=4.0, missed=False), ball._replace(score=59, narrow=True, value=6.0)]
    balls += [ball._replace(score=60, speed=1, missed=False), ball._replace(score=500, speed=2, narrow=True)]
    rows = misses.table(balls).splitlines()
    assert rows[2] == "| 0 - 60 | none came | none came | 50.0 % of 2 | 100.0 % of 1 | 4.0 |"
    assert rows[3] == "| 60 - 150 | 0.0 % of 1 | none came | none came | none came |  |"
    assert rows[5] == "| 300 - 350 | none came | none came | none came | none came |  |"
    assert rows[8] == "| 432 and more | none came | 100.0 % of 1 | none came | none came |  |"


def test_model_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["misses", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"misses.py: error: .*none"):
        misses.main()


def test_paddle_is_narrow_once_the_ball_has_been_at_the_top(counted):
    env, balls = counted
    env.reset(seed=1)
    ale, pixels = env.unwrapped.ale, collections.defaultdict(list)
    for step in range(5000):
        action = follow(ale.getRAM().astype(int), step, to_the_left_of_the_ball=2 - step // 100 % 3 * 2)
        _, _, ended, _, _ = env.step(action)
        red = (ale.getScreenRGB()[190, 8:152] == RED).all(axis=-1).sum()  # more with the ball, less behind the wall
        pixels[ale.getRAM()[misses.WIDTH]].append(red)
        if ended or (balls and balls[-1].narrow):
            break
    assert balls[-1].narrow
    assert {width: statistics.mode(counts) for width, counts in pixels.items()} == {8: 16, 6: 12}
