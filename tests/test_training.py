"""The whole program: tiny runs of Breakout in processes of their own, and faults with fake games in this one."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import (
    ENDLESS,
    ROOT,
    FaultyEnv,
    Running,
    ScriptedEnv,
    checkpoints,
    iterations,
    last_iteration,
    newest,
    rows,
    run,
    use_games,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a3c
import checkpoint
import groups
from startup import tf

ORIGINAL_TAGS = {
    "learning_rate",
    "policy_loss",
    "entropy_loss",
    "value_loss",
    "total_episodes",
    "average_rewards",
    "maximum_rewards",
}


# A run of six updates, and a copy of it resumed up to ten.


@pytest.fixture(scope="module")
def resumed(trained, tmp_path_factory):
    """Return the folder of a run that was resumed, and the process that did it."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(trained[0], folder)
    return folder, run(folder, "--max_iteration=10", "--learning_rate=0.001")


def test_run_ends_at_max_iteration_and_says_where_it_saved(trained):
    folder, process = trained
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Breakout-v0: 4 actions, frame-skip 3")
    assert process.stdout.splitlines()[-1] == f"saved {folder}/last.ckpt"


def test_run_prints_no_warnings_of_its_libraries(trained):
    """What TensorFlow, CUDA and Gymnasium like to say at the start; the progress bar is all there is on stderr."""
    lines = trained[1].stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and not re.search(r"\d+%.*(it/s|s/it)", line)] == []


def test_progress_csv_has_a_row_for_each_summary_period(trained):
    table = rows(trained[0])
    assert [int(row["iteration"]) for row in table] == [2, 4, 6]
    assert [int(row["agent_steps"]) for row in table] == [n * 4 * 5 for n in (2, 4, 6)]
    for row in table:
        for name in ("policy_loss", "value_loss", "entropy", "gradient_norm", "learning_rate", "steps_per_second"):
            assert np.isfinite(float(row[name])), name
        assert 0 < float(row["entropy"]) <= np.log(4) + 1e-6


def test_checkpoints_fall_on_the_save_period_and_the_end(trained):
    assert checkpoints(trained[0]) == ["last.ckpt", "model.ckpt-6", "model.ckpt-3"]
    assert last_iteration(trained[0]) == 6
    assert not list(trained[0].glob(".unfinished*"))


def test_config_is_saved_beside_the_checkpoints(trained):
    saved = json.loads((trained[0] / "config.json").read_text())
    versions, given = saved.pop("versions"), saved.pop("given")
    assert saved.pop("history") == []
    assert all((name in given) == (value != getattr(a3c.Config, name)) for name, value in saved.items())
    assert saved == dataclasses.asdict(
        a3c.Config(
            log_dir=str(trained[0]),
            num_threads=2,
            agents_per_thread=4,
            summary_period=2,
            save_period=3,
            max_iteration=6,
            device="cpu",
        )
    )
    assert versions["tensorflow"] == tf.__version__


def test_tensorboard_has_the_originals_tags_by_step_and_by_episode(trained):
    folder, _ = trained
    for place, axis in ((folder, "iteration"), (folder / "per-eps", "episodes")):
        events = EventAccumulator(str(place))
        events.Reload()
        scored = any(row["average_score"] != "nan" for row in rows(folder))
        missing = set() if scored else {"average_rewards", "maximum_rewards"}  # there is no score yet
        assert set(events.Tags()["tensors"]) == {*ORIGINAL_TAGS, "gradient_norm", "steps_per_second"} - missing
        entropy = events.Tensors("entropy_loss")
        assert [event.step for event in entropy] == [int(row[axis]) for row in rows(folder)]
        shown = [float(tf.make_ndarray(event.tensor_proto)) for event in entropy]
        np.testing.assert_allclose(shown, [float(row["entropy"]) for row in rows(folder)], rtol=1e-5)


def test_resumed_run_goes_on_where_the_first_ended(trained, resumed):
    folder, process = resumed
    assert process.returncode == 0, process.stderr
    assert f"resumed {folder}/model.ckpt-6: 120 agent steps" in process.stdout
    assert iterations(folder) == [2, 4, 6, 8, 10]
    assert rows(folder)[:3] == rows(trained[0])
    assert [int(row["agent_steps"]) for row in rows(folder)] == [40, 80, 120, 160, 200]
    seconds = [float(row["seconds"]) for row in rows(folder)]
    assert seconds == sorted(seconds)
    assert checkpoints(folder) == ["last.ckpt", "model.ckpt-10", "model.ckpt-9", "model.ckpt-6"]
    assert last_iteration(folder) == 10


@pytest.mark.row(n=20)
def test_resumed_run_names_the_settings_that_changed(resumed):
    changes = [line for line in resumed[1].stdout.splitlines() if line.startswith("changed")]
    assert "changed since the last run: learning_rate from 0.00025 to 0.001" in changes
    assert "changed since the last run: max_iteration from 6 to 10" in changes
    assert len(changes) == 3  # and log_dir, because the folder was copied


