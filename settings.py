"""Settings are the fields of a dataclass: their types hold their bounds, each is a flag, and config.json keeps them."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import typing
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from startup import UserError, as_user_error

if TYPE_CHECKING:
    from progress import Progress

CONFIG = "config.json"  # in the folder of a run or of a shipped agent
LARGEST = 2**31 - 2**20  # seeds and counts are int32 further on, after small numbers have been added


class Bounds(NamedTuple):
    """The least and the most that a setting's number may be, both included."""

    low: float
    high: float = LARGEST


Count = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(1, 4096)]  # of what is built one by one: a game takes 65 ms, and no signal ends that
Steps = Annotated[int, Bounds(1, 10**15)]
CountOrZero = Annotated[int, Bounds(0)]
Unroll = Annotated[int, Bounds(1, 256)]  # of what the graph has one by one: 0.1 s each, and no signal ends that
Positive = Annotated[float, Bounds(1e-30)]  # stays above zero in float32
PositiveOrZero = Annotated[float, Bounds(0.0)]
Fraction = Annotated[float, Bounds(0.0, 1.0)]
PositiveFraction = Annotated[float, Bounds(math.ulp(0.0), 1.0)]


def check_settings(settings) -> None:
    """Check each field of a dataclass by its type. NumPy's numbers, paths, and whole numbers for floats are taken too.

    Raises:
      UserError: names the first wrong field, its value and what it must be.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        value = value.item() if hasattr(value, "item") else value  # of NumPy
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if optional := type(None) in typing.get_args(hint):
            hint = typing.get_args(hint)[0]
        hint = Annotated[hint, Bounds(-LARGEST)] if hint in (int, float) else hint
        if typing.get_origin(hint) is typing.Literal:
            valid, wanted = value in typing.get_args(hint), "one of " + ", ".join(typing.get_args(hint))
        elif typing.get_origin(hint) is Annotated:
            kind, (low, high) = typing.get_args(hint)
            value = float(value) if kind is float and type(value) is int and abs(value) <= LARGEST else value
            valid = type(value) is kind and low <= value <= high  # also false for NaN
            least = "above 0" if low == math.ulp(0.0) else f"from {low:,.10g}"
            wanted = f"a whole number {least} to {high:,}" if kind is int else f"a number {least} to {high:.2g}"
        else:
            valid, wanted = type(value) is hint, "a text" if hint is str else "True or False"
        if not (valid or (optional and value is None)):
            raise UserError(f"{name} = {value!r}: must be {wanted}{', or None' * optional}")
        setattr(settings, name, value)


def parse_flags(default, flags: Sequence[str], about: str):
    """Return `default`, a dataclass, with what flags change: one for each field, whose comment is its help.

    Values are written as in Python. A wrong flag ends the program with status 2 and a message that names it.
    """
    import tyro  # imported late, so that a missing package gets the message of startup.py

    options = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
    return tyro.cli(type(default), default=default, args=flags, description=about, **options)


def names_in(flags: Sequence[str]) -> set[str]:
    """Return the names of the settings that flags give."""
    return {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}


def read_config(path: str) -> dict:
    """Return what a run's `config.json` says. Raises UserError if it is missing or damaged."""
    try:
        config = json.loads(Path(path).read_text())
        given, history = config.get("given", []), config.get("history", [])
        texts = [config["game"], *given]  # what everything needs
        if not (isinstance(given, list) and isinstance(history, list) and all(isinstance(x, str) for x in texts)):
            raise ValueError("it is not as this program wrote it")
        if "annealing" in config:  # of an older version, whose lengths counted updates
            batch = config["agents_per_thread"] * config["unroll_step"]
            lengths = {"annealing_steps": "annealing", "save_steps": "save_period", "max_agent_steps": "max_iteration"}
            for name, was in lengths.items():
                if config.get(was) and not config.get(name):
                    config[name] = config[was] * batch
            if "given" in config:
                config["given"] = [*config["given"], *lengths]
        if "anneal_entropy" in config:  # of one between: the entropy fell along with the learning rate
            length = config.get("annealing_steps") or config["max_agent_steps"] // 2
            config["entropy_annealing_steps"] = length if config["anneal_entropy"] else None
            if "anneal_entropy" in config.get("given", []):
                config["given"] = [*config["given"], "entropy_annealing_steps"]
        return config
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}. Move it away to go on without what it says") from error


def write_json(path: str, content: dict) -> None:
    """Write a file such as `config.json`, whole or not at all. Raises UserError where that is impossible."""
    with as_user_error(f"cannot write {path}"):
        unfinished = Path(path).with_name(".unfinished.json")
        unfinished.write_text(json.dumps(content, indent=2))
        unfinished.replace(path)


def check_game(config) -> None:
    """Raise UserError where the config.json of a run that is to be resumed names another game."""
    path = os.path.join(config.log_dir, CONFIG)
    if os.path.exists(path) and (game := read_config(path)["game"]) != config.game:
        raise UserError(f"game = {config.game!r}: {config.log_dir} holds a run of {game}. Use --log_dir")


def note_config(config, progress: "Progress", resuming: bool, given: Set[str]) -> Callable[[], None]:
    """Print what is not as by default, and what has changed since a run was left; return what saves it all."""
    path = os.path.join(config.log_dir, CONFIG)
    new, history = {**dataclasses.asdict(config), "versions": versions()}, []
    differ = [f.name for f in dataclasses.fields(config) if new[f.name] != f.default and f.name != "log_dir"]
    shown = ", ".join(f"{name} = {new[name]}" for name in differ)
    print(f"settings that differ from the defaults: {shown or 'none'}")
    if resuming and os.path.exists(path):
        old = read_config(path)
        history = old.get("history", [])
        if was := {k: old[k] for k in new if old.get(k, new[k]) != new[k] and k != "log_dir"}:
            history.append({"iteration": progress.iteration, "agent_steps": progress.agent_steps, "was": was})
        for name in was:
            print(f"changed since the last run: {name} from {was[name]} to {new[name]}")
    elif resuming:
        print(f"there is no {path}: what the run was given is not known, so all but the flags is as by default")
    content = {**new, "given": sorted(({*differ} | given) & new.keys()), "history": history}
    return lambda: write_json(path, content)


def check_path(name: str, path: str) -> None:
    """Raise UserError for a path that TensorFlow would take for a pattern, or that is not UTF-8."""
    if any(character in "*?[]\\\0" or "\ud800" <= character <= "\udfff" for character in path):
        raise UserError(f"{name} = {path!r}: must be a path in UTF-8 without any of * ? [ ] \\")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ("tensorflow", "gymnasium", "ale-py", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
