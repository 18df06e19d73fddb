"""`a3c-test.py`: how it plays, what it writes, and what it refuses before it plays."""

import collections
import contextlib
import functools
import json
import shutil
import signal
import sys
import types

import av
import gymnasium
import numpy as np
import pytest
from conftest import SHIPPED, Resumable, heads, refusal, watching

import film
from environment import empty_history, history_to_frames, preprocess
from network import ActorCritic
from startup import UserError, tf


@pytest.mark.row(n=13)
@pytest.mark.parametrize("policy, expected", [("greedy", [0.1, 0.7, 0.1, 0.1]), ("softmax", [0.05, 0.6, 0.15, 0.2])])
def test_action_is_drawn_from_the_policy_or_is_the_likeliest_but_for_a_share_of_random_ones(policy, expected):
    logits, rng = np.log([0.05, 0.6, 0.15, 0.2]) + 500, np.random.default_rng(0)  # a constant changes nothing
    drawn = [watching.choose_action(logits, policy, 0.4, rng) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, expected, atol=0.05)
    with pytest.raises(UserError, match="not finite"):
        watching.choose_action(np.float32([0, np.nan]), policy, 0.0, rng)


class ScriptedGame(gymnasium.Env):
    """A game of six steps that shows noise."""

    rewards = (1.0, -2.0, 4.0, -8.0, 16.0, 32.0)
    lives = (3, 3, 2, 2, 3, 2, 0)  # one is won in the fourth step
    observation_space = gymnasium.spaces.Box(0, 255, [210, 160], np.uint8)

    def __init__(self):
        self.screens = np.random.default_rng(0).integers(0, 256, [7, 210, 160], np.uint8)
        self.ale = types.SimpleNamespace(getScreenRGB=lambda: self.screens[self.steps])
        self.actions = []

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.screens[0], {"lives": self.lives[0]}

    def step(self, action):
        self.actions.append(action)
        self.steps += 1
        info = {"lives": self.lives[self.steps]}
        return self.screens[self.steps], self.rewards[self.steps - 1], self.steps == 6, False, info


def test_game_is_played_to_its_end_on_the_last_four_frames_for_its_raw_score():
    histories, states, remembered, logits = [], [], [], np.eye(4, dtype=np.float32)

    class Network:
        def remember(self, state, action):
            remembered.extend(action)
            return state + 0.5

        def __call__(self, history, state):
            histories.append(history_to_frames(history)[0].numpy())
            states.append(float(state[0, 0]))
            likeliest = tf.tile(logits[len(histories) % 4][None], [len(history), 1])
            return likeliest, tf.fill([len(history)], len(histories) / 2), state + 1

    game, filmed, flags = ScriptedGame(), [], watching.Flags(seed=1, iter=1, epsilon=0.0)
    decide = functools.partial(watching.decide, Network())
    ((score, lives_lost_at, seed),) = watching.play_games([game], decide, tf.fill([1, 2], 9.0), flags, filmed.append)
    assert seed == 1
    assert score == 1 - 2 + 4 - 8 + 16 + 32
    assert lives_lost_at == [1 - 2, 1 - 2 + 4 - 8 + 16, score]
    assert game.actions == [1, 2, 3, 0, 1, 2]
    queue = collections.deque([np.zeros([84, 84])] * 4, maxlen=4)
    for found, screen in zip(histories, game.screens, strict=False):
        queue.append(preprocess(screen[None])[0].numpy())
        np.testing.assert_array_equal(found, np.stack(queue, axis=-1))
    assert len(histories) == 6
    assert states == [0, 1.5, 3, 4.5, 6, 7.5]
    assert remembered[1:] == game.actions[:5]
    np.testing.assert_array_equal([moment.screen for moment in filmed], game.screens[:6])
    np.testing.assert_array_equal([moment.frames for moment in filmed], histories)
    assert [moment.value for moment in filmed] == [0.5, 1, 1.5, 2, 2.5, 3]
    told = [(m.score, m.lives, m.action, m.reward, m.ended, m.life_lost) for m in filmed]
    assert told[:2] == [(0, 3, 1, 1, False, False), (1, 3, 2, -2, False, True)]
    assert told[-1] == (11, 2, 2, 32, True, True)


