"""Faults that are injected for real: what `docs/reliability.md` lists, beside the tests of each file.

Disks are full, threads fail or stall, an emulator waits for ever. `pytest -m 'row(n=4)'` runs a row of the table. Long
forms are marked slow.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import typing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from ale_py import roms
from conftest import (
    ENDLESS,
    Running,
    ScriptedEnv,
    checkpoints,
    ended,
    files,
    last_iteration,
    limited_files,
    newest,
    own_mounts,
    refusal,
    resumed,
    rows,
    use_games,
    watching,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import a3c
import checkpoint
import groups
import startup
from a3c import Config
from async_agent import GroupAgent
from environment import find_game, make_watching_env
from startup import tf

# With a real, small disk on the folder: run until it is full, then resume on it.
SMALL_DISK = """
import json, subprocess, sys
sys.path.insert(0, "tests")
from conftest import ENDLESS, checkpoints, command, ended
folder, size = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
full, kept = ended(command(folder, ENDLESS)), checkpoints(folder)
print(json.dumps([full, kept, ended(command(folder, "--max_iteration=1"))]))
"""


@pytest.mark.row(n=6)
@pytest.mark.parametrize(
    "size, saves", [pytest.param(*case, marks=pytest.mark.slow) for case in (("20m", 1), ("40m", 1), ("56m", 2))]
)
def test_full_disk_ends_the_run_and_what_was_saved_is_resumed(tmp_path, size, saves):
    """A save takes 16 MB, and `last.ckpt` as much."""
    status, printed, errors = ended([*own_mounts(), sys.executable, "-c", SMALL_DISK, str(tmp_path), size], seconds=240)
    assert status == 0, errors
    full, kept, (status, output, errors) = json.loads(printed.splitlines()[-1])
    assert status == 0, errors
    assert re.match(r"cannot (save|write the report) .*No space left on device", refusal(full))
    numbers = [name for name in kept if name != "last.ckpt"]
    assert len(numbers) == saves
    assert f"resumed {tmp_path}/{numbers[0]}:" in output
    assert "damaged" not in output


@pytest.mark.row(n=6)
@pytest.mark.row(n=36)
def test_limit_on_file_size_ends_the_run_with_one_line_and_earlier_saves_untouched(trained_copy, main, monkeypatch):
    before = files(trained_copy)
    use_games(monkeypatch, *(ScriptedEnv(np.zeros([5, 4])) for _ in range(2)))
    with limited_files(5_000_000):
        line = refusal(main(f"--log_dir={trained_copy}", ENDLESS))
    assert line.startswith(f"cannot save {trained_copy}/model.ckpt-")
    assert ", earlier saves are intact: " in line
    assert files(trained_copy) == before


@pytest.mark.row(n=6)
def test_disk_that_is_full_when_a_run_begins_is_one_line(tmp_path, main, no_training):
    with limited_files(0):
        line = refusal(main(f"--log_dir={tmp_path}/run"))
    assert line.startswith(f"log_dir = '{tmp_path}/run': ")


@pytest.mark.row(n=7)
@pytest.mark.parametrize(
    "folder, in_the_way",
    [
        *(("", name) for name in (".lock/", "config.json/", "progress.csv/", "per-eps")),
        *((folder, "file") for folder in ("file", "file/below", "/proc/a3c")),
    ],
)
def test_log_folder_that_cannot_be_used_is_an_error_before_training(tmp_path, main, no_training, folder, in_the_way):
    if in_the_way.endswith("/"):
        (tmp_path / in_the_way).mkdir()
    else:
        (tmp_path / in_the_way).touch()
    assert str(tmp_path / folder) in refusal(main(f"--log_dir={tmp_path / folder}"))


@pytest.mark.row(n=7)
@pytest.mark.row(n=22)
@pytest.mark.parametrize(
    "program, flag", [("a3c.py", "log_dir"), pytest.param("a3c-test.py", "out", marks=pytest.mark.slow)]
)
def test_disk_that_is_read_only_is_an_error_before_anything_is_played(tmp_path, program, flag):
    mount = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    words = [sys.executable, program, f"--{flag}={tmp_path}", "--device=cpu"]
    line = refusal(ended([*own_mounts(), "sh", "-c", mount, str(tmp_path), *words]), program)
    assert "Read-only file system" in line
    assert str(tmp_path) in line


GROUPS = [0, pytest.param(1, marks=pytest.mark.slow)]


@pytest.fixture
def train_with(main, monkeypatch, tmp_path):
    """Return a function that trains two groups, of which one does `fault()` at a place once all are at work."""

    def train(place, group, fault):
        agents, save = [], checkpoint.Saver.save

        def fault_in_time():
            if len(agents) == 2 and all(agent.steps > 10 for agent in agents):
                fault(agents[0].config)

        class Watched(GroupAgent):
            def __init__(self, index, *arguments):
                super().__init__(index, *arguments)
                agents.append(self)
                if index == group and place == "building":
                    fault(self.config)
                if index == group and place in ("step", "rollout"):
                    method = getattr(self, place)
                    setattr(self, place, lambda *arguments: (fault_in_time(), method(*arguments))[1])

        def save_or_fail(self):
            if place == "save" and threading.current_thread().name == f"group {group}":
                fault_in_time()
            return save(self)

        use_games(monkeypatch, *(ScriptedEnv(np.zeros([5, 4])) for _ in range(2)))
        monkeypatch.setattr(groups, "GroupAgent", Watched)
        monkeypatch.setattr(checkpoint.Saver, "save", save_or_fail)
        return main(f"--log_dir={tmp_path}")

    return train


def threads_of_groups():
    return [thread for thread in threading.enumerate() if thread.name.startswith("group")]


OOM = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64,84,84,4]")
LESS = "lower --agents_per_thread, --num_threads, --filters or --lstm, or use another --device"
ADVICE = f"a3c.py: error: out of memory: {LESS}"


@pytest.mark.row(n=12)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "place, error, said",
    [
        *((place, RuntimeError("cable pulled"), ", RuntimeError: cable pulled") for place in ("step", "save")),
        # Raised only: no GPU is filled.
        *(pytest.param(place, OOM, ADVICE, marks=pytest.mark.row(n=18)) for place in ("building", "rollout")),
    ],
)
def test_exception_in_any_thread_is_shown_and_the_run_saved(tmp_path, train_with, place, group, error, said):
    def pull_the_cable(config):
        raise error

    status, output, errors = train_with(place, group, pull_the_cable)
    assert status == 1
    assert "in pull_the_cable" in errors  # the original traceback
    assert (f"GroupFailure: group {group}, " in errors) == (place != "building")
    assert errors.endswith(f"{said}\n")
    assert f"saved {tmp_path}/last.ckpt" in output
    assert not threads_of_groups()
    assert resumed(tmp_path).iteration == last_iteration(tmp_path) >= (0 if place == "building" else 4)


@pytest.mark.row(n=14)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("place", ["rollout", "save", pytest.param("step", marks=pytest.mark.slow)])
def test_stall_of_any_thread_is_named_and_a_save_kept(tmp_path, monkeypatch, train_with, place, group):
    over = threading.Event()

    def stall(config):
        config.stall_timeout = 3.0  # from here on, so that the groups' first steps may take their time
        over.wait(60)

    monkeypatch.setattr(groups, "STOP_GRACE", 0.2)
    monkeypatch.setattr(groups, "SAVE_GRACE", 0.2 if place == "save" else 20)
    try:
        status, output, errors = train_with(place, group, stall)
    finally:
        over.set()
        for thread in threads_of_groups():
            thread.join(timeout=30)
    assert status == 1
    saving = ", which is saving," if place == "save" else ""
    assert f"TimeoutError: group {group}{saving} has not taken a step for 3 s" in errors
    if place == "save":  # the thread keeps the network locked
        assert "the checkpoint before this stays" in errors.splitlines()[-1]
    else:
        assert f"saved {tmp_path}/last.ckpt" in output
    assert resumed(tmp_path).iteration >= 3


# The program, in which the emulators of group 1 are asked for a step that nobody ordered: C++ waits for ever.
STALLED = """
import runpy
import groups
class Stalled(groups.GroupAgent):
    def step(self, action):
        if self.index == 1 and self.steps >= 40:
            self.config.stall_timeout = 3.0  # from here on, so that the groups' first steps may take their time
            self.envs.recv()
        return super().step(action)
