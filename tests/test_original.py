"""Checkpoints of the original program: played, and the beginning of new runs, as those of this program are too."""

import json
import sys

import gymnasium
import numpy as np
import pytest
from conftest import Resumable, equal, heads, refusal, watching

import checkpoint
from original import OriginalFrames
from startup import UserError, tf


def write_original(path, frames, without=""):
    """Write a checkpoint as the original does, at `path`-600000; return its logits and values for frames."""
    v1, rng = tf.compat.v1, np.random.default_rng(0)
    shapes = {"conv1": [8, 8, 4, 32], "conv2": [4, 4, 32, 64], "linear1": [7744, 256]}
    heads = {"linear-policy": [256, 4], "linear-value": [256, 1]}
    outputs, saved = [], {}
    with tf.Graph().as_default(), v1.Session() as session:
        x = tf.constant(frames, tf.float32)
        for layer, shape in {**shapes, **heads}.items():
            w = saved[f"master/{layer}/w"] = v1.Variable(rng.normal(0, 0.02, shape).astype(np.float32))
            b = saved[f"master/{layer}/b"] = v1.Variable(rng.normal(0, 0.1, shape[-1:]).astype(np.float32))
            if "conv" in layer:
                x = tf.nn.relu(tf.nn.conv2d(x, w, 4 if layer == "conv1" else 2, "SAME") + b)
            elif layer == "linear1":
                x = tf.nn.relu(tf.reshape(x, [len(frames), -1]) @ w + b)
            else:
                outputs.append(x @ w + b)
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver({name: saved[name] for name in saved if name != without})
        saver.save(session, str(path), global_step=600_000)
        return session.run(outputs)


def test_checkpoint_of_the_original_gives_the_logits_and_values_that_it_gave_there(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, [3, 84, 84, 4], np.uint8)
    logits, values = write_original(tmp_path / "model.ckpt", frames)
    path = checkpoint.resolve(str(tmp_path))
    assert "master" in checkpoint.kinds_in(path)
    network, iteration = checkpoint.load_network(path, 4)
    assert iteration == 600_000
    found = heads(network, tf.bitcast(frames, tf.uint32))
    np.testing.assert_allclose(found[0], logits, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found[1], values[:, 0], rtol=1e-5, atol=1e-4)
    assert np.ptp(logits) > 1


@pytest.mark.row(n=11)
@pytest.mark.parametrize("without, said", [("linear-policy/b", "biases/policy"), ("conv2/w", "weights/conv2")])
def test_incomplete_checkpoint_of_the_original_is_refused(tmp_path, without, said):
    write_original(tmp_path / "model.ckpt", np.zeros([1, 84, 84, 4]), f"master/{without}")
    with pytest.raises(UserError, match=rf"of another network\. {said} has shape None there"):
        checkpoint.load_network(str(tmp_path / "model.ckpt-600000"), 4)
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete"):
        Resumable(tmp_path).resume()


def test_frames_are_the_luminance_cut_off_and_made_small_by_a_bilinear_filter():
    frames = OriginalFrames(gymnasium.Env())
    for colour, grey in (((255, 0, 0), 54), ((0, 255, 0), 182), ((0, 0, 255), 18), ((100, 100, 101), 100)):
        np.testing.assert_array_equal(frames.observation(np.full([210, 160, 3], colour, np.uint8)), grey)
    screen = np.zeros([210, 160, 3], np.uint8)
    screen[100, 80] = 255  # a ball of one pixel is not lost between two others
    small = frames.observation(screen).astype(int)
    assert small.shape == (84, 84)
    assert np.argwhere(small).tolist() == [[39, 41], [39, 42], [40, 41], [40, 42]]
    assert small.sum() == pytest.approx(255 * 84 * 84 / (210 * 160), abs=3)


def test_it_is_played_with_its_own_frames_and_says_so(tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "model.ckpt", np.zeros([1, 84, 84, 4]))
    seen = []

    def play_game(env, *_):
        seen.append(env.reset(seed=0)[0])
        yield seen[0], True, 0
        return 3.0, []

    monkeypatch.setattr(watching, "play_game", play_game)
    flags = ["--game=Breakout-v0", "--device=cpu", "--iter=1", "--film=0", f"--out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["a3c-test.py", f"--model={tmp_path}/model.ckpt-600000", *flags])
    assert watching.main() == 0
    assert "after 600,000 updates" in (printed := capsys.readouterr().out)
    assert "a checkpoint of the original. Its frames are made by luminance and bilinear resize" in printed
    assert "bilinear" in json.loads((tmp_path / "out" / "results.json").read_text())["preprocessing"]
    assert (seen[0].shape, seen[0].dtype) == ((84, 84), np.uint8)


@pytest.mark.parametrize("kind", ["ours", "original"])
def test_new_run_begins_with_the_weights_and_nothing_else(tmp_path, play, kind):
    if kind == "ours":
        path = Resumable(tmp_path / "before").save(900)
    else:
        write_original(tmp_path / "model.ckpt", np.zeros([1, 84, 84, 4]))
        path = str(tmp_path / "model.ckpt-600000")
    weights, updates = checkpoint.read(path, or_original=True)
    flags = "--max_iteration=1", "--filters=32"
    status, printed, errors = play(*flags, f"--initial_model={path}", "--learning_rate=1e-30")
    assert (status, f"weights of {path} after {updates:,} updates; all else is new" in printed) == (0, True), errors
    tensors, iteration = checkpoint.read(f"{tmp_path}/run/last.ckpt")
    assert iteration == 1
    names = [name for name in weights if name.startswith(("weights/", "biases/"))]
    assert len(names) == 10
    assert equal([tensors[name] for name in names], [weights[name] for name in names])
    assert all((x >= 0.99).all() and np.median(x) < 1 for name, x in tensors.items() if "mean_squares" in name)

    status, printed, _ = play(*flags, f"--initial_model={tmp_path}/none")  # and is resumed, with nothing left to do
    assert (status, "initial_model is for new runs only" in printed) == (0, True)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--initial_model={0} --filters=8", "{0}/model.ckpt-900 is of another network"),
        ("--initial_model={0} --game=Pong-v0", "{0}/model.ckpt-900 is of a game with 4 actions; this one has 6"),
        ("--initial_model={0}/none", "no checkpoint {0}/none"),
    ],
)
def test_initial_model_that_cannot_be_had_is_one_line(tmp_path, main, no_training, flags, said):
    Resumable(tmp_path).save(900)
    assert refusal(main(f"--log_dir={tmp_path}/run", *flags.format(tmp_path).split())).startswith(said.format(tmp_path))