@pytest.fixture
def main(monkeypatch, tmp_path):
    def call(*flags):
        own = [f"--model={SHIPPED}", f"--out={tmp_path}/out", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["a3c-test.py", *own, *flags])
        return watching.main()

    return call


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.row(n=9)
def test_results_tell_what_was_played_and_the_score_of_every_game(main, tmp_path, monkeypatch, capsys):
    games, before, filmed = iter([(3.0, [1.0, 3.0]), (10.0, []), (2.0, [2.0])]), [], []

    def play_game(env, seed, policy, epsilon, film):
        before.append(results(tmp_path)["scores"])
        filmed.append(film is not None)
        yield np.zeros([210, 160], np.uint8), True, 0
        return next(games)

    monkeypatch.setattr(watching, "play_game", play_game)
    monkeypatch.setattr(watching, "ROWS", 1)
    assert main("--iter=3", "--seed=40", "--epsilon=0.05", "--frameskip=6", "--film=2") == 0
    found = results(tmp_path)
    assert found.pop("versions")["tensorflow"] == tf.__version__
    about = {"game": "Breakout-v0", "model": "last.ckpt", "iteration": 256_666}
    about |= {"max_pool": False, "noop_max": 0, "fire_reset": False}
    flags = {"policy": "greedy", "epsilon": 0.05, "frameskip": 6, "games_wanted": 3}
    figures = {"games": 3, "mean": 5, "standard_deviation": 3.56, "median": 3, "maximum": 10, "minimum": 2}
    lists = {"scores": [3, 10, 2], "lives_lost_at": [[1, 3], [], [2]], "seeds": [40, 41, 42]}
    assert found == {**about, **flags, **figures, **lists}
    assert before == [[], [], [3]]  # the next game begins before the line is written
    assert filmed == [True, True, False]
    assert "3 games: mean 5.0, standard deviation 3.6" in capsys.readouterr().out


@pytest.mark.parametrize("newest, expected", [(False, ", the average with a window of 0.1,"), (True, " updates,")])
def test_average_is_played_and_named_unless_the_newest_weights_are_asked_for(
    main, tmp_path, monkeypatch, capsys, newest, expected
):
    run = Resumable(tmp_path, filters=2, average=True)
    (tmp_path / "config.json").write_text(json.dumps({"game": "Breakout-v0", "average_window": 0.1}))
    path, played = run.save(10), []

    def play_games(envs, network, *_):
        screen, _ = envs[0].reset()
        state, actions, is_first = np.zeros([1, 0], np.float32), np.zeros(1, np.int32), np.ones(1, bool)
        played.append(network(empty_history(1), state, actions, screen[None], is_first))
        return []

    monkeypatch.setattr(watching, "play_games", play_games)
    assert main(f"--model={path}", "--iter=1", "--film=0", *["--newest"] * newest) == 0
    assert expected in capsys.readouterr().out
    assert results(tmp_path).get("average_window") == (None if newest else 0.1)
    other = Resumable(tmp_path, seed=2, filters=2)
    for mine, theirs in zip(other.shared.trainable_variables, run.shared.averages, strict=True):
        mine.assign(theirs)
    (history, _, _, value), shared = played[0], run.shared if newest else other.shared
    np.testing.assert_allclose(value, heads(shared, history)[1], rtol=1e-4)


def test_average_that_is_not_in_a_file_is_not_claimed(main, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"game": "Breakout-v0", "average_window": 0.1}))
    monkeypatch.setattr(watching, "play_games", lambda *_: [])
    assert main(f"--model={Resumable(tmp_path, filters=2).save(10)}", "--iter=1", "--film=0") == 0
    assert " updates, greedy" in capsys.readouterr().out
    assert "average_window" not in results(tmp_path)


