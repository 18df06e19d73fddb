"""Saving, resuming, and what a crash, a full disk or a wrong file may not break."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import groups
from async_agent import Progress
from checkpoint import CheckpointError, Saver
from network import SharedNetwork
from startup import UserError, tf

DATA, INDEX = ".data-00000-of-00001", ".index"


class Run:
    """A network, its progress and the saver of both; no two runs of different seeds have equal weights."""

    def __init__(self, folder, seed=1, num_actions=4, keep=3, filters=32, background=0):
        self.shared = SharedNetwork(num_actions, 0.99, seed, filters=filters, background=background)
        self.progress = Progress(2, 3)
        self.saver = Saver(str(folder), self.shared, self.progress, keep)
        self.warnings = []

    def update(self, iteration):
        """Change weights, RMSProp's slots and progress as training would."""
        gradients = [tf.fill(v.shape, 0.3) for v in self.shared.trainable_variables]
        self.shared.apply_gradients(gradients, np.float32(1e-3))
        self.progress.iteration = iteration
        self.progress.agent_steps = iteration * 10

    def resume(self):
        return self.saver.resume(warn=self.warnings.append)

    def state(self):
        return [v.numpy() for v in (*self.shared.trainable_variables, *self.shared.mean_squares)]


def equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.fixture
def saved(tmp_path):
    """Return a run that saved after updates 10, 20 and 30, and its state at each."""
    run, states = Run(tmp_path), {}
    for iteration in (10, 20, 30):
        run.update(iteration)
        run.saver.save()
        states[iteration] = run.state()
    return run, states


# Round trip.


def test_resume_restores_weights_rmsprop_and_progress(tmp_path):
    run = Run(tmp_path)
    run.update(20)
    run.progress.episodes = 7
    run.progress.scores[1] = [5, 6.5, np.nan]
    path = run.saver.save()
    assert path == str(tmp_path / "model.ckpt-20")

    other = Run(tmp_path, seed=2)
    assert not equal(other.state(), run.state())
    assert other.resume() == path
    assert equal(other.state(), run.state())
    progress = other.progress
    assert (progress.iteration, progress.agent_steps, progress.episodes) == (20, 200, 7)
    assert sorted(progress.recent_scores()) == [5, 6.5]
    assert other.warnings == []


def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(saved, tmp_path):
    run, _ = saved
    other = Run(tmp_path, seed=2)
    other.resume()
    for each in (run, other):
        each.update(40)
    assert equal(other.state(), run.state())


def test_resume_counts_the_seconds_of_earlier_runs(tmp_path):
    run = Run(tmp_path)
    run.progress.seconds = 1000.0
    run.saver.save()
    other = Run(tmp_path)
    other.progress.started -= 500  # of this process, before it resumed
    other.resume()
    assert 1000 <= other.progress.total_seconds() < 1100


@pytest.mark.parametrize("num_groups, num_envs", [(1, 2), (4, 8)])
def test_scores_are_taken_over_by_another_number_of_environments(num_groups, num_envs):
    old, new = Progress(1, 4), Progress(num_groups, num_envs)
    old.scores[0] = [1, 2, 3, 4]
    new.deserialize(old.serialize())
    np.testing.assert_array_equal(new.recent_scores(), [1, 2, 3, 4][: num_groups * num_envs])


def test_resume_of_an_empty_folder_starts_afresh(tmp_path):
    run = Run(tmp_path)
    before = run.state()
    assert run.resume() is None
    assert equal(run.state(), before)


def test_newest_three_checkpoints_are_kept(tmp_path):
    run = Run(tmp_path)
    for iteration in (5, 10, 20, 100, 90_000):
        run.update(iteration)
        run.saver.save()
    assert [os.path.basename(p) for p in checkpoint.numbered(str(tmp_path))] == [
        "model.ckpt-90000",
        "model.ckpt-100",
        "model.ckpt-20",
    ]
    assert len(list(tmp_path.glob("model.ckpt-*"))) == 3 * 2  # data and index of each


def test_last_checkpoint_is_a_copy_of_the_newest(saved, tmp_path):
    run, _ = saved
    run.update(31)
    run.saver.save()
    for suffix in (DATA, INDEX):
        assert (tmp_path / ("last.ckpt" + suffix)).read_bytes() == (tmp_path / ("model.ckpt-31" + suffix)).read_bytes()
    other = Run(tmp_path, seed=2)
    other.resume()
    assert equal(other.state(), run.state())
    network, iteration = checkpoint.load_network(str(tmp_path / "last.ckpt"), 4)
    assert iteration == 31
    assert equal([v.numpy() for v in network.trainable_variables], run.state()[:10])


