"""The whole program: tiny runs of Breakout in processes of their own, then games in this one that cost no time."""

import dataclasses
import json
import sys
from unittest import mock

import numpy as np
import pytest
from conftest import (
    ScriptedEnv,
    checkpoints,
    config_of,
    last_iteration,
    refusal,
    rows,
    tensorboard,
    watching,
)

import a3c
import checkpoint
import groups
import report
import startup
from environment import find_game
from network import ActorCritic
from startup import tf


def test_run_ends_at_max_iteration_says_where_it_saved_and_prints_no_warnings_of_its_libraries(trained):
    folder, process = trained
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Breakout-v0: 4 actions, frame-skip 3")
    assert process.stdout.splitlines()[-1] == f"saved {folder}/last.ckpt"
    assert process.stderr == ""


def test_network_is_made_as_the_config_says():
    game = find_game("Pong-v0")
    asked = {"decay": 0.5, "random_seed": 7, "rmsprop_epsilon": 1e-3, "filters": 2}
    shared = a3c.make_network(a3c.Config(subtract_background=True, compute_dtype="bfloat16", **asked), game, "/CPU:0")
    assert game.background > 50
    assert float(shared.biases["input"]) == -game.background
    assert (shared.decay, shared.epsilon, shared.copies_dtype) == (0.5, 1e-3, "bfloat16")
    assert shared.make_copy().compute_dtype == tf.bfloat16
    plain = a3c.make_network(a3c.Config(compute_dtype="float32", **asked), game, "/CPU:0")
    assert "input" not in plain.biases
    assert plain.make_copy().compute_dtype == tf.float32
    other = {"lstm": 3, "input_scale": "unit", "optimizer": "adam", "adam_epsilon": 1e-2, "network": "pooled"}
    other["last_action"] = True
    other = a3c.make_network(a3c.Config(**other, **asked), game, "/CPU:0")
    assert (other.optimizer, other.epsilon, other.lstm) == ("adam", 1e-2, 3)
    assert {"input", "action"} < other.make_copy().weights.keys()
    assert other.make_copy().weights["conv1"].shape[0] == 5
    expected = ActorCritic(game.num_actions, seed=7, filters=2)
    for mine, theirs in zip(plain.trainable_variables, expected.trainable_variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Clock:
    """Stands for a module's `time`, which goes on only in `wait_for_stop` and by hand."""

    def __init__(self):
        self.now, self.waits = 1000.0, 0.2

    def monotonic(self):
        return self.now

    def wait_for_stop(self, _):
        self.now += self.waits


def test_groups_of_a_process_that_was_stopped_for_long_are_not_taken_for_stalled(monkeypatch, make_config):
    clock = Clock()
    monkeypatch.setattr(groups, "time", clock)
    watched = groups.Groups(make_config(stall_timeout=60), None, None, None, mock.Mock(), [])
    watched.coordinator, agent = clock, mock.Mock(index=3, alive_at=clock.now)
    watched.agents = [agent]
    clock.waits = 1e6  # as by Ctrl-Z
    watched._watch()
    clock.waits = 4.0
    with pytest.raises(TimeoutError, match="group 3 has not taken a step for 60 s"):
        for _ in range(20):
            watched._watch()
    assert 1e6 + 1060 < clock.now < 1e6 + 1070


@pytest.mark.parametrize("cores, num_threads, share", [(16, 4, 4), (5, 2, 2), (2, 4, 1)])
def test_games_of_a_group_get_its_share_of_the_cores(monkeypatch, cores, num_threads, share):
    monkeypatch.setattr(startup, "available_cores", lambda: cores)
    monkeypatch.setattr(groups, "make_training_envs", lambda game, *arguments: arguments)
    game = find_game("ALE/AirRaid-v5")
    with groups.games_of(a3c.Config(num_threads=num_threads), game) as (_, make_envs, size):
        assert make_envs() == (64, share, size)
    assert size == (250, 160)


def test_progress_csv_has_a_row_for_each_summary_period(trained):
    table = rows(trained[0])
    assert list(table[0]) == list(report.COLUMNS)
    assert [(int(row["iteration"]), int(row["agent_steps"])) for row in table] == [(2, 40), (4, 80), (6, 120)]
    for row in table:
        assert all(np.isfinite(float(row[name])) for name in report.COLUMNS if "score" not in name)
        assert 0 < float(row["entropy"]) <= np.log(4) + 1e-6


def test_tensorboard_has_the_originals_tags_by_step_and_by_episode(trained):
    tags = {"learning_rate", "policy_loss", "entropy_loss", "value_loss", "total_episodes"}
    scores = {"average_rewards", "maximum_rewards"}  # once a game has ended
    for place, axis in (("", "iteration"), ("per-eps", "episodes")):
        curves = tensorboard(trained[0] / place)
        assert curves.keys() - scores == tags | {"gradient_norm", "steps_per_second"}
        assert [point.step for point in curves["entropy_loss"]] == [int(row[axis]) for row in rows(trained[0])]


def test_checkpoints_fall_on_the_save_steps_and_the_end(trained):
    assert checkpoints(trained[0]) == ["last.ckpt", "model.ckpt-6", "model.ckpt-3"]
    assert last_iteration(trained[0]) == 6
    assert not list(trained[0].glob(".unfinished*"))


def test_config_is_saved_beside_the_checkpoints(trained):
    saved = config_of(trained[0])
    assert saved.pop("versions")["tensorflow"] == tf.__version__
    assert saved.pop("history") == []
    given = {"log_dir": str(trained[0]), "num_threads": 2, "agents_per_thread": 4, "summary_period": 2}
    given |= {"save_steps": 60, "max_iteration": 6, "device": "cpu"}
    assert set(saved.pop("given")) == set(given) - {"log_dir"}
    assert saved == dataclasses.asdict(a3c.Config(**given))


@pytest.mark.row(n=20)
def test_resumed_run_goes_on_where_the_first_ended_and_names_the_settings_that_changed(trained, trained_copy, main):
    folder = trained_copy
    status, output, errors = main(f"--log_dir={folder}", "--max_iteration=10", "--learning_rate=0.001")
    assert status == 0, errors
    assert f"resumed {folder}/model.ckpt-6: 120 agent steps" in output
    assert rows(folder)[:3] == rows(trained[0])
    assert [int(row["agent_steps"]) for row in rows(folder)] == [40, 80, 120, 160, 200]
    seconds = [float(row["seconds"]) for row in rows(folder)]
    assert seconds == sorted(seconds)
    assert checkpoints(folder) == ["last.ckpt", "model.ckpt-10", "model.ckpt-9", "model.ckpt-6"]
    assert last_iteration(folder) == 10
    assert {line for line in output.splitlines() if line.startswith("changed")} == {
        "changed since the last run: learning_rate from 0.00025 to 0.001",
        "changed since the last run: max_iteration from 6 to 10",
    }  # log_dir, which differs in a copied folder, is no setting of the run


def test_trained_agent_plays_and_writes_its_scores_and_a_video(trained, tmp_path, monkeypatch, capsys):
    flags = [f"--model={trained[0]}/last.ckpt", f"--out={tmp_path}", "--iter=2", "--epsilon=1", "--frameskip=10"]
    monkeypatch.setattr(sys, "argv", ["a3c-test.py", *flags, "--device=cpu"])
    assert watching.main() == 0
    assert f"Breakout-v0, frame-skip 10, {trained[0]}/last.ckpt after 6 updates" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["game"], results["iteration"], len(results["scores"])) == ("Breakout-v0", 6, 2)
    assert all(score >= 0 and score == int(score) for score in results["scores"])
    assert (tmp_path / "play.mp4").read_bytes()[4:8] == b"ftyp"


