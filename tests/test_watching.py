"""`a3c-test.py`: how it plays, what it writes, and what it refuses before it plays."""

import collections
import importlib.util
import json
import os
import subprocess
import sys
import types
from fractions import Fraction

import av
import gymnasium
import numpy as np
import pytest
from conftest import ROOT

import checkpoint
from async_agent import Progress
from checkpoint import CheckpointError
from environment import history_to_frames, preprocess
from network import SharedNetwork
from startup import UserError, tf

spec = importlib.util.spec_from_file_location("watching", ROOT / "a3c-test.py")  # no name that `import` can say
watching = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watching)


# Actions.


def test_greedy_policy_takes_the_likeliest_action_but_for_a_share_of_random_ones():
    logits, rng = np.float32([0, 3, 1, 2]), np.random.default_rng(0)
    assert {watching.choose_action(logits, "greedy", 0.0, rng) for _ in range(100)} == {1}
    drawn = [watching.choose_action(logits, "greedy", 0.4, rng) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, [0.1, 0.7, 0.1, 0.1], atol=0.05)


def test_softmax_policy_draws_with_the_networks_probabilities():
    probabilities, rng = np.array([0.1, 0.6, 0.3]), np.random.default_rng(0)
    logits = np.log(probabilities).astype(np.float32) + 500  # a constant changes nothing
    drawn = [watching.choose_action(logits, "softmax", 0.0, rng) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, probabilities, atol=0.05)


@pytest.mark.row(n=13)
@pytest.mark.parametrize("policy", ["greedy", "softmax"])
def test_logits_that_are_not_finite_are_refused(policy):
    with pytest.raises(UserError, match="not finite"):
        watching.choose_action(np.float32([0, np.nan]), policy, 0.0, np.random.default_rng(0))


class ScriptedGame(gymnasium.Env):
    """A game of six steps that shows noise."""

    rewards = (1.0, -2.0, 4.0, -8.0, 16.0, 32.0)
    lives = (3, 3, 2, 2, 3, 2, 0)  # one is won in the fourth step

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
    histories, logits = [], np.eye(4, dtype=np.float32)

    def network(history):
        histories.append(history_to_frames(history)[0].numpy())
        return tf.constant(logits[len(histories) % 4][None]), None

    game, filmed = ScriptedGame(), []
    score, lost_at = watching.play_game(game, network, seed=1, policy="greedy", epsilon=0.0, film=filmed.append)
    assert score == 1 - 2 + 4 - 8 + 16 + 32
    assert lost_at == [1 - 2, 1 - 2 + 4 - 8 + 16, score]
    assert game.actions == [1, 2, 3, 0, 1, 2]
    queue = collections.deque([np.zeros([84, 84])] * 4, maxlen=4)
    for found, screen in zip(histories, game.screens, strict=False):
        queue.append(preprocess(screen))
        np.testing.assert_array_equal(found, np.stack(queue, axis=-1))
    assert len(histories) == len(filmed) == 6
    np.testing.assert_array_equal(filmed, game.screens[:6])


# The command.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of an untrained Breakout agent, saved after update 7."""
    folder = tmp_path_factory.mktemp("model")
    progress = Progress(1, 1)
    progress.iteration = 7
    checkpoint.Saver(str(folder), SharedNetwork(4, 0.99, seed=1), progress).save()
    (folder / "config.json").write_text('{"game": "Breakout-v0"}')
    return folder


@pytest.fixture
def main(monkeypatch, model, tmp_path):
    """Return a function that runs the command line in this process and returns its status."""

    def call(*flags):
        words = ["a3c-test.py", f"--model={model}/last.ckpt", f"--out={tmp_path}/out", "--device=cpu", *flags]
        monkeypatch.setattr(sys, "argv", words)
        return watching.main()

    return call


@pytest.fixture
def no_play(monkeypatch):
    """Let the test fail if a game is played."""
    monkeypatch.setattr(watching, "play_game", lambda *_: pytest.fail("it played"))


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_results_tell_what_was_played_and_the_score_of_every_game(main, tmp_path, monkeypatch, capsys):
    games = iter([(3.0, [1.0, 3.0]), (10.0, []), (2.0, [2.0])])
    monkeypatch.setattr(watching, "play_game", lambda *_: next(games))
    assert main("--iter=3", "--seed=40", "--epsilon=0.05", "--film=0") == 0
    found = results(tmp_path)
    assert found.pop("versions")["tensorflow"] == tf.__version__
    assert found == {
        "game": "Breakout-v0",
        "model": "last.ckpt",
        "iteration": 7,
        "policy": "greedy",
        "epsilon": 0.05,
        "frameskip": None,
        "games": 3,
        "mean": 5.0,
        "standard_deviation": 3.56,
        "median": 3.0,
        "maximum": 10.0,
        "minimum": 2.0,
        "scores": [3.0, 10.0, 2.0],
        "lives_lost_at": [[1.0, 3.0], [], [2.0]],
        "seeds": [40, 41, 42],
    }
    assert "3 games: mean 5.0, standard deviation 3.6" in capsys.readouterr().out