def test_resume_takes_the_newest_even_where_last_is_older(saved, tmp_path):
    run, _ = saved
    run.update(40)
    newest = run.saver.save()
    for suffix in (DATA, INDEX):  # as it was before `last.ckpt` went along with every save
        (tmp_path / f"last.ckpt{suffix}").unlink()
        shutil.copy(tmp_path / f"model.ckpt-30{suffix}", tmp_path / f"last.ckpt{suffix}")
    other = Run(tmp_path, seed=2)
    assert other.resume() == newest
    assert equal(other.state(), run.state())


# Damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.row(n=8)
def test_index_without_its_data_is_named_and_passed_over(saved, tmp_path):
    for name, resumed in (("model.ckpt-30", "last.ckpt"), ("last.ckpt", "model.ckpt-20")):
        (tmp_path / (name + DATA)).unlink()
        other = Run(tmp_path, seed=2)
        assert other.resume() == str(tmp_path / resumed)
        assert "model.ckpt-30" in "".join(other.warnings)


@pytest.mark.row(n=8)
def test_resume_refuses_where_every_checkpoint_is_damaged(saved, tmp_path):
    for path in tmp_path.glob("*.index"):
        empty(path)
    other = Run(tmp_path, seed=2)
    before = other.state()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete"):
        other.resume()
    assert equal(other.state(), before)
    assert len(other.warnings) == 4


@pytest.mark.row(n=5)
def test_half_written_files_are_removed_and_complete_ones_stay(saved, tmp_path):
    complete = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / ".unfinished/model_temp").mkdir(parents=True)  # where TensorFlow writes first
    for name in ("model_temp/part-0", "model" + DATA, "model" + INDEX, "../model.ckpt-40" + DATA):
        (tmp_path / ".unfinished" / name).write_bytes(b"half")
    other = Run(tmp_path, seed=2)
    assert other.resume() == str(tmp_path / "model.ckpt-30")
    assert sorted(path.name for path in tmp_path.iterdir()) == complete


@pytest.mark.row(n=5)
def test_half_written_files_of_a_killed_save_do_not_keep_it_from_saving_again(saved, tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / (".unfinished/model" + DATA)).write_bytes(b"half")
    (tmp_path / ("model.ckpt-40" + DATA)).write_bytes(b"half")
    run, _ = saved
    run.update(40)
    run.saver.save()
    other = Run(tmp_path, seed=2)
    other.resume()
    assert equal(other.state(), run.state())


# What may not be loaded or saved.


@pytest.mark.row(n=10)
def test_checkpoint_of_another_number_of_actions_is_refused_with_both_numbers(saved, tmp_path):
    with pytest.raises(CheckpointError, match="4 actions; this one has 6"):
        checkpoint.load_network(str(tmp_path / "model.ckpt-30"), 6)

    other = Run(tmp_path, seed=2, num_actions=6)
    before = other.state()
    with pytest.raises(CheckpointError, match="4 actions; this one has 6"):
        other.resume()
    assert equal(other.state(), before)


@pytest.mark.row(n=20)
def test_checkpoint_of_another_layer_size_is_refused_and_named(saved, tmp_path):
    other = Run(tmp_path, seed=2)
    other.shared.weights["hidden"] = tf.Variable(tf.zeros([11 * 11 * 64, 128]))
    conv1 = other.shared.weights["conv1"].numpy()
    with pytest.raises(CheckpointError, match="weights/hidden has shape"):
        other.resume()
    np.testing.assert_array_equal(other.shared.weights["conv1"], conv1)


@pytest.mark.parametrize("filters", [8, 32, 40])
def test_network_is_loaded_with_as_many_filters_as_it_was_saved_with(tmp_path, filters):
    run = Run(tmp_path, filters=filters)
    path = run.saver.save()
    network, _ = checkpoint.load_network(path, 4)
    assert equal([v.numpy() for v in network.trainable_variables], run.state()[:10])


def test_network_is_loaded_with_the_background_that_it_was_saved_with(tmp_path):
    path = Run(tmp_path, background=87).saver.save()
    network, _ = checkpoint.load_network(path, 4)
    assert (network.background, float(network.biases["input"])) == (87, -87.0)
    resumed = Run(tmp_path, seed=2, background=87)
    assert resumed.resume() == path


@pytest.mark.row(n=11)
@pytest.mark.parametrize("saved, now", [(0, 87), (87, 0)])
def test_checkpoint_with_another_treatment_of_the_background_is_refused(tmp_path, saved, now):
    Run(tmp_path, background=saved).saver.save()
    with pytest.raises(CheckpointError, match=r"not of this network: biases/input .*--subtract_background"):
        Run(tmp_path, background=now).resume()


@pytest.mark.row(n=11)
def test_unrelated_checkpoint_is_refused(tmp_path):
    path = tf.train.Checkpoint(step=tf.Variable(3)).write(str(tmp_path / "model.ckpt-50"))
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        checkpoint.load_network(path, 4)
    with pytest.raises(CheckpointError):
        Run(tmp_path).resume()


