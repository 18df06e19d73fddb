"""Saving and resuming, and what damage, a full disk or a wrong file may not break."""

import errno
import functools
import json
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, Resumable, equal, files, heads

import checkpoint
import settings
from checkpoint import DATA, INDEX
from network import CONVOLUTIONS, SharedNetwork
from progress import Progress
from startup import UserError, tf

RECURRENT = {"lstm": 5, "input_scale": "unit"}
small = functools.partial(Resumable, filters=1)


@pytest.fixture
def saved(tmp_path):
    """Return a run that saved after updates 10, 20 and 30, and its state at each."""
    run, states = small(tmp_path), {}
    for iteration in (10, 20, 30):
        run.save(iteration)
        states[iteration] = run.state()
    return run, states


@pytest.mark.parametrize("options", [{}, {"filters": 1, "optimizer": "adam", **RECURRENT}])
def test_resumed_run_has_all_that_was_saved_and_goes_on_as_if_it_had_not_stopped(tmp_path, options):
    run, other = Resumable(tmp_path, **options), Resumable(tmp_path, seed=2, **options)
    assert other.resume() is None
    run.progress.episodes, run.progress.seconds, run.progress.scores[1] = 7, 1000.0, [5, 6.5, np.nan]
    path = run.save(20)
    assert path == str(tmp_path / "model.ckpt-20")
    assert not equal(other.state(), run.state())
    other.progress.started -= 500  # seconds of this process before it resumed
    assert other.resume() == path
    assert equal(other.state(), run.state())
    progress = other.progress
    assert (progress.iteration, progress.agent_steps, progress.episodes) == (20, 200, 7)
    assert 1000 <= progress.total_seconds() < 1100
    assert sorted(progress.recent_scores()) == [5, 6.5]
    assert other.warnings == []
    for each in (run, other):
        each.update(40)
    assert equal(other.state(), run.state())


@pytest.mark.parametrize("num_groups, num_envs", [(1, 2), (4, 8)])
def test_scores_are_taken_over_by_another_number_of_environments(num_groups, num_envs):
    old, new = Progress(1, 4), Progress(num_groups, num_envs)
    old.scores[0] = [1, 2, 3, 4]
    new.deserialize(old.serialize())
    np.testing.assert_array_equal(new.recent_scores(), [1, 2, 3, 4][: num_groups * num_envs])


def test_newest_three_checkpoints_are_kept_and_a_copy_of_the_newest(tmp_path):
    run = small(tmp_path)
    for iteration in (5, 10, 20, 100, 90_000):
        run.save(iteration)
    kept, found = [f"model.ckpt-{number}" for number in (90_000, 100, 20)], files(tmp_path)
    assert checkpoint.numbered(str(tmp_path)) == [str(tmp_path / name) for name in kept]
    assert found.keys() == {name + suffix for name in ("last.ckpt", *kept) for suffix in (DATA, INDEX)}
    assert all(found["last.ckpt" + suffix] == found["model.ckpt-90000" + suffix] for suffix in (DATA, INDEX))