@pytest.mark.slow
def test_another_frameskip_is_played_filmed_and_noted(main, tmp_path):
    assert main("--iter=1", "--frameskip=6") == 0
    assert results(tmp_path)["frameskip"] == 6
    with av.open(str(tmp_path / "out" / "play.mp4")) as video:
        assert video.streams.video[0].average_rate == 10


@pytest.mark.parametrize("frameskip", [7, 121, 1000])
def test_video_is_as_fast_as_the_game_whatever_the_frameskip(tmp_path, frameskip):
    rate = Fraction(60, frameskip)
    with watching.open_video(str(tmp_path / "play.mp4"), 210, 160, rate) as film:
        for _ in range(3):
            film(np.zeros([210, 160, 3], np.uint8))
    with av.open(str(tmp_path / "play.mp4")) as video:
        assert video.streams.video[0].average_rate == rate
        times = [frame.time for frame in video.decode(video=0)]
    np.testing.assert_allclose(np.diff(times), float(1 / rate), rtol=1e-4)


def test_games_repeat_with_their_seed_and_the_video_shows_the_first(main, tmp_path, capsys):
    assert main("--iter=2", "--seed=5", "--epsilon=1", "--film=1") == 0
    first = results(tmp_path)["scores"]
    assert [len(lost) for lost in results(tmp_path)["lives_lost_at"]] == [5, 5]
    path = tmp_path / "out" / "play.mp4"
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.height, stream.width) == ("h264", 420, 320)
        assert stream.average_rate == 20  # 60 frames a second, 3 to a step
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert 100 < len(frames) < 1000
    assert all(frame.std() > 10 for frame in frames)  # walls, bricks
    path.unlink()

    assert main("--iter=1", "--seed=6", "--epsilon=1", "--film=0") == 0
    assert results(tmp_path)["scores"] == first[1:]
    assert not path.exists()


@pytest.mark.row(n=9)
def test_folder_of_a_run_is_taken_as_its_newest_checkpoint(main, model, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "play_game", lambda *_: (1.0, []))
    assert main(f"--model={model}", "--iter=1") == 0
    assert results(tmp_path)["model"] == "model.ckpt-7"


def test_interrupt_keeps_the_games_so_far(main, tmp_path, monkeypatch):
    played = []

    def play(*_):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(1)
        return 5.0, []

    monkeypatch.setattr(watching, "play_game", play)
    assert main("--iter=9") == 130
    assert results(tmp_path)["scores"] == [5.0, 5.0]


# What is refused before a game is played.


@pytest.mark.row(n=9)
def test_missing_model_ends_with_one_line_that_lists_what_is_there(model, tmp_path):
    command = [sys.executable, "a3c-test.py", f"--model={model}/best.ckpt", f"--out={tmp_path}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(
        f"a3c-test.py: error: no checkpoint {model}/best.ckpt. In {model}: {model}/model.ckpt-7, {model}/last.ckpt"
    )


@pytest.mark.row(n=10)
def test_model_of_another_number_of_actions_is_refused_with_both_numbers(main, no_play):
    with pytest.raises(CheckpointError, match="4 actions; this one has 18"):
        main("--game=Tennis-v0")


@pytest.mark.row(n=11)
def test_model_of_something_else_is_refused(main, no_play, tmp_path):
    path = tf.train.Checkpoint(step=tf.Variable(3)).write(str(tmp_path / "last.ckpt"))
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        main(f"--model={path}", "--game=Breakout-v0")


def test_model_without_a_config_needs_the_game(main, no_play, model, tmp_path):
    for suffix in (".index", ".data-00000-of-00001"):
        os.symlink(model / f"last.ckpt{suffix}", tmp_path / f"last.ckpt{suffix}")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        main(f"--model={tmp_path}/last.ckpt")


@pytest.mark.row(n=22)
def test_file_in_place_of_the_output_folder_is_an_error(main, no_play, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in ("file", "file/below"):
        with pytest.raises(UserError, match="file"):
            main(f"--out={tmp_path / folder}")


@pytest.mark.row(n=22)
def test_render_without_a_display_is_an_error_that_names_the_way_out(main, no_play, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main("--render")
    assert stopped.value.code == 2
    assert "play.mp4 instead" in capsys.readouterr().err


@pytest.mark.row(n=22)
def test_missing_video_encoder_is_an_error_that_names_the_way_out(main, no_play, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(UserError, match="--film 0"):
        main()


@pytest.mark.parametrize(
    "flag",
    [
        "--iter=0",
        "--iter=1.5",
        "--epsilon=2",
        "--epsilon=nan",
        "--seed=-1",
        "--policy=best",
        "--ite=3",
        "--frameskip=0",
    ],
)
def test_wrong_flag_exits_with_2_and_is_named(main, no_play, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        main(flag)
    assert stopped.value.code == 2
    assert flag.strip("-").partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
