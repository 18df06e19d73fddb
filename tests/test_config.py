"""Hyperparameters: defaults, what the presets change, wrong values, the flags that are made of them, schedules."""

import dataclasses
import math
import os
import pathlib
import re

import numpy as np
import pytest

import a3c
import groups
import settings
from a3c import Config

DEFAULTS = dataclasses.asdict(Config())
SWITCHES = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]


def test_defaults_are_the_originals():
    ours = {"ray_address", "device", "compute_dtype", "initial_model", "max_iteration", "save_minutes", "stall_timeout"}
    assert {name: value for name, value in DEFAULTS.items() if name not in ours} == {
        "game": "Breakout-v0",
        "log_dir": "",
        "random_seed": 113,
        "num_threads": 4,
        "agents_per_thread": 64,
        "unroll_step": 5,
        "max_agent_steps": 1_000_000 * 64 * 5,
        "frameskip": None,
        "random_frameskip": False,
        "max_pool": False,
        "noop_max": 0,
        "fire_reset": False,
        "discount_factor": 0.99,
        "gae_lambda": 1.0,
        "life_loss_ends_return": False,
        "reward_clip": 1.0,
        "learning_rate": 2.5e-4,
        "annealing_steps": None,
        "optimizer": "rmsprop",
        "adam_epsilon": 1e-5,
        "decay": 0.99,
        "rmsprop_epsilon": 1e-10,
        "grad_clip": 0.1,
        "global_clip": None,
        "entropy_beta": 0.01,
        "entropy_annealing_steps": None,
        "value_weight": 1.0,
        "average_window": 0.0,
        "subtract_background": False,
        "network": "original",
        "filters": 32,
        "input_scale": "raw",
        "lstm": 0,
        "last_action": False,
        "save_steps": 20_000 * 64 * 5,
        "summary_period": 100,
    }


# Values.


@pytest.mark.row(n=16)
@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("num_threads", True, "a whole number from 1 to 4,096"),
        ("noop_max", 0.5, "a whole number from 0 to 2,146,435,072"),
        ("frameskip", "none", "a whole number from 1 to 2,146,435,072, or None"),
        ("learning_rate", math.nan, "a number from 1e-30 to 2.1e+09"),
        ("grad_clip", 0.0, "a number from 1e-30 to 2.1e+09, or None"),
        ("adam_epsilon", 1e-50, "a number from 1e-30 to 2.1e+09"),
        ("value_weight", -0.1, "a number from 0 to 2.1e+09"),
        ("gae_lambda", 1.01, "a number from 0 to 1"),
        ("discount_factor", 0.0, "a number above 0 to 1"),
        *(("max_pool", value, "True or False") for value in (0, 1, None, "True")),
        *(("compute_dtype", value, "one of auto, float32, bfloat16") for value in ("float16", "", None)),
        *(("game", value, "a text") for value in (3, None)),
        *(("log_dir", f"log{character}", "a path in UTF-8 without") for character in "*?[]"),
    ],
)
def test_wrong_value_raises_naming_field_and_value_and_what_it_must_be(name, value, wanted):
    """Any value of any number is tried in test_faults.py."""
    with pytest.raises(ValueError, match=re.escape(f"{name} = {value!r}: must be {wanted}")):
        Config(**{name: value})


@pytest.mark.row(n=34)
@pytest.mark.parametrize(
    "name, value, taken",
    [
        ("num_threads", np.int64(2), 2),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", 1, 1.0),
        ("log_dir", pathlib.Path("x"), "x"),
        ("max_pool", np.bool_(True), True),
    ],
)
def test_value_of_another_type_is_taken_as_that_of_its_field(name, value, taken):
    found = getattr(Config(**{name: value}), name)
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"shift": -1, "most": -2}, None),
        ({"shift": "x"}, "shift = 'x': must be a number from -2"),
        ({"most": 0.5}, "most = 0.5: must be a whole number from -2"),
    ],
)
def test_new_field_may_be_a_plain_number(fields, said):
    @dataclasses.dataclass
    class Edited:
        shift: float = 0.5
        most: int | None = None

        def __post_init__(self):
            settings.check_settings(self)

    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            Edited(**fields)
    else:
        assert (Edited(**fields).shift, Edited(**fields).most) == (-1.0, -2)


def test_folder_is_named_after_the_game_unless_it_is_given():
    config = Config(game="ALE/Pong-v5")
    assert config.folder == os.path.join("log", "ALE/Pong-v5")
    config.game = "Pong-v0"
    assert config.folder == os.path.join("log", "Pong-v0")
    assert Config(log_dir="here").folder == "here"


# Schedules.


@pytest.mark.parametrize(
    "length",
    [
        {"max_agent_steps": 1000},
        {"max_iteration": 100, "agents_per_thread": 2},
        {"max_agent_steps": 7, "annealing_steps": 500},
    ],
)
def test_learning_rate_falls_to_a_tenth_in_a_line_over_the_steps_asked_for_or_half_the_run(length):
    config = Config(learning_rate=2e-3, **length)
    rates = [config.learning_rate_at(steps) for steps in (0, 250, 500, 501, 10**9)]
    np.testing.assert_allclose(rates, [2e-3, 1.1e-3, 2e-4, 2e-4, 2e-4], rtol=1e-6)


