"""`benchmarks/misses.py`: balls that came down to the paddle are counted, and of those the missed ones."""

import sys

import gymnasium
import pytest

from benchmarks import misses
from benchmarks.misses import Ball, CountBalls
from environment import find_game, make_watching_env

NOOP, FIRE, RIGHT, LEFT = range(4)
BALL_X, PADDLE_X = 99, 72


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
        memory = env.unwrapped.ale.getRAM().astype(int)
        aim = memory[BALL_X] - memory[PADDLE_X] - 8
        action = FIRE if step % 50 == 0 else RIGHT if aim > 3 else LEFT if aim < -3 else NOOP
        _, reward, _, _, info = env.step(action)
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
    balls = [Ball(10, 3, True), Ball(59, 3, False), Ball(60, 1, False), Ball(500, 2, True)]
    rows = misses.table(balls).splitlines()
    assert rows[2] == "| 0 - 60 | none came | none came | 50.0 % of 2 |"
    assert rows[3] == "| 60 - 150 | 0.0 % of 1 | none came | none came |"
    assert rows[6] == "| 350 and more | none came | 100.0 % of 1 | none came |"


def test_model_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["misses", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"misses.py: error: .*none"):
        misses.main()