# What is found before training starts.


@pytest.fixture
def run_copy(trained_copy, main):
    """Return a function that resumes the copy in this process: status, what it printed, its errors."""
    return lambda *flags: main(f"--log_dir={trained_copy}", *flags)


@pytest.mark.row(n=21)
@pytest.mark.parametrize("limit", ["--max_iteration=6", "--max_iteration=2", "--max_agent_steps=120"])
def test_run_that_has_come_to_its_end_says_so(run_copy, tmp_path, no_training, limit):
    before = (tmp_path / "run/config.json").read_text()
    status, output, _ = run_copy(limit)
    assert status == 0
    assert limit.strip("-").replace("=", " = ") in output.splitlines()[-1]
    assert (tmp_path / "run/config.json").read_text() == before  # so that the limit holds for this call only
    assert f"resumed {tmp_path}/run/model.ckpt-6:" in output
    assert output.splitlines()[-1].startswith("nothing to do: iteration 6, 120 agent steps")


@pytest.mark.row(n=10)
@pytest.mark.row(n=20)
@pytest.mark.row(n=28)
@pytest.mark.parametrize(
    "flag, said",
    [
        ("--game=Tennis-v0", "holds a run of Breakout-v0. Use --log_dir"),
        ("--game=Breakout-v4", "holds a run of"),
        ("--network=deep", "is of another network"),
    ],
)
def test_run_of_another_game_or_network_is_refused(run_copy, tmp_path, no_training, flag, said):
    before = (tmp_path / "run/config.json").read_text()
    assert said in refusal(run_copy(flag))
    assert (tmp_path / "run/config.json").read_text() == before