def test_trained_agent_plays_and_writes_its_scores_and_a_video(trained, tmp_path):
    flags = [f"--model={trained[0]}/last.ckpt", f"--out={tmp_path}", "--iter=2", "--epsilon=1", "--device=cpu"]
    process = subprocess.run(
        [sys.executable, "a3c-test.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert f"Breakout-v0, {trained[0]}/last.ckpt after 6 updates" in process.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["game"], results["iteration"], len(results["scores"])) == ("Breakout-v0", 6, 2)
    assert all(score >= 0 and score == int(score) for score in results["scores"])
    assert (tmp_path / "play.mp4").read_bytes()[4:8] == b"ftyp"


# Signals and kills.


@pytest.mark.slow
@pytest.mark.row(n=1)
@pytest.mark.row(n=2)
@pytest.mark.row(n=19)
def test_second_run_in_the_same_folder_is_refused_and_ctrl_c_saves_the_first(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS) as first:
        first.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
        second = run(folder, ENDLESS)
        assert second.returncode == 1
        assert f"a3c.py: error: log_dir = '{folder}': another run is using it" in second.stderr

        first.process.send_signal(signal.SIGINT)
        status, output = first.send(signal.SIGINT)  # pressed twice
    assert status == 130
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) >= iterations(folder)[-1] >= 4


@pytest.mark.slow
@pytest.mark.row(n=3)
@pytest.mark.row(n=4)
@pytest.mark.row(n=5)
@pytest.mark.row(n=21)
def test_terminated_and_killed_runs_are_resumed_from_their_newest_checkpoint(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    reached = 6
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        with Running(folder, ENDLESS) as running:
            running.wait_for(lambda: newest(folder) >= reached + 6)  # noqa: B023
            status, output = running.send(number)
        assert status == expected
        assert f"resumed {folder}/model.ckpt-{reached}:" in output
        reached = newest(folder)
        if number == signal.SIGTERM:
            assert f"saved {folder}/last.ckpt" in output
            assert last_iteration(folder) == reached

    (folder / ".unfinished").mkdir(exist_ok=True)  # as if it had been killed while it saved
    past = run(folder, f"--max_iteration={reached}")
    assert past.returncode == 0, past.stderr
    assert f"resumed {folder}/model.ckpt-{reached}:" in past.stdout
    assert f"nothing to do: iteration {reached:,}, " in past.stdout


# Faults that are found before training starts.


@pytest.mark.row(n=15)
def test_unknown_game_ends_with_one_line_that_names_near_ones(tmp_path):
    process = run(tmp_path / "new", "--game=Brekout-v0")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("a3c.py: error: game = 'Brekout-v0' is not known. Did you mean Breakout-v0")
    assert not (tmp_path / "new").exists()


@pytest.mark.row(n=10)
@pytest.mark.row(n=20)
def test_run_of_another_game_with_more_actions_is_refused(trained, tmp_path, main, no_training):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    before = (folder / "config.json").read_text()
    status, _, errors = main(f"--log_dir={folder}", "--game=Tennis-v0")
    assert status == 1
    assert "of a game with 4 actions; this one has 18" in errors
    assert (folder / "config.json").read_text() == before


@pytest.mark.row(n=20)
def test_run_of_another_game_with_as_many_actions_is_refused(trained, tmp_path, main, no_training):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "game": "Breakout-v4"}))
    status, _, errors = main(f"--log_dir={folder}")
    assert status == 1
    assert errors == f"a3c.py: error: game = 'Breakout-v0': {folder} holds a run of Breakout-v4. Use --log_dir\n"


@pytest.mark.row(n=7)
def test_file_in_place_of_the_log_folder_is_an_error(tmp_path, main, no_training):
    path = tmp_path / "file"
    path.write_text("in the way")
    for folder in (path, path / "below"):
        status, _, errors = main(f"--log_dir={folder}")
        assert status == 1
        assert errors.startswith("a3c.py: error: ")
        assert str(path) in errors


@pytest.mark.row(n=17)
def test_gpu_that_is_not_there_is_an_error_that_names_the_way_out(tmp_path, main, no_training):
    status, _, errors = main(f"--log_dir={tmp_path}", "--device=gpu:99")
    assert status == 1
    assert "device = 'gpu:99': TensorFlow sees" in errors
    assert "--device cpu" in errors


@pytest.mark.row(n=17)
@pytest.mark.parametrize("device", ["tpu", "cpu:1", "gpu:x", "gpu:-1"])
def test_unknown_device_is_an_error_that_names_the_known_ones(tmp_path, main, no_training, device):
    status, _, errors = main(f"--log_dir={tmp_path}", f"--device={device}")
    assert status == 1
    assert errors == f"a3c.py: error: device = {device!r}: must be auto, cpu, gpu or gpu:N\n"


