"""Hyperparameters: defaults, wrong values, and the flags that are made of them."""

import dataclasses
import math
import os
import re

import numpy as np
import pytest

import a3c
from a3c import Config

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Config)}
TEXTS = [name for name, kind in FIELDS.items() if kind == "str"]
SWITCHES = [name for name, kind in FIELDS.items() if kind == "bool"]
COUNTS = [name for name, kind in FIELDS.items() if kind.startswith("int")]
NUMBERS = [name for name in FIELDS if name not in TEXTS + SWITCHES]
OPTIONAL = [name for name, kind in FIELDS.items() if "None" in kind]
MAY_BE_ZERO = ["random_seed", "noop_max", "entropy_beta", "value_weight", "decay", "gae_lambda"]
FACTORS = ["discount_factor", "decay", "gae_lambda"]

WRONG = (
    [(name, value) for name in NUMBERS for value in (-1, math.nan, math.inf, "many", "", "nan", True, [3])]
    + [(name, 0) for name in NUMBERS if name not in MAY_BE_ZERO]
    + [(name, value) for name in COUNTS for value in (2.5, "2.5", 4.0, 2**31, 10**400)]
    + [(name, None) for name in NUMBERS if name not in OPTIONAL]
    + [(name, value) for name in FACTORS for value in (1.01, "2")]
    + [(name, value) for name in SWITCHES for value in (1, 0, None, "yes", "", "1", 0.0, "none")]
    + [(name, value) for name in TEXTS for value in (3, None)]
    + [("log_dir", f"log{character}") for character in "*?[]"]
    + [("compute_dtype", kind) for kind in ("float16", "int8", "")]
)


def parse(*flags):
    """Return the Config of a command line."""
    parser = a3c.config_parser("test")
    return a3c.config_from(parser, parser.parse_args([*flags]))


def test_defaults_are_the_originals():
    config = Config()
    config.stall_timeout = config.device = None  # not in the original
    assert dataclasses.asdict(config) == {
        "game": "Breakout-v0",
        "log_dir": "",
        "device": None,
        "random_seed": 113,
        "num_threads": 4,
        "agents_per_thread": 64,
        "unroll_step": 5,
        "max_iteration": 1_000_000,
        "max_agent_steps": None,
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
        "annealing": None,
        "anneal_entropy": False,
        "decay": 0.99,
        "rmsprop_epsilon": 1e-10,
        "grad_clip": 0.1,
        "global_clip": None,
        "entropy_beta": 0.01,
        "value_weight": 1.0,
        "subtract_background": False,
        "filters": 32,
        "compute_dtype": "auto",
        "save_period": 20_000,
        "save_minutes": 10.0,
        "summary_period": 100,
        "stall_timeout": None,
    }