def test_newest_weights_that_are_not_in_a_file_are_not_played(main, tmp_path, capsys):
    shutil.copytree(SHIPPED, tmp_path / "small")  # without the optimizer
    (tmp_path / "small/config.json").write_text(json.dumps({"game": "Breakout-v0", "average_window": 0.1}))
    ended = main(f"--model={tmp_path}/small", "--newest"), *capsys.readouterr()
    assert refusal(ended, "a3c-test.py").endswith("holds only the average of its run's networks")


@pytest.mark.parametrize("policy", ["softmax", pytest.param("greedy", marks=pytest.mark.slow)])
def test_game_of_a_seed_is_the_same_beside_whatever_other_games(main, tmp_path, monkeypatch, policy):
    make, played, runs = watching.make_watching_env, {}, []

    class Recorded(gymnasium.wrappers.TimeLimit):
        def reset(self, *, seed):
            self.steps = played[seed] = []
            return super().reset(seed=seed)

        def step(self, action):
            outcome = super().step(action)
            self.steps.append((action, outcome[1]))
            return outcome

    monkeypatch.setattr(
        watching, "make_watching_env", lambda game, obs_type: Recorded(make(game, obs_type=obs_type), 60)
    )
    monkeypatch.setattr(watching, "ROWS", 4)
    for first, games, films in ((0, 7, 1), (2, 1, 0), (4, 3, 2)):  # more games than rows, alone, and some filmed
        assert main(f"--policy={policy}", f"--seed={first}", f"--iter={games}", f"--film={films}") == 0
        found = results(tmp_path)
        assert found["seeds"] == sorted(played) == list(range(first, first + games))
        assert found["scores"] == [sum(reward for _, reward in played[seed]) for seed in found["seeds"]]
        runs.append(dict(played))
        played.clear()
    for run in runs[1:]:
        assert run == {seed: runs[0][seed] for seed in run}
    assert len(set(map(str, runs[0].values()))) == 7


def test_what_the_network_says_of_a_game_is_the_same_to_the_last_digit_beside_whatever_other_games():
    network = ActorCritic(4, lstm=8, last_action=True, input_scale="unit")
    network.weights["action"].assign(tf.random.stateless_normal([4, 256], [3, 4]))
    state, actions = tf.random.stateless_normal([watching.ROWS, 20], [1, 2]), np.arange(watching.ROWS) % 4
    screens = np.random.default_rng(0).integers(0, 256, [watching.ROWS, 210, 160], np.uint8)
    said = [
        watching.decide(
            network, empty_history(games), state[:games], actions[:games], screens[:games], np.zeros(games, bool)
        )
        for games in (1, 3, watching.ROWS)
    ]
    for of_one, of_three, of_all in zip(*said, strict=True):
        np.testing.assert_array_equal(of_one, of_all[:1])
        np.testing.assert_array_equal(of_three, of_all[:3])


@pytest.mark.parametrize("frameskip", [7, 121, 1000])
def test_video_is_as_fast_as_the_game_whatever_the_frameskip(tmp_path, frameskip):
    with film.open_video(str(tmp_path / "play.mp4"), 210, 160, frameskip) as show:
        for _ in range(3):
            show(np.zeros([210, 160, 3], np.uint8))
    with av.open(str(tmp_path / "play.mp4")) as video:
        times = [frame.time for frame in video.decode(video=0)]
    np.testing.assert_allclose(np.diff(times), frameskip / 60, rtol=1e-4)


def test_games_repeat_with_their_seed_and_the_video_shows_the_first(main, tmp_path):
    assert main("--iter=2", "--seed=5", "--epsilon=1") == 0
    first, path = results(tmp_path), tmp_path / "out" / "play.mp4"
    assert [len(lost) for lost in first["lives_lost_at"]] == [5, 5]
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.height, stream.width) == ("h264", 420, 320)
        assert stream.average_rate == 20  # 60 frames a second, 3 to a step
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert 100 < len(frames) < 1000
    assert all(frame.std() > 10 for frame in frames)  # walls, bricks
    path.unlink()

    assert main("--iter=1", "--seed=6", "--epsilon=1", "--film=0") == 0
    assert results(tmp_path)["scores"] == first["scores"][1:]
    assert not path.exists()

    assert main("--iter=1", "--seed=6", "--epsilon=1", "--explain") == 0
    with av.open(str(path)) as video:
        assert video.streams.video[0].width == film.WIDTH