@pytest.mark.parametrize("length, expected", [(None, [0.02] * 4), (100, [0.02, 0.011, 0.002, 0.002])])
def test_weight_of_the_entropy_falls_to_a_tenth_in_a_line_where_asked(length, expected):
    config = Config(entropy_beta=0.02, annealing_steps=10, entropy_annealing_steps=length)
    np.testing.assert_allclose([config.entropy_beta_at(steps) for steps in (0, 50, 100, 10**6)], expected, rtol=1e-6)


@pytest.mark.parametrize("changed_at", [None, 250_000])
def test_average_is_of_the_last_part_of_the_run(changed_at):
    config, average, steps = Config(average_window=0.1, agents_per_thread=16, unroll_step=5), 0.0, 0
    while steps < 400_000:
        if steps == changed_at:  # a run that goes on with updates four times as long
            config = Config(average_window=0.1, agents_per_thread=16, unroll_step=20)
        average += config.average_rate_at(steps) * (steps - average)
        steps += config.steps_per_update
    assert average == pytest.approx(400_000 * 10 / 11, rel=0.001)  # the mean age is a tenth of the rest


# Flags.


def test_every_field_is_a_flag_and_none_gives_the_defaults():
    assert a3c.parse_config([]) == Config()
    values = {name: 7 if isinstance(value, int) or value is None else 0.5 for name, value in DEFAULTS.items()}
    values |= dict.fromkeys(SWITCHES, True)
    values |= {
        "game": "Pong-v0",
        "log_dir": "x",
        "initial_model": "y",
        "ray_address": "local",
        "device": "cpu",
        "compute_dtype": "bfloat16",
        "optimizer": "adam",
        "input_scale": "unit",
        "network": "pooled",
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert a3c.parse_config(flags) == Config(**values)


@pytest.mark.row(n=16)
@pytest.mark.parametrize(
    "flags, said",
    [
        (["--num_threads=0"], "num_threads = 0: must be a whole number from 1"),
        (["--max_pool=yes"], "--max_pool"),
        (["--compute_dtype=float16"], "--compute_dtype"),
        (["--num_threads"], "--num_threads"),
        (["--num_worker", "3"], "--num_worker"),
        (["--num_thread=3"], "Perhaps you meant: --num_threads"),
        (["stray"], "stray"),
        (["--preset=slow"], "invalid choice: 'slow' (choose from"),
    ],
)
def test_wrong_flag_exits_with_2_naming_it(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        a3c.parse_config(flags)
    assert stopped.value.code == 2
    assert said in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("preset", a3c.PRESETS)
def test_flags_go_before_a_preset_which_is_for_new_runs(preset):
    changed = a3c.PRESETS[preset]
    assert all(DEFAULTS[name] != value for name, value in changed.items())
    assert a3c.parse_config(["--preset", preset]) == Config(**changed)
    assert a3c.parse_config([f"--preset={preset}", "--filters=3"]) == Config(**{**changed, "filters": 3})
    config = a3c.parse_config([f"--preset={preset}", "--filters=3"], {"filters": 4, "agents_per_thread": 5})
    assert config == Config(filters=3, agents_per_thread=5)


def test_run_remembers_also_what_it_was_given_that_equals_a_default(tmp_path, monkeypatch, main, no_training):
    """Else `--preset fast` would change it when the run is resumed."""
    flags = [f"--log_dir={tmp_path}", "--preset", "fast", "--filters=32", "--global-clip", "None"]
    monkeypatch.setattr(groups.Groups, "run", lambda self, *_: (self.saver.save(), self.on_begun(), 0)[-1])
    assert main(*flags)[0] == 0
    status, output, errors = main(f"--log_dir={tmp_path}", "--preset=fast", "--decay=0.9")
    assert (status, errors) == (0, "")
    assert "changed since the last run: decay from 0.99 to 0.9\n" in output
    assert output.count("changed since") == 1
    assert output.startswith("--preset is for new runs")
    given = a3c.given_to_run(str(tmp_path))
    assert (given["filters"], given["global_clip"], given["learning_rate"], given["decay"]) == (32, None, 3e-4, 0.9)


def test_preset_changes_nothing_of_a_run_that_was_begun_without(tmp_path, monkeypatch, main, no_training):
    monkeypatch.setattr(groups.Groups, "run", lambda self, *_: (self.saver.save(), self.on_begun(), 0)[-1])
    assert main(f"--log_dir={tmp_path}")[0] == 0
    status, output, errors = main(f"--log_dir={tmp_path}", "--preset=fast")
    assert (status, errors) == (0, "")
    assert output.startswith("--preset is for new runs, and does nothing here.")
    assert "changed since" not in output


def test_help_shows_each_flag_with_its_comment_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        a3c.parse_config(["--help", "--preset=fast"])
    assert stopped.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "--preset {original,fast,strong}" in shown
    for name in DEFAULTS:
        text = shown.partition(f" --{name} ")[2].partition(" (default: ")[0]
        assert len(text.split()) > 4, name
    assert "games in a group (default: 32)" in shown