@pytest.mark.row(n=13)
def test_network_that_is_not_finite_is_not_saved(saved, tmp_path):
    run, _ = saved
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run.progress.iteration = 40
    for value in (np.nan, np.inf):
        run.shared.biases["value"].assign([value])
        with pytest.raises(FloatingPointError, match="iteration 40"):
            run.saver.save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.row(n=8)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_save_that_cannot_be_read_back_raises_and_leaves_the_earlier_checkpoints(saved, tmp_path, monkeypatch, damage):
    write = tf.train.Checkpoint.write

    def write_badly(self, path):
        written = write(self, path)
        damage(Path(written + DATA))
        return written

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_badly)
    run, states = saved
    run.update(40)
    with pytest.raises(CheckpointError, match="is damaged"):
        run.saver.save()
    other = Run(tmp_path, seed=2)
    assert other.resume() == str(tmp_path / "model.ckpt-30")
    assert equal(other.state(), states[30])


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, "tests")
from startup import UserError
from test_checkpoint import Run
folder = sys.argv[1]
run = Run(folder)
run.update(10)
run.saver.save()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
run.update(20)
try:
    run.saver.save()
except UserError as error:
    print("UserError:", error)
"""


@pytest.mark.row(n=6)
def test_full_disk_raises_and_leaves_the_earlier_checkpoint(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"UserError: cannot save {tmp_path / 'model.ckpt-20'}, earlier saves are intact: ")
    other, expected = Run(tmp_path, seed=2), Run(tmp_path)
    expected.update(10)
    assert other.resume() == str(tmp_path / "model.ckpt-10")
    assert equal(other.state(), expected.state())
    kept = [name + suffix for name in ("last.ckpt", "model.ckpt-10") for suffix in (DATA, INDEX)]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.row(n=6)
def test_folder_that_cannot_be_written_is_named(saved, tmp_path):
    run, _ = saved
    run.saver.folder = str(tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("in the way")
    run.update(40)
    with pytest.raises(UserError, match=r"cannot save .*file/folder"):
        run.saver.save()


# Names.


@pytest.mark.row(n=9)
def test_resolve_finds_the_checkpoint_behind_a_folder_an_index_and_a_data_file(saved, tmp_path):
    folder, path = str(tmp_path), str(tmp_path / "model.ckpt-20")
    assert [checkpoint.resolve(path + suffix) for suffix in ("", INDEX, DATA)] == [path] * 3
    assert checkpoint.resolve(folder) == str(tmp_path / "model.ckpt-30")


@pytest.mark.row(n=9)
def test_resolve_of_a_missing_checkpoint_lists_what_is_there(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*best\.ckpt.*model\.ckpt-30, .*model\.ckpt-20, "):
        checkpoint.resolve(str(tmp_path / "best.ckpt"))


@pytest.mark.row(n=9)
def test_resolve_in_a_folder_without_checkpoints_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "last.ckpt", tmp_path / "nowhere" / "last.ckpt"):
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            checkpoint.resolve(str(path))


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_checkpoint import Run
run = Run(sys.argv[1], keep=2)
run.resume()
print("ready", flush=True)
while True:
    run.update(run.progress.iteration + 1)
    run.saver.save()
"""


@pytest.mark.row(n=4)
@pytest.mark.slow
def test_process_that_is_killed_while_it_saves_always_leaves_a_complete_checkpoint(tmp_path):
    rng = np.random.default_rng()
    reached = 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], text=True, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5 + rng.random())
        process.kill()
        process.communicate(timeout=10)
        run = Run(tmp_path, keep=2)
        assert run.resume()
        assert run.progress.iteration > reached
        reached = run.progress.iteration
        assert all("has no .index file" in text for text in run.warnings)


# The folder of a run.


@pytest.mark.row(n=19)
def test_second_run_in_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    folder = str(tmp_path / "new" / "folder")
    with (
        groups.run_folder(folder),
        pytest.raises(UserError, match="another run is using it"),
        groups.run_folder(folder),
    ):
        pass
    with groups.run_folder(folder):
        assert os.path.isdir(folder)


@pytest.mark.row(n=7)
def test_run_folder_that_is_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"), groups.run_folder(str(tmp_path / "file")):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1}', None])
def test_config_that_is_missing_or_damaged_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        checkpoint.read_config(str(path))


def test_saving_does_not_need_the_main_thread(saved, tmp_path):
    run, _ = saved
    run.update(50)
    thread = threading.Thread(target=run.saver.save)
    thread.start()
    thread.join(timeout=60)
    assert checkpoint.resolve(str(tmp_path)) == str(tmp_path / "model.ckpt-50")