@pytest.mark.row(n=19)
def test_run_in_a_folder_that_another_uses_is_refused(run_copy, tmp_path, no_training):
    with groups.run_folder(str(tmp_path / "run")):
        said = refusal(run_copy())
    assert said == f"log_dir = '{tmp_path}/run': another run is using it"


@pytest.mark.row(n=33)
def test_table_that_something_else_has_changed_is_named_and_stays_as_it_is(run_copy, tmp_path, no_training):
    path = tmp_path / "run/progress.csv"
    path.write_text(path.read_text().replace(",", ";"))
    changed = path.read_text()
    said = refusal(run_copy("--max_iteration=8"))
    assert said == f"{path} is not as this program wrote it. Move it away to go on without it"
    assert path.read_text() == changed


@pytest.mark.row(n=17)
def test_gpu_that_is_not_there_is_refused_with_the_way_out_before_a_folder_is_made(tmp_path, main, no_training):
    said = refusal(main(f"--log_dir={tmp_path}/new", "--device=gpu:99"))
    assert said.startswith("device = 'gpu:99': TensorFlow sees ")
    assert "Use --device cpu, or --device auto" in said
    assert not (tmp_path / "new").exists()


# Games that cost no time.


def test_saves_come_at_the_multiples_of_save_steps_and_rows_have_the_last_raw_scores(play, tmp_path, monkeypatch):
    saved, save = [], checkpoint.Saver.save
    monkeypatch.setattr(checkpoint.Saver, "save", lambda self: (saved.append(self.progress.agent_steps), save(self))[1])
    games = ScriptedEnv([[0, 0, 0, 0], [100, 20, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 0]])
    assert play("--save_steps=50", "--max_agent_steps=210", games=games)[0] == 0
    assert saved == [60, 100, 160, 200, 220]  # updates of 20 steps; the last one is the end's
    row = rows(tmp_path / "run")[0]
    assert (float(row["average_score"]), float(row["maximum_score"])) == (40, 100)
    assert int(row["episodes"]) == 15  # three games end with every second of the ten steps


@pytest.mark.row(n=13)
def test_loss_that_is_not_finite_ends_the_run_and_the_network_before_it_is_saved(play, tmp_path):
    rewards = np.zeros([100, 4])
    rewards[30:] = np.nan
    status, _, errors = play(games=ScriptedEnv(rewards))
    assert status == 1
    assert "FloatingPointError: iteration 6: not finite" in errors
    network, iteration = checkpoint.load_network(f"{tmp_path}/run/last.ckpt", 4)
    assert iteration == 6
    assert all(np.all(np.isfinite(variable)) for variable in network.trainable_variables)