groups.GroupAgent, groups.STOP_GRACE = Stalled, 1.0
runpy.run_path("a3c.py", run_name="__main__")
"""


@pytest.mark.row(n=14)
def test_emulator_that_waits_for_ever_in_native_code_is_named_and_the_process_ends(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, program=("-c", STALLED)) as running:
        assert running.process.wait(timeout=90) == 1
    assert "TimeoutError: group 1 has not taken a step for 3 s" in running.printed.read_text()
    assert f"saved {folder}/last.ckpt" in running.printed.read_text()
    assert last_iteration(folder) == newest(folder) >= 6


@pytest.mark.row(n=15)
@pytest.mark.parametrize(
    "game, said",
    [
        *((name, "is not known. Did you mean .*Breakout-v0") for name in ("Breakout", "breakout", "Breakout-v0 ", "")),
        *((name, "is not known. Did you mean .*Pong-v0") for name in ("Pong", "Pnog-v0")),
        ("CartPole-v1", r"is not an Atari game. Did you mean \w+-v\d"),
        ("*", "is not "),
    ],
)
def test_game_that_is_not_atari_ends_with_one_line_and_near_names(main, no_training, game, said):
    line = refusal(main(f"--game={game}"))
    assert re.match(f"game = {re.escape(repr(game))} {said}", line)
    assert "Did you mean" in line


BOUNDS = {}  # of each number: its type, the least and the most, and whether None is taken too
for _name, _hint in typing.get_type_hints(Config, include_extras=True).items():
    _optional = type(None) in typing.get_args(_hint)
    _hint = typing.get_args(_hint)[0] if _optional else _hint
    if typing.get_origin(_hint) is typing.Annotated:
        BOUNDS[_name] = _hint.__origin__, *_hint.__metadata__[0], _optional

ABOUT = st.sampled_from([0, 1, -1, 0.0, -0.0, 1.0, math.nextafter(1, 2), 5e-324, 2**31 - 2**20, 2**31 - 2**20 + 1])
NUMBERS = ABOUT | st.integers() | st.integers(1, 2**31 - 2**20) | st.floats() | st.floats(0, 1)
OTHERS = st.text(max_size=8) | st.booleans() | st.none() | st.binary(max_size=3) | st.lists(st.integers(), max_size=2)
ANYTHING = NUMBERS | OTHERS | st.decimals() | st.fractions() | st.complex_numbers()


@pytest.mark.row(n=16)
@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(value=ANYTHING)
def test_any_value_is_taken_rightly_or_refused_by_name(name, value):
    kind, low, high, optional = BOUNDS[name]
    if (value is None and optional) or (type(value) in (int, kind) and low <= value <= high):
        taken = getattr(Config(**{name: value}), name)
        assert taken == value
        assert type(taken) is (kind if value is not None else type(None))
    else:
        with pytest.raises(startup.UserError) as error:
            Config(**{name: value})
        assert re.match(f"{name} = {re.escape(repr(value))}(.0)?: must be ", str(error.value))


@pytest.mark.row(n=16)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.sampled_from([*BOUNDS]), text=NUMBERS.map(repr) | st.text(max_size=8) | st.just("None"))
def test_any_flag_is_taken_rightly_or_ends_with_2_and_its_name(name, text):
    kind, low, high, optional = BOUNDS[name]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            taken = getattr(a3c.parse_config([f"--{name}={text}"]), name)
    except SystemExit as stopped:
        assert stopped.code == 2
        assert name in errors.getvalue()
    else:
        assert (optional and text == "None") if taken is None else (low <= taken == kind(text) <= high)


@pytest.mark.row(n=22)
@pytest.mark.parametrize(
    "display",
    [":99", pytest.param("", marks=pytest.mark.slow)],  # named, but not there; none
)
def test_window_that_cannot_be_had_ends_before_playing(tmp_path, display):
    words = [sys.executable, "a3c-test.py", "--device=cpu", "--iter=1", f"--out={tmp_path}", "--render"]
    status, output, errors = ended(words, env={**os.environ, "DISPLAY": display, "WAYLAND_DISPLAY": ""})
    assert "Leave it out and look at play.mp4 instead" in refusal((status, output, errors), "a3c-test.py")
    assert "game with seed" not in output


@pytest.mark.row(n=23)
@pytest.mark.parametrize(
    "program, package, version",
    [
        (["a3c.py"], [*startup.REQUIRED][-1], "0.9.9rc1"),
        *((words, "numpy", None) for words in (["a3c.py"], ["a3c-test.py"], ["plot.py"], ["-m", "benchmarks.bench"])),
    ],
)
def test_package_that_is_missing_or_too_old_is_named_in_one_line(tmp_path, program, package, version):
    for name, found in {**startup.REQUIRED, package: version}.items():
        if found:
            folder = tmp_path / f"{name.replace('-', '_')}-{found}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    words = [sys.executable, "-S", *program]  # without the packages that are installed
    status, _, errors = ended(words, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    state, oldest = f"{version} is too old" if version else "is not installed", startup.REQUIRED[package]
    assert status == 1
    assert errors == f"{package} {state}: {package}>={oldest} is needed. Run: pip install -r requirements.txt\n"


@pytest.mark.row(n=23)
@pytest.mark.parametrize(
    "version, is_enough",
    [
        *((version, True) for version in ("2.21.0", "2.21", "2.21.0rc1", "2.22.dev20260101", "3", "10.0.1+local")),
        *((version, False) for version in ("0", "0.9.9rc1", "2.20.9", "2")),
    ],
)
def test_only_versions_that_are_new_enough_are_taken_of_every_package(monkeypatch, version, is_enough):
    for package in startup.REQUIRED:
        found = {**startup.REQUIRED, package: version}
        monkeypatch.setattr(startup.importlib.metadata, "version", found.get)
        with contextlib.nullcontext() if is_enough else pytest.raises(SystemExit, match=f"^{package} {version} is too"):
            startup.check_packages({**startup.REQUIRED, package: "2.21"})


@pytest.mark.slow
@pytest.mark.row(n=24)
def test_weeks_of_training_keep_memory_threads_and_files_flat(tmp_path):
    """Half an hour of the real program, or WEEKS_MINUTES; its first tenth is warm-up."""
    minutes = float(os.environ.get("WEEKS_MINUTES", "30"))
    folder, samples, start = tmp_path / "run", [], time.monotonic()  # samples of MB, threads, open files
    with Running(folder, ENDLESS, "--agents_per_thread=16", "--summary_period=100", "--save_steps=80000") as running:
        process = Path(f"/proc/{running.process.pid}")
        while (now := (time.monotonic() - start) / 60) < minutes:
            time.sleep(min(10, minutes))
            assert running.process.poll() is None, running.printed.read_text()
            if now > minutes / 10:
                state = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                memory, threads = int(state["VmRSS"].split()[0]) / 1024, int(state["Threads"])
                samples.append((memory, threads, len(os.listdir(process / "fd"))))
        status, output = running.send(signal.SIGTERM)  # `pytest &` ignores SIGINT
    assert status == 143
    early, *_, late = (np.median(third, axis=0) for third in np.array_split(samples, 3))
    table = rows(folder)
    events = sum(path.stat().st_size for path in folder.rglob("events.*"))
    sizes = {"progress.csv": (folder / "progress.csv").stat().st_size, "TensorBoard": events, "screen": len(output)}
    print(f"{len(samples)} samples, {table[-1]['iteration']} updates in {table[-1]['seconds']} s, {len(table)} rows")
    print(f"MB, threads, open files: {early} in the first third after warm-up, {late} in the last")
    print("bytes a row:", {what: round(size / len(table)) for what, size in sizes.items()})
    assert abs(late[0] - early[0]) < 0.02 * early[0]
    assert list(late[1:]) == list(early[1:])
    assert np.all(np.ptp(samples, axis=0)[1:] <= [0, 3])  # a save may open files for a moment
    assert len(checkpoints(folder)) == 4  # three and the last
    assert all(size / len(table) < 3000 for size in sizes.values())


ATARI = "ale_py.env:AtariEnv"
GAMES = [key for key, spec in gymnasium.registry.items() if spec.entry_point == ATARI and key.startswith("ALE/")]
SAMPLE = ["ALE/Pitfall-v5", "ALE/VideoChess-v5"]
TWO_PLAYERS = {"combat", "joust", "maze_craze", "warlords"}  # ale-py ships them, and registers no game for one player


def test_every_rom_is_a_registered_game_or_for_two_players_only():
    assert set(roms.get_all_rom_ids()) == {gymnasium.spec(name).kwargs["game"] for name in GAMES} | TWO_PLAYERS
    for rom in TWO_PLAYERS:
        with pytest.raises(ValueError, match=r"is not known\. Did you mean"):
            find_game(f"ALE/{rom.title().replace('_', '')}-v5")


@pytest.mark.row(n=17)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in GAMES]
)
def test_every_game_trains_for_three_updates_and_is_watched_for_fifty_steps(tmp_path, main, name):
    game, screens = find_game(name), []
    flags = ["--num_threads=1", "--agents_per_thread=2", "--max_iteration=3", "--device=auto"]
    status, output, errors = main(f"--log_dir={tmp_path}", f"--game={game.id}", *flags)
    assert status == 0, errors
    assert f"Training on {'GPU:0' if tf.config.list_physical_devices('GPU') else 'CPU:0'}" in output
    assert f"saved {tmp_path}/last.ckpt" in output
    network, iteration = checkpoint.load_network(f"{tmp_path}/last.ckpt", game.num_actions)
    assert iteration == 3
    with contextlib.closing(gymnasium.wrappers.TimeLimit(make_watching_env(game), 50)) as env:
        flags, decide = watching.Flags(iter=1, policy="softmax"), functools.partial(watching.decide, network)
        ((score, _, _),) = watching.play_games([env], decide, network.initial_state(1), flags, film=screens.append)
    assert np.isfinite(score)
    assert 1 <= len(screens) <= 50
    assert screens[0].screen.shape[2] == 3