@pytest.mark.parametrize(
    "layers",
    [
        {"filters": 8},
        {},
        {"filters": 40},
        {"filters": 8, "background": 87},
        {"filters": 8, "input_scale": "unit"},
        {"filters": 8, "network": "pooled"},
        {"filters": 8, "network": "deep"},
        {"filters": 8, "background": 87, **RECURRENT},
        {"filters": 8, "last_action": True},
        {"filters": 8, "last_action": True, **RECURRENT},
    ],
)
def test_network_is_loaded_as_it_was_saved(tmp_path, layers):
    run = Resumable(tmp_path, **layers)
    network, iteration = checkpoint.load_network(run.save(7), 4)
    assert iteration == 7
    history = tf.constant(np.random.default_rng(0).integers(0, 2**32, [2, 84, 84], np.uint32))
    for mine, theirs in zip(heads(network, history), heads(run.shared, history), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_of_networks_with_weights_of_the_same_shapes_it_is_the_one_that_the_run_had(tmp_path, monkeypatch):
    """As where a user adds one to CONVOLUTIONS."""
    monkeypatch.setitem(CONVOLUTIONS, "twin", [(5, 4, 1, False), *CONVOLUTIONS["deep"][1:]])
    monkeypatch.setitem(CONVOLUTIONS, "mine", [(5, 2, 1, True), (3, 1, 2, False)])
    monkeypatch.setitem(CONVOLUTIONS, "wide", [(7, 2, 1, True), (3, 1, 2, False)])
    (tmp_path / "config.json").write_text(json.dumps({"game": "Pong-v0", "network": "twin"}))
    for name in ("twin", "mine", "wide"):
        path = Resumable(tmp_path, filters=8, network=name).save(7)
        assert checkpoint.load_network(path, 4)[0].kind == name
    path = Resumable(tmp_path, filters=8, network="deep").save(7)
    assert checkpoint.load_network(path, 4)[0].kind == "twin"  # as it says
    (tmp_path / "config.json").unlink()
    assert checkpoint.load_network(path, 4)[0].kind == "deep"


def test_save_is_kept_whatever_number_others_have_been_given(saved, tmp_path):
    for number in (7000, 8000, 9000):
        for suffix in (INDEX, DATA):
            shutil.copy(tmp_path / f"model.ckpt-20{suffix}", tmp_path / f"model.ckpt-{number}{suffix}")
    path = small(tmp_path).save(40)
    assert path in checkpoint.numbered(str(tmp_path))


def test_average_of_a_run_is_played_and_goes_on_with_it(tmp_path):
    run = small(tmp_path, average=True)
    run.update(1)
    run.shared.update_averages(0.5)
    path = run.save(2)
    assert not equal(run.shared.averages, run.shared.trainable_variables)
    for newest, expected in ((False, run.shared.averages), (True, run.shared.trainable_variables)):
        assert equal(checkpoint.load_network(path, 4, newest)[0].trainable_variables, expected)
    other = small(tmp_path, seed=2, average=True)
    assert other.resume() == path
    assert equal(other.state(), run.state())


def test_average_can_begin_and_end_where_a_run_is_resumed(tmp_path):
    path = small(tmp_path).save(2)
    begun = small(tmp_path, seed=2, average=True)
    assert begun.resume() == path
    assert equal(begun.shared.averages, begun.shared.trainable_variables)
    begun.update(4)
    path = begun.save(6)
    assert not equal(begun.shared.averages, begun.shared.trainable_variables)
    ended = small(tmp_path, seed=3)
    assert ended.resume() == path
    assert equal(ended.shared.trainable_variables, begun.shared.trainable_variables)
    assert equal(checkpoint.load_network(ended.save(8), 4)[0].trainable_variables, ended.shared.trainable_variables)


def test_agent_saved_without_optimizer_and_average_is_resumed_with_new_ones(tmp_path):
    run = small(tmp_path, average=True)
    run.update(7)
    weights, biases = run.shared.weights, run.shared.biases
    path = tf.train.Checkpoint(weights=weights, biases=biases, progress=run.progress).write(str(tmp_path / "last.ckpt"))
    other = small(tmp_path, seed=2, average=True)
    assert other.resume() == path
    assert other.progress.iteration == 7
    for mine in (other.shared.trainable_variables, other.shared.averages):
        assert equal(mine, run.shared.trainable_variables)
    assert equal(other.shared.mean_squares, [np.ones(v.shape) for v in other.shared.trainable_variables])
    other.update(9)
    path, state = other.save(9), other.state()
    assert small(tmp_path, seed=3, average=True).resume() == path
    assert equal(other.state(), state)


@pytest.mark.parametrize(
    "agent, num_actions, options",
    [
        ("breakout-v0", 4, {"network": "deep", "last_action": True, "input_scale": "unit", "average": True}),
        ("breakout-v0-fast", 4, {}),
        ("breakout-noframeskip-v4", 4, {}),
        ("spaceinvaders-noframeskip-v4", 6, {}),
        ("pong-v0", 6, {"background": 87}),
    ],
)
def test_shipped_agent_is_played_and_resumed(tmp_path, agent, num_actions, options):
    path = checkpoint.resolve(shutil.copytree(ROOT / "models" / agent, str(tmp_path / agent)))
    other = Resumable(tmp_path / agent, num_actions=num_actions, filters=16, **options)
    assert other.resume() == path
    network, iteration = checkpoint.load_network(path, num_actions, newest=True)
    assert other.progress.iteration == iteration > 10_000
    assert equal(other.shared.trainable_variables, network.trainable_variables)
    played, _ = checkpoint.load_network(path, num_actions)
    assert equal(other.shared.averages or other.shared.trainable_variables, played.trainable_variables)


def test_what_a_checkpoint_holds_is_listed_and_one_that_its_run_has_replaced_is_refused(saved, tmp_path):
    assert checkpoint.kinds_in(str(tmp_path / "last.ckpt")) >= {"weights", "biases", "mean_squares", "progress"}
    with pytest.raises(UserError, match=r"^cannot read .*model\.ckpt-5: "):
        checkpoint.kinds_in(str(tmp_path / "model.ckpt-5"))


@pytest.mark.row(n=27)
def test_newest_checkpoint_of_a_folder_is_played_and_resumed_not_an_older_last(saved, tmp_path):
    for suffix in (INDEX, DATA):
        shutil.copy(tmp_path / f"model.ckpt-20{suffix}", tmp_path / f"last.ckpt{suffix}")
    assert checkpoint.load_network(checkpoint.resolve(str(tmp_path)), 4)[1] == 30
    assert small(tmp_path).resume() == str(tmp_path / "model.ckpt-30")
    for left in (["model.ckpt-20", "last.ckpt"], ["last.ckpt", "model.ckpt-10"]):
        newest = checkpoint.numbered(str(tmp_path))[0]
        for suffix in (INDEX, DATA):
            (tmp_path / (newest + suffix)).unlink()
        assert checkpoint.all_checkpoints(str(tmp_path))[:2] == [str(tmp_path / name) for name in left]


@pytest.mark.row(n=27)
def test_folder_of_a_run_that_saves_all_the_time_can_be_watched_at_any_moment(tmp_path):
    run, over = Resumable(tmp_path, filters=4), threading.Event()
    run.save(1)

    def save():
        while not over.wait(0.3):
            run.save(run.progress.iteration + 1)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        seen, end = [], time.monotonic() + 60
        while len(seen) < 30 or seen[-1] < seen[0] + 3:
            assert time.monotonic() < end
            seen.append(checkpoint.load_network(checkpoint.resolve(str(tmp_path)), 4)[1])
    finally:
        over.set()
        thread.join()
    assert seen == sorted(seen)


POINTS = range(20)
DAMAGES = [f"{how} {point}" for how in ("truncated", "flipped") for point in POINTS] + ["emptied", "removed"]


def damage(path, how):
    """Damage a file: cut off or with one bit flipped at one of 20 points from its first byte to its last, or worse."""
    kind, _, point = how.partition(" ")
    content = bytearray(path.read_bytes())
    position = int(point or 0) * (len(content) - 1) // POINTS[-1]
    if kind == "flipped":
        content[position] ^= 1 << position % 8
    path.write_bytes(content if kind == "flipped" else content[: position if kind == "truncated" else 0])
    if kind == "removed":
        path.unlink()


@pytest.mark.row(n=8)
@pytest.mark.row(n=11)
@pytest.mark.parametrize("suffix", [INDEX, DATA])
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damage_is_named_and_the_checkpoint_before_resumed_and_nothing_watched(saved, tmp_path, suffix, how):
    other = small(tmp_path, seed=2)
    for name, fallback in (("model.ckpt-30", "last.ckpt"), ("last.ckpt", "model.ckpt-20")):
        damage(tmp_path / (name + suffix), how)
        try:
            checkpoint.load_network(str(tmp_path / name), 4)
        except UserError as error:
            assert name in str(error)
            harmless = False
        else:
            harmless = True
        resumed = other.resume()
        assert checkpoint.resolve(str(tmp_path)) == resumed  # what is damaged counts no more
        if other.warnings:
            assert not harmless
            assert str(tmp_path / "model.ckpt-30") in other.warnings[0]
        else:  # a bit that means nothing: the index ends with some
            assert how.startswith("flipped") and suffix == INDEX
            fallback = "model.ckpt-30"
        assert resumed == str(tmp_path / fallback)
        assert other.progress.iteration == (20 if fallback == "model.ckpt-20" else 30)
        assert equal(other.state(), saved[1][other.progress.iteration])


@pytest.mark.row(n=8)
def test_damaged_checkpoint_is_kept_under_another_name_and_takes_no_place_of_a_sound_one(saved, tmp_path):
    content = (tmp_path / f"model.ckpt-30{DATA}").read_bytes()[:-1]
    for name in ("model.ckpt-30", "last.ckpt"):
        (tmp_path / (name + DATA)).write_bytes(content)
    other = small(tmp_path, seed=2)
    assert other.resume() == str(tmp_path / "model.ckpt-20")
    for iteration in (21, 22):  # the one damaged at 30 would be the newest still
        other.save(iteration)
        assert checkpoint.resolve(str(tmp_path)) == str(tmp_path / f"model.ckpt-{iteration}")
    assert [os.path.basename(path) for path in checkpoint.numbered(str(tmp_path))] == [
        f"model.ckpt-{n}" for n in (22, 21, 20)
    ]
    assert (tmp_path / f"damaged-model.ckpt-30{DATA}").read_bytes() == content
    assert other.resume() == str(tmp_path / "model.ckpt-22")


def test_weights_of_a_game_with_another_background_are_taken(tmp_path):
    path = small(tmp_path / "bright", background=87).save(10)
    dark, bright = (SharedNetwork(4, 0.99, 1, filters=1, background=grey) for grey in (0, 30))
    for network in (dark, bright):
        assert checkpoint.load_weights(path, network) == 10
    np.testing.assert_array_equal(dark.weights["conv1"], bright.weights["conv1"])
    assert float(bright.biases["input"]) == -30


@pytest.mark.row(n=8)
@pytest.mark.row(n=11)
def test_resume_refuses_where_every_checkpoint_is_damaged_or_of_something_else(saved, tmp_path):
    for path in tmp_path.glob("*.index"):
        damage(path, "emptied")
    unrelated = tf.train.Checkpoint(step=tf.Variable(3)).write(str(tmp_path / "model.ckpt-50"))
    other = small(tmp_path, seed=2)
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete"):
        other.resume()
    assert len(other.warnings) == 5
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.load_network(unrelated, 4)


@pytest.mark.row(n=8)
@pytest.mark.parametrize("how", ["truncated 10", "flipped 10"])
def test_save_that_cannot_be_read_back_raises_and_leaves_the_earlier_checkpoints(saved, tmp_path, monkeypatch, how):
    write, before = tf.train.Checkpoint.write, files(tmp_path)

    def write_badly(self, path):
        write(self, path)
        damage(tmp_path / (path + DATA), how)

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_badly)
    with pytest.raises(UserError, match="is damaged"):
        saved[0].save(40)
    assert files(tmp_path) == before


