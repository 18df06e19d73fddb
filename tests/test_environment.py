"""Games, pixels and the frame history; the emulator is the real one."""

import collections
import contextlib
import types

import gymnasium
import numpy as np
import pytest
from conftest import ScriptedEnv

import environment
from environment import find_game


@pytest.fixture
def native():
    """Return a function that builds the training environment of a game, one copy on one core, changed as asked."""
    built = []

    def build(game_id, num_envs=1, size=(84, 84), **changes):
        game = find_game(game_id)._replace(**changes)
        built.append(environment.make_training_envs(game, num_envs, num_threads=1, size=size))
        return built[-1]

    yield build
    for env in built:
        env.close()


# Names.


@pytest.mark.parametrize(
    "game_id, rom, frameskip, frameskip_range, sticky, num_actions, background",
    [
        ("Breakout-v0", "breakout", 3, (2, 4), 0.25, 4, 0),
        ("Pong-v0", "pong", 3, (2, 4), 0.25, 6, 87),
        ("SpaceInvaders-v4", "space_invaders", 3, (2, 4), 0.0, 6, 0),
        ("ALE/MsPacman-v5", "ms_pacman", 4, None, 0.25, 9, 32),
        ("BreakoutNoFrameskip-v4", "breakout", 1, None, 0.0, 4, 0),
    ],
)
def test_game_has_the_settings_of_its_registration(
    game_id, rom, frameskip, frameskip_range, sticky, num_actions, background
):
    expected = (game_id, rom, num_actions, (210, 160), background, sticky, 108_000, frameskip, frameskip_range, False)
    assert tuple(find_game(game_id)) == (*expected, False, 0, False)
    assert find_game(game_id, random_frameskip=True).random_frameskip == (frameskip_range is not None)
    assert not find_game(game_id, frameskip=5, random_frameskip=True).random_frameskip


def test_background_is_the_level_of_most_pixels_that_training_sees_in_play(native):
    game = find_game("Pong-v0")
    envs = native("Pong-v0", 2)
    envs.reset(seed=0)
    for _ in range(100):
        frames = envs.step(np.zeros(2, np.int32))[0]
    assert np.mean(frames == game.background) > 0.5


def test_description_of_a_game_says_that_its_random_frameskip_is_a_mean():
    assert "frame-skip 3 (the mean of this id's random 2..4)" in find_game("Breakout-v0").describe()
    assert "frame-skip 3 (on average, drawn from 2..4)" in find_game("Breakout-v0", random_frameskip=True).describe()
    assert "frame-skip 4, sticky actions 0.25" in find_game("Breakout-v0", frameskip=4).describe()
    assert find_game("ALE/MsPacman-v5").describe() == "ALE/MsPacman-v5: 9 actions, frame-skip 4, sticky actions 0.25"


# Pixels.


def area_resize(screen):
    """Resize [H, W] to [84, 84] by repeating each pixel 84 times each way and averaging whole blocks."""
    height, width = screen.shape
    rows = np.repeat(screen.astype(np.float64), 84, axis=0).reshape(84, height, width).mean(1)
    return np.repeat(rows, 84, axis=1).reshape(84, 84, width).mean(2)


@pytest.mark.parametrize("height", [210, 250, 214, 84])  # of most games; of Air Raid; of Carnival; as wide as a frame
def test_preprocess_averages_equal_areas(height):
    for least in (0, 255):  # noise; white, which must not overflow
        screens = np.random.default_rng(0).integers(least, 256, [2, height, 160], np.uint8)
        frames = environment.preprocess(screens).numpy()
        assert frames.dtype == np.uint8
        for screen, frame in zip(screens, frames, strict=True):
            assert np.abs(frame - area_resize(screen)).max() < 0.501  # rounded to the nearest


def test_preprocess_leaves_what_is_a_frame():
    frames = np.random.default_rng(0).integers(0, 256, [2, 84, 84], np.uint8)
    np.testing.assert_array_equal(environment.preprocess(frames), frames)


def watched(game, monkeypatch, noops=0):
    """Build the environment to watch a game in, without sticky actions; each game begins after so many no-ops."""
    make = gymnasium.make
    monkeypatch.setattr(gymnasium, "make", lambda *a, **k: make(*a, **k, repeat_action_probability=0.0))
    env = environment.make_watching_env(game._replace(frameskip_range=None))
    monkeypatch.setattr(
        gymnasium.Wrapper, "np_random", types.SimpleNamespace(integers=lambda low, *high: low if high else noops)
    )
    return env