@pytest.mark.row(n=26)
def test_signal_ends_the_game_in_play_and_keeps_those_before(main, tmp_path, monkeypatch, capsys):
    game, choose = ScriptedGame(), watching.choose_action

    def choose_action(*words):
        if len(game.actions) == 8:  # in the third step of the second game
            signal.raise_signal(signal.SIGTERM)
        return choose(*words)

    monkeypatch.setattr(watching, "choose_action", choose_action)
    monkeypatch.setattr(watching, "make_watching_env", lambda *_, **__: game)
    monkeypatch.setattr(watching, "ROWS", 1)
    assert main("--iter=9", "--film=0") == 128 + 15
    assert "stopped before all 9 games" in capsys.readouterr().out
    assert results(tmp_path)["scores"] == [sum(game.rewards)]
    assert len(game.actions) == 9


@pytest.mark.parametrize(
    "flags, said",
    [
        pytest.param("--model={0}/x", "no checkpoint {0}/x. In {0}: {0}/last.ckpt", marks=pytest.mark.row(n=9)),
        pytest.param("--game=Tennis-v0", "4 actions; this one has 18", marks=pytest.mark.row(n=10)),
        pytest.param("--model={0}/foreign --game=Breakout-v0", "{0}/foreign", marks=pytest.mark.row(n=11)),
        ("--model={0}/last.ckpt", "there is no {0}/config.json"),
        pytest.param("--out={0}/file", "{0}/file", marks=pytest.mark.row(n=22)),
        pytest.param("--out={0}/file/below", "{0}/file", marks=pytest.mark.row(n=22)),
        pytest.param("--out={0}/results", "{0}/results/results.json", marks=pytest.mark.row(n=22)),
        pytest.param("--out={0}/play", "{0}/play/play.mp4", marks=pytest.mark.row(n=22)),
        pytest.param("", "--film 0", marks=pytest.mark.row(n=22)),  # the encoder is missing
    ],
)
def test_what_cannot_be_played_is_one_line_before_any_game(main, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(watching, "play_game", lambda *_: pytest.fail("it played"))
    if said == "--film 0":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    tf.train.Checkpoint(step=tf.Variable(3)).write(str(tmp_path / "foreign"))
    (tmp_path / "file").write_text("in the way")
    for folder in ("results/results.json", "play/play.mp4"):
        (tmp_path / folder).mkdir(parents=True)
    ended = main("--iter=1", *flags.format(tmp_path).split()), *capsys.readouterr()
    assert said.format(tmp_path) in refusal(ended, "a3c-test.py")


@pytest.mark.row(n=22)
def test_results_stay_where_no_film_can_be_made(main, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "play_game", lambda *_: pytest.fail("it played"))
    (tmp_path / "out/play.mp4").mkdir(parents=True)
    (tmp_path / "out/results.json").write_text("of an evening")
    assert main("--iter=1") == 1
    assert (tmp_path / "out/results.json").read_text() == "of an evening"


@pytest.mark.row(n=22)
def test_folder_into_which_another_process_writes_is_refused(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "play_game", lambda *_: pytest.fail("it played"))
    (tmp_path / "out").mkdir()
    with contextlib.ExitStack() as stack:
        watching.keep_to_this_process(str(tmp_path / "out"), stack)
        ended = main("--iter=1"), *capsys.readouterr()
        assert refusal(ended, "a3c-test.py").startswith(f"--out: another a3c-test.py writes into '{tmp_path}/out'")
    with contextlib.ExitStack() as stack:
        watching.keep_to_this_process(str(tmp_path / "out"), stack)


@pytest.mark.parametrize("flag", ["--iter=0", "--epsilon=nan", "--seed=-1", "--policy=best", "--ite=3"])
def test_wrong_flag_exits_with_2_and_is_named(main, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        main(flag)
    assert stopped.value.code == 2
    assert flag.strip("-").partition("=")[0] in capsys.readouterr().err