@pytest.mark.row(n=5)
def test_half_written_files_are_removed_by_a_resume_and_do_not_keep_the_next_save_from_saving(saved, tmp_path):
    (run, _), complete = saved, files(tmp_path)

    def leave_half_written():
        (tmp_path / ".unfinished/model_temp").mkdir(parents=True)  # where TensorFlow writes first
        for name in ("model_temp/part-0", "model" + DATA, "model" + INDEX, "../model.ckpt-40" + DATA):
            (tmp_path / ".unfinished" / name).write_bytes(b"half")

    leave_half_written()
    assert run.resume() == str(tmp_path / "model.ckpt-30")
    assert files(tmp_path) == complete
    (text,) = run.warnings
    assert "model.ckpt-40" in text
    leave_half_written()
    run.save(40)
    assert small(tmp_path).resume() == str(tmp_path / "model.ckpt-40")
    assert len(files(tmp_path)) == len(complete)


@pytest.mark.row(n=13)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_never_saved(saved, tmp_path, value):
    (run, _), before = saved, files(tmp_path)
    run.shared.biases["policy"].assign(tf.fill([4], value))
    run.progress.iteration = 40
    with pytest.raises(FloatingPointError, match="iteration 40: not finite: policy_bias"):
        run.saver.save()
    assert files(tmp_path) == before