@pytest.mark.row(n=16)
@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_value_raises_naming_field_and_value(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert re.match(rf"{name} = '?{re.escape(str(value))}(\.0)?'?: must be ", str(error.value))


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_zero_is_taken_where_it_has_a_meaning(name):
    assert getattr(Config(**{name: 0}), name) == 0


def test_learning_rate_falls_to_a_tenth_in_a_line_over_half_of_the_iterations():
    config = Config(learning_rate=2e-3, max_iteration=1000)
    rates = [config.learning_rate_at(i) for i in (0, 250, 500, 750, 1000)]
    np.testing.assert_allclose(rates, [2e-3, 1.1e-3, 2e-4, 2e-4, 2e-4], rtol=1e-6)


def test_learning_rate_falls_over_the_updates_asked_for_whatever_max_iteration_is():
    for max_iteration in (1, 100, 10**6):
        config = Config(learning_rate=2e-3, max_iteration=max_iteration, annealing=100)
        rates = [config.learning_rate_at(i) for i in (0, 50, 100, 101, 10**6)]
        np.testing.assert_allclose(rates, [2e-3, 1.1e-3, 2e-4, 2e-4, 2e-4], rtol=1e-6)


def test_learning_rate_is_defined_for_a_single_iteration():
    assert Config(learning_rate=2e-3, max_iteration=1).learning_rate_at(0) == 2e-3


def test_weight_of_the_entropy_falls_with_the_learning_rate_where_asked():
    for anneal, expected in ((False, [0.02] * 4), (True, [0.02, 0.011, 0.002, 0.002])):
        config = Config(entropy_beta=0.02, annealing=100, anneal_entropy=anneal)
        np.testing.assert_allclose([config.entropy_beta_at(i) for i in (0, 50, 100, 10**6)], expected, rtol=1e-6)


@pytest.mark.parametrize("name", FACTORS)
def test_one_is_the_most_for_a_factor(name):
    assert getattr(Config(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", OPTIONAL)
def test_clips_and_the_frameskip_can_be_none_and_nothing_else(name):
    assert OPTIONAL == ["max_agent_steps", "frameskip", "reward_clip", "annealing", "grad_clip", "global_clip"]
    assert getattr(Config(**{name: None}), name) is None
    assert getattr(parse(f"--{name}", "none"), name) is None
    assert getattr(parse(f"--{name}=None"), name) is None


def test_texts_are_read_as_from_the_command_line():
    config = Config(num_threads="2", learning_rate="1e-3", grad_clip="0.5")
    assert (config.num_threads, config.learning_rate, config.grad_clip) == (2, 1e-3, 0.5)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value, meant", [(True, True), (False, False), ("true", True), ("False", False)])
def test_switches_are_true_or_false(name, value, meant):
    assert getattr(Config(**{name: value}), name) is meant
    assert getattr(parse(f"--{name}={value}"), name) is meant


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_the_type_of_their_field(name):
    wanted = int if name in COUNTS else float
    assert type(getattr(Config(**{name: 1}), name)) is wanted
    assert type(getattr(parse(f"--{name}", "1"), name)) is wanted


def test_log_dir_is_named_after_the_game_unless_it_is_given():
    assert Config(game="ALE/Pong-v5").folder == os.path.join("log", "ALE/Pong-v5")
    assert Config(game="ALE/Pong-v5", log_dir="here").folder == "here"
    config = Config()
    config.game = "Pong-v0"
    assert config.folder == os.path.join("log", "Pong-v0")


# Flags.


def test_command_line_without_flags_gives_the_defaults():
    assert parse() == Config()


def test_every_field_is_a_flag():
    values = {name: "0.5" if name not in COUNTS else "7" for name in NUMBERS}
    values |= dict.fromkeys(SWITCHES, "true")
    values |= {"game": "Pong-v0", "log_dir": "x", "device": "cpu", "compute_dtype": "bfloat16"}
    assert values.keys() == FIELDS.keys()
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    assert parse(*flags) == Config(**values)


@pytest.mark.row(n=16)
@pytest.mark.parametrize(
    "name, value", [(name, value) for name in NUMBERS for value in ("-1", "nan", "inf", "many", "", "true")]
)
def test_wrong_flag_exits_with_2_naming_field_and_value(name, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(f"--{name}={value}")
    assert stopped.value.code == 2
    assert re.search(rf"error: {name} = '?{value}(\.0)?'?: must be ", capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags", [["--num_worker", "3"], ["--num_thread", "3"], ["--lr=1"], ["3"], ["--num_threads"], ["--preset=slow"]]
)
def test_unknown_shortened_and_empty_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    assert stopped.value.code == 2
    assert flags[0].partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("preset", a3c.PRESETS)
def test_preset_gives_its_defaults_and_flags_go_before_it(preset):
    changed = a3c.PRESETS[preset]
    assert parse("--preset", preset) == Config(**changed)
    assert parse("--preset", preset, "--agents_per_thread=3") == Config(**{**changed, "agents_per_thread": 3})


def test_presets_are_the_original_which_changes_nothing_and_fast_which_does():
    assert list(a3c.PRESETS) == ["original", "fast"]
    assert a3c.PRESETS["original"] == {}
    defaults = dataclasses.asdict(Config())
    assert all(defaults[name] != value for name, value in a3c.PRESETS["fast"].items())


def test_every_flag_has_a_help_text_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        after = shown.partition(f"--{field.name} X ")[2]
        text, found, _ = after.partition(f" (default: {field.default})")
        assert found
        assert len(text) > 5
        assert "--" not in text