FRAMES = {"max_pool": True, "noop_max": 5, "fire_reset": True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Gymnasium's, of v0
@pytest.mark.parametrize(
    "game_id, changes",
    [
        ("Breakout-v0", {}),
        ("Pong-v0", {}),
        ("SpaceInvaders-v4", {}),
        *(
            pytest.param(game_id, FRAMES, marks=pytest.mark.row(n=37))
            for game_id in ("ALE/Asteroids-v5", "SpaceInvaders-v4")
        ),
        pytest.param("ALE/MsPacman-v5", {"max_pool": True}, marks=pytest.mark.row(n=37)),
        pytest.param("Pong-v0", {"noop_max": 30}, marks=pytest.mark.row(n=37)),
    ],
)
def test_watching_shows_the_pixels_and_pays_the_rewards_of_training(native, monkeypatch, game_id, changes):
    """Without sticky actions and with one frame-skip both play the same game for 200 steps: screens and rewards."""
    game = find_game(game_id, **changes)
    envs = native(game_id, size=game.screen, repeat_action_probability=0.0, **changes)
    frame, info = envs.reset(seed=3)
    watching = watched(game, monkeypatch, noops=int(info["episode_frame_number"][0]))
    screen, same_info = watching.reset(seed=3)
    assert same_info["episode_frame_number"] == info["episode_frame_number"][0]
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(frame[0, 0], screen)
    paid = 0
    for _ in range(200):
        action = int(rng.integers(game.num_actions))
        frame, reward, terminated, _, info = envs.step(np.array([action]))
        screen, same_reward, same_terminated, _, same_info = watching.step(action)
        paid += abs(same_reward)
        assert (reward[0], terminated[0]) == (same_reward, same_terminated)
        if terminated[0]:  # and the game of training has begun anew
            break
        assert info["lives"][0] == same_info["lives"]
        np.testing.assert_array_equal(frame[0, 0], screen)
    watching.close()
    assert frame.std() > 5  # there is something to see
    assert paid > 0


@pytest.mark.parametrize("game_id", ["Breakout-v0", "Pong-v0", "ALE/AirRaid-v5"])
def test_frames_that_ale_resizes_are_those_of_preprocess_to_one_grey_level(native, game_id):
    """What hosts send. Both play the same game."""
    game = find_game(game_id)
    small, large = native(game_id, 2), native(game_id, 2, size=game.screen)
    small.reset(seed=3)
    large.reset(seed=3)
    rng = np.random.default_rng(1)
    for _ in range(60):
        action = rng.integers(game.num_actions, size=2)
        frames, screens = small.step(action)[0][:, 0], large.step(action)[0][:, 0]
        assert np.abs(environment.preprocess(screens).numpy() - frames.astype(int)).max() <= 1
    assert frames.std() > 5


@pytest.mark.row(n=37)
@pytest.mark.parametrize("max_pool, seen", [(False, False), (True, True)])
def test_asteroids_are_seen_where_a_frame_is_the_maximum_of_two(native, max_pool, seen):
    """The console draws the asteroids and the ship in turns: every fourth frame shows none of them, or only them."""
    envs = native("ALE/Asteroids-v5", max_pool=max_pool)
    envs.reset(seed=1)
    bright = [np.sum(envs.step(np.array([0]))[0] > 30) for _ in range(30)][10:]  # the ship has 50 pixels
    assert min(bright) > 200 if seen else max(bright) < 100


@pytest.mark.row(n=37)
@pytest.mark.parametrize(
    "fire_reset, expected", [pytest.param(False, {0, 1, 2, 3}, marks=pytest.mark.slow), (True, {1, 2, 3})]
)
def test_a_game_begins_after_up_to_noop_max_frames_in_training_and_in_watching(native, fire_reset, expected):
    game = find_game("Breakout-v0", noop_max=3, fire_reset=fire_reset)
    _, info = native("Breakout-v0", 16, noop_max=3, fire_reset=fire_reset).reset(seed=1)
    with contextlib.closing(environment.make_watching_env(game)) as env:
        watched = [env.reset(seed=seed)[1]["episode_frame_number"] for seed in range(16)]
    assert set(info["episode_frame_number"]) == set(watched) == expected


@pytest.mark.row(n=37)
def test_fire_is_not_pressed_in_a_game_without_it(native):
    assert native("ALE/Freeway-v5", fire_reset=True).reset(seed=1)[1]["episode_frame_number"] == 0
    with contextlib.closing(environment.make_watching_env(find_game("ALE/Freeway-v5", fire_reset=True))) as env:
        assert env.reset(seed=1)[1]["episode_frame_number"] == 0


@pytest.mark.parametrize(
    "changes, skips",
    [
        ({}, {2, 3, 4}),
        ({"frameskip": 3}, {3}),
        pytest.param({"max_pool": True}, {2, 3, 4}, marks=pytest.mark.row(n=37)),
    ],
)
def test_watching_environment_has_the_registered_random_frameskip_or_the_one_asked_for(changes, skips):
    with contextlib.closing(environment.make_watching_env(find_game("Breakout-v0", **changes))) as env:
        screen, _ = env.reset(seed=1)
        frames = [0, *(env.step(0)[4]["episode_frame_number"] for _ in range(30))]
    assert (screen.shape, screen.dtype) == ((210, 160), np.uint8)
    assert set(np.diff(frames)) == skips


# The training environment.


def test_random_frameskip_takes_two_to_four_frames_for_all_games_alike_and_repeats_with_its_seed(native):
    envs, taken = native("Breakout-v0", num_envs=2, random_frameskip=True), []
    for _ in range(2):
        _, info = envs.reset(seed=5)
        frames = [info["episode_frame_number"].copy()]
        frames += [envs.step(np.zeros(2, np.int32))[4]["episode_frame_number"].copy() for _ in range(60)]
        taken.append(np.diff(frames, axis=0))
    assert set(taken[0].flat) == {2, 3, 4}
    np.testing.assert_array_equal(taken[0][:, 0], taken[0][:, 1])
    np.testing.assert_array_equal(taken[0], taken[1])


def test_random_frameskip_sums_the_rewards_of_a_step_up_to_the_end_of_a_game():
    rewards, ends = [[1, 10], [2, 20], [4, 40]], [[0, 0], [1, 0], [0, 0]]
    envs = environment.RandomFrameSkip(ScriptedEnv(rewards, ends, cuts=[[0, 0], [0, 0], [0, 1]]), 3, 3)
    envs.reset(seed=1)
    frame, reward, ended, cut, _ = envs.step(np.array([1, 3]))
    np.testing.assert_array_equal(reward, [3, 70])
    np.testing.assert_array_equal(ended, [True, False])
    np.testing.assert_array_equal(cut, [False, True])
    np.testing.assert_array_equal(frame[:, 0], envs.env.frames[3])
    np.testing.assert_array_equal(envs.env.actions, [[1, 3]] * 3)


def test_training_rewards_are_raw_scores(native):
    envs = native("SpaceInvaders-v4")
    envs.reset(seed=1)
    rng = np.random.default_rng(0)
    rewards = {float(envs.step(rng.integers(0, 6, 1))[1][0]) for _ in range(300)}
    assert max(rewards) >= 5  # the lowest row of invaders pays 5, the next 10


def test_game_that_is_cut_off_after_max_frames_restarts_in_the_same_step(native):
    envs = native("Breakout-v0", frameskip=3, max_frames=30, repeat_action_probability=0.0)
    first, _ = envs.reset(seed=1)
    assert (first.shape, first.dtype) == ((1, 1, 84, 84), np.uint8)
    for step in range(1, 21):
        frame, _, _, truncated, info = envs.step(np.array([0]))
        assert truncated[0] == (step % 10 == 0)
        assert info["episode_frame_number"][0] == 3 * step % 30
        if truncated[0]:
            np.testing.assert_array_equal(frame, first)


def test_group_of_games_is_seeded_game_by_game(native):
    def play(num_envs, seed):
        envs = native("Breakout-v0", num_envs=num_envs)
        envs.reset(seed=seed)
        return np.stack([envs.step(np.full(num_envs, 1 + step % 3))[0][:, 0] for step in range(40)])

    pair, second = play(2, 7), play(1, 8)
    np.testing.assert_array_equal(pair[:, 1], second[:, 0])
    assert np.any(pair[:, 0] != pair[:, 1])  # sticky actions are drawn by the seed


# The history.


def test_history_holds_the_last_four_frames_oldest_first_and_black_before_the_game_began():
    num_games, steps = 3, 12
    rng = np.random.default_rng(2)
    frames = rng.integers(1, 256, [steps, num_games, 84, 84], np.uint8)
    first_of_a_game = rng.random([steps, num_games]) < 0.25
    black = np.zeros([84, 84], np.uint8)
    expected = [collections.deque([black] * 4, maxlen=4) for _ in range(num_games)]
    history = environment.empty_history(num_games)
    for frame, done in zip(frames, first_of_a_game, strict=True):
        history = environment.push_frame(history, frame, done)
        for game, queue in enumerate(expected):
            if done[game]:
                queue.extend([black] * 4)
            queue.append(frame[game])
        found = environment.history_to_frames(history)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, [np.stack(queue, axis=-1) for queue in expected])
    assert first_of_a_game.any(axis=0).all()
