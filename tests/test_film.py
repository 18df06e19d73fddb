"""`film.py`: what an explained film shows, and when."""

import dataclasses
import types

import av
import numpy as np
import pytest

import film
from a3c import Config
from environment import find_game, make_watching_env
from film import CHOICE, LOOKAHEAD, MARGIN, RIGHT, SCALE, TOP, Explanation, Moment

BREAKOUT = types.SimpleNamespace(id="Breakout-v0", frameskip=3)


def moment(step, reward=0.0, ended=False, life_lost=False, num_actions=4):
    rng = np.random.default_rng(step)
    screen, frames = rng.integers(0, 256, [210, 160, 3], np.uint8), rng.integers(0, 256, [84, 84, 4], np.uint8)
    logits = rng.normal(size=num_actions).astype(np.float32)
    return Moment(screen, frames, logits, float(rng.normal()), 12.0, 3, step % num_actions, reward, ended, life_lost)


@pytest.fixture
def explain(monkeypatch):
    """Return a function that makes an Explanation, and the list of (moment, value, return) that it draws."""

    def make(**settings):
        drawn, config = [], {**dataclasses.asdict(Config()), **settings}
        explanation = Explanation(lambda _: None, 210, ["NOOP"] * 4, BREAKOUT, config)
        monkeypatch.setattr(explanation, "_draw", lambda moment: drawn.append((moment, *explanation.curve[-1])))
        return explanation, drawn

    return make


@pytest.mark.parametrize("life_loss_ends_return", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_return_beside_a_value_is_what_the_agent_learns_from(explain, clip, life_loss_ends_return):
    rewards, lost = [0, 4.0, 0, -7, 0.5, 2, 0, 1], [2, 5]
    explanation, drawn = explain(reward_clip=clip, life_loss_ends_return=life_loss_ends_return, discount_factor=0.9)
    game = [moment(i, r, ended=i == 7, life_lost=i in lost) for i, r in enumerate(rewards)]
    for each in game:
        explanation.add(each)
        known = each.ended or (each.life_lost and life_loss_ends_return)
        assert len(explanation.waiting) == 0 if known else len(explanation.waiting) > 0
    ends = [2, 5, 7] if life_loss_ends_return else [7]
    for start, (shown, value, true_return) in enumerate(drawn):
        end = next(end for end in ends if end >= start)
        learnt = np.clip(rewards, -(clip or np.inf), clip or np.inf)[start : end + 1]
        assert true_return == pytest.approx(sum(0.9**k * reward for k, reward in enumerate(learnt)))
        assert (shown, value) == (game[start], game[start].value)
    assert len(drawn) == 8


def test_no_more_moments_are_kept_than_the_look_ahead_needs(explain):
    explanation, drawn = explain(discount_factor=1.0)
    for step in range(LOOKAHEAD + 50):
        explanation.add(moment(step, reward=1.0)._replace(value=1000.0 - step))  # these are the true returns
        assert len(explanation.waiting) <= LOOKAHEAD
    assert len(drawn) == 50
    explanation.finish()
    assert len(drawn) == LOOKAHEAD + 50
    for _, value, true_return in drawn:
        assert true_return == pytest.approx(value)  # the value of the last moment stands for what is not known yet
    assert len(explanation.curve) == explanation.curve.maxlen == 10 * 20


@pytest.mark.parametrize("num_actions", [4, 18])
def test_picture_shows_the_screen_the_frames_and_the_policy(num_actions):
    pictures, names = [], [f"ACTION{i}" for i in range(num_actions)]
    explanation = Explanation(pictures.append, 210, names, BREAKOUT, dataclasses.asdict(Config()))
    explanation.add(shown := moment(2, ended=True, num_actions=num_actions))
    (picture,) = pictures
    assert picture.shape == (720, 1280, 3)
    screen = picture[TOP : TOP + 210 * SCALE : SCALE, MARGIN : MARGIN + 160 * SCALE : SCALE]
    np.testing.assert_array_equal(screen, shown.screen)
    for index in range(4):
        left = RIGHT + index * (168 + 16)
        np.testing.assert_array_equal(picture[TOP : TOP + 168 : 2, left : left + 168 : 2, 0], shown.frames[:, :, index])
    policy = np.exp(shown.logits) / np.exp(shown.logits).sum()
    bars = [picture[explanation._row(index), RIGHT + 180 : RIGHT + 300] for index in range(num_actions)]
    lengths = [(bar != film.DIM).any(axis=-1).sum() for bar in bars]
    np.testing.assert_allclose(lengths, 120 * policy, atol=1.5)
    assert [tuple(bar[0]) == CHOICE for bar in bars] == [index == shown.action for index in range(num_actions)]


def test_video_has_a_picture_for_every_moment(tmp_path):
    game = find_game("Breakout-v0")
    env = make_watching_env(game)
    env.reset(seed=0)
    with film.open_film(str(tmp_path / "play.mp4"), env, game, dataclasses.asdict(Config())) as add:
        for step in range(5):
            add(moment(step))
    with av.open(str(tmp_path / "play.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)]
    assert frames == [(720, 1280, 3)] * 5