@pytest.mark.row(n=8)
def test_folder_of_damaged_checkpoints_is_an_error(tmp_path, main, no_training):
    for suffix in (".index", ".data-00000-of-00001"):
        (tmp_path / f"model.ckpt-5{suffix}").write_bytes(b"")
    status, output, errors = main(f"--log_dir={tmp_path}")
    assert status == 1
    assert "model.ckpt-5" in output
    assert "is complete. Move them away to start afresh" in errors


# Resuming, with games that cost no time.


@pytest.mark.row(n=4)
def test_rows_after_the_checkpoint_are_dropped_when_a_run_is_resumed(trained, tmp_path, main, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    table = (folder / "progress.csv").read_text()
    later = table.splitlines()[-1].replace("6,120,", "8,999,", 1)
    (folder / "progress.csv").write_text(table + later + "\r\n1")  # killed in the middle of row 10
    use_games(monkeypatch, *(ScriptedEnv(np.zeros([5, 4])) for _ in range(2)))
    assert main(f"--log_dir={folder}", "--max_iteration=8")[0] == 0
    assert iterations(folder) == [2, 4, 6, 8]
    assert rows(folder)[:3] == rows(trained[0])
    assert int(rows(folder)[3]["agent_steps"]) == 160


def test_report_shows_the_average_and_the_maximum_of_the_last_raw_scores(tmp_path, main, monkeypatch):
    games = ScriptedEnv([[0, 0, 0, 0], [100, 20, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 0]])
    use_games(monkeypatch, games)
    assert main(f"--log_dir={tmp_path}", "--max_iteration=2", "--num_threads=1")[0] == 0
    (row,) = rows(tmp_path)
    assert (float(row["average_score"]), float(row["maximum_score"])) == (40, 100)
    assert int(row["episodes"]) == 15  # three games end with every second of the ten steps


# Faults in the middle of training, with games that cause them.


@pytest.mark.row(n=12)
def test_exception_in_a_group_is_shown_and_the_run_saved(tmp_path, main, monkeypatch):
    def fault():
        raise RuntimeError("cable pulled")

    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])), FaultyEnv(fault))
    status, output, errors = main(f"--log_dir={tmp_path}", "--max_iteration=500")
    assert status == 1
    assert "in fault" in errors  # its own traceback
    assert "GroupFailure: group 1, RuntimeError: cable pulled" in errors
    assert f"saved {tmp_path}/last.ckpt" in output
    assert last_iteration(tmp_path) >= 6


@pytest.mark.row(n=13)
def test_loss_that_is_not_finite_ends_the_run_and_the_network_before_it_is_saved(tmp_path, main, monkeypatch):
    class NanEnv(ScriptedEnv):
        def step(self, actions):
            frame, reward, *rest = super().step(actions)
            return frame, reward * (np.nan if len(self.actions) > 30 else 1), *rest

    use_games(monkeypatch, NanEnv(np.zeros([5, 4])))
    status, _, errors = main(f"--log_dir={tmp_path}", "--max_iteration=500", "--num_threads=1")
    assert status == 1
    assert "FloatingPointError: iteration 6: not finite" in errors
    network, iteration = checkpoint.load_network(f"{tmp_path}/last.ckpt", 4)
    assert iteration == 6
    assert all(np.all(np.isfinite(variable)) for variable in network.trainable_variables)


@pytest.mark.row(n=14)
def test_group_that_stalls_is_named_and_the_run_saved(tmp_path, main, monkeypatch):
    over = threading.Event()

    def fault():
        if not over.wait(30):
            raise RuntimeError("nobody noticed")

    monkeypatch.setattr(groups, "STOP_GRACE", 0.2)
    use_games(monkeypatch, FaultyEnv(fault))
    try:
        flags = ["--max_iteration=500", "--num_threads=1", "--stall_timeout=2"]
        status, output, errors = main(f"--log_dir={tmp_path}", *flags)
    finally:
        over.set()
    assert status == 1
    assert "TimeoutError: group 0 has not taken a step for 2 s" in errors
    assert f"saved {tmp_path}/last.ckpt" in output
    assert last_iteration(tmp_path) >= 6
    for thread in threading.enumerate():
        if thread.name.startswith("group"):
            thread.join(timeout=30)


@pytest.mark.row(n=6)
def test_disk_that_fills_up_ends_the_run_with_its_earlier_checkpoint_intact(tmp_path, main, monkeypatch):
    real = tf.train.Checkpoint.write
    written = []

    def write(self, path, *rest):
        written.append(path)
        if len(written) > 2:
            raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")
        return real(self, path, *rest)

    monkeypatch.setattr(tf.train.Checkpoint, "write", write)
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    status, _, errors = main(f"--log_dir={tmp_path}", "--max_iteration=500", "--num_threads=1")
    assert status == 1
    assert "earlier saves are intact:" in errors
    assert checkpoints(tmp_path) == ["last.ckpt", "model.ckpt-6", "model.ckpt-3"]
    assert checkpoint.load_network(f"{tmp_path}/model.ckpt-6", 4)[1] == last_iteration(tmp_path) == 6