@pytest.mark.row(n=6)
def test_disk_that_is_full_before_the_copy_to_last_leaves_the_old_last(saved, tmp_path, monkeypatch):
    def fill_up(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    with pytest.raises(UserError, match=f"^cannot save {tmp_path}/model.ckpt-40, earlier saves are intact: .*No space"):
        saved[0].save(40)
    assert [checkpoint.read(str(tmp_path / name))[1] for name in ("last.ckpt", "model.ckpt-40")] == [30, 40]
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.row(n=10)
@pytest.mark.row(n=11)
@pytest.mark.row(n=20)
@pytest.mark.parametrize(
    "saved, now, said",
    [
        ({}, {"num_actions": 6}, "of a game with 4 actions; this one has 6"),
        ({"num_actions": 18}, {}, "of a game with 18 actions; this one has 4"),
        ({"filters": 8}, {}, "of another network. It needs --filters 8, or another --log_dir for a new run"),
        ({"background": 0}, {"background": 87}, "of another network. It needs --subtract_background False,"),
        ({"background": 87}, {"background": 0}, "of another network. It needs --subtract_background True,"),
        (RECURRENT, {"input_scale": "unit"}, "of another network. It needs --lstm 5,"),
        ({"input_scale": "unit"}, RECURRENT, "of another network. It needs --lstm 0,"),
        (RECURRENT, {**RECURRENT, "lstm": 6}, "of another network. It needs --lstm 5,"),
        ({"input_scale": "unit"}, {}, "of another network. It needs --input_scale unit,"),
        ({}, {"input_scale": "unit"}, "of another network. It needs --input_scale raw,"),
        ({}, {"last_action": True}, "of another network. It needs --last_action False,"),
        ({"last_action": True}, {}, "of another network. It needs --last_action True,"),
        ({}, {"network": "pooled"}, "of another network. It needs --network original,"),
        ({"network": "pooled"}, {}, "of another network. It needs --network pooled,"),
        ({"network": "pooled"}, {"network": "deep"}, "of another network. It needs --network pooled,"),
        ({"network": "deep"}, {"network": "pooled"}, "of another network. It needs --network deep,"),
        (
            {"network": "deep", "last_action": True, **RECURRENT},
            {},
            "of another network. It needs --network deep --input_scale unit --lstm 5 --last_action True,",
        ),
    ],
)
def test_checkpoint_of_another_network_is_refused_by_name(tmp_path, saved, now, said):
    path = Resumable(tmp_path, **{"filters": 4, **saved}).save(30)
    other = Resumable(tmp_path, seed=2, filters=4, **now)
    before = other.state()
    with pytest.raises(UserError, match="^" + re.escape(f"{path} is {said}")):
        other.resume()
    assert equal(other.state(), before)
    if "actions" in said:
        with pytest.raises(UserError, match=said):
            checkpoint.load_network(path, other.shared.num_actions)


@pytest.mark.parametrize("was, now", [("rmsprop", "adam"), ("adam", "rmsprop")])
def test_checkpoint_of_another_optimizer_is_refused(tmp_path, was, now):
    path = small(tmp_path, optimizer=was).save(30)
    other = small(tmp_path, seed=2, optimizer=now)
    before = other.state()
    with pytest.raises(UserError, match=f"^optimizer = '{now}': {re.escape(path)} was trained with '{was}'"):
        other.resume()
    assert equal(other.state(), before)
    assert checkpoint.load_weights(path, other.shared) == 30


@pytest.mark.row(n=9)
def test_folder_index_and_data_file_are_resolved_and_a_missing_checkpoint_lists_what_is_there(saved, tmp_path):
    path = str(tmp_path / "model.ckpt-20")
    assert [checkpoint.resolve(path + suffix) for suffix in ("", INDEX, DATA)] == [path] * 3
    assert checkpoint.resolve(str(tmp_path)) == str(tmp_path / "model.ckpt-30")
    with pytest.raises(UserError, match=r"no checkpoint .*best\.ckpt.*model\.ckpt-30, .*last\.ckpt, .*model\.ckpt-20"):
        checkpoint.resolve(str(tmp_path / "best.ckpt"))
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "empty/last.ckpt", "nowhere/last.ckpt"):
        with pytest.raises(UserError, match="no checkpoint there"):
            checkpoint.resolve(str(tmp_path / missing))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1}', None])
def test_config_that_is_missing_or_damaged_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        settings.read_config(str(path))
