"""Faults that are injected for real: what `docs/reliability.md` lists, beside the tests of each file.

Processes are killed, disks are full, bytes are flipped, an emulator waits for ever. A row of the table is run by
`pytest -m 'row(n=4)'`; long forms are marked slow.
"""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from ale_py import roms
from conftest import (
    ENDLESS,
    ROOT,
    FaultyEnv,
    Running,
    ScriptedEnv,
    checkpoints,
    last_iteration,
    newest,
    rows,
    run,
    use_games,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import DATA, INDEX, Run, equal
from test_config import COUNTS, FACTORS, FIELDS, MAY_BE_ZERO, NUMBERS, OPTIONAL, SWITCHES
from test_watching import watching

import a3c
import checkpoint
import groups
import startup
from a3c import Config
from async_agent import GroupAgent, Progress
from checkpoint import CheckpointError
from environment import find_game, make_watching_env
from network import ActorCritic
from startup import tf

STEPS = 4 * 5  # agent steps of an update of a tiny run
RARELY = "--save_period=1000000"


# Rows 1, 2, 3: signals.


@pytest.mark.row(n=1)
@pytest.mark.row(n=3)
@pytest.mark.parametrize(
    "number, expected, moment",
    [
        (signal.SIGINT, 130, "building"),
        (signal.SIGINT, 130, "training"),
        (signal.SIGTERM, 143, "training"),
        pytest.param(signal.SIGTERM, 143, "building", marks=pytest.mark.slow),
    ],
)
def test_signal_saves_prints_the_path_and_ends_within_ten_seconds(tmp_path, number, expected, moment):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, RARELY) as running:
        if moment == "building":
            running.wait_for(lambda: "building games: 0" in running.printed.read_text())
        else:
            running.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 1)
        status, output = running.send(number)
    assert status == expected
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) >= (4 if moment == "training" else 0)
    assert not list(folder.glob(".unfinished*"))


# The program, with a disk on which a save takes three seconds.
SLOW_DISK = """
import runpy, sys, time
from startup import tf
write = tf.train.Checkpoint.write
def slow(self, path):
    print("the save has begun", flush=True)
    time.sleep(1.5)
    written = write(self, path)
    time.sleep(1.5)
    return written
tf.train.Checkpoint.write = slow
runpy.run_path("a3c.py", run_name="__main__")
"""


@pytest.mark.row(n=2)
@pytest.mark.parametrize(
    "second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_second_signal_during_a_save_leaves_a_complete_checkpoint(trained, tmp_path, second):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    with Running(folder, ENDLESS, RARELY, program=("-c", SLOW_DISK)) as running:
        running.wait_for(lambda: len(rows(folder)) > 4)
        running.process.send_signal(signal.SIGINT)
        running.wait_for(lambda: "the save has begun" in running.printed.read_text())
        status, output = running.send(second)
    if second == signal.SIGKILL:
        assert status == -second
        assert last_iteration(folder) == newest(folder) == 6  # as before
    else:
        assert status == 130  # of the first one
        assert f"saved {folder}/last.ckpt" in output
        assert last_iteration(folder) == newest(folder) > 6
    again = Run(folder)
    assert again.resume() == f"{folder}/model.ckpt-{newest(folder)}"
    assert again.warnings == []


@pytest.mark.slow
@pytest.mark.row(n=2)
def test_hail_of_ctrl_c_while_every_update_is_saved(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, "--save_period=1") as running:
        running.wait_for(lambda: (folder / "progress.csv").exists() and len(rows(folder)) > 2)
        end = time.monotonic() + 10
        while "saved " not in running.printed.read_text() and running.process.poll() is None:
            assert time.monotonic() < end
            running.process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        status = running.process.wait(timeout=10)
    assert status == 130
    assert last_iteration(folder) == newest(folder) >= 6


# Row 4: killed at random moments.


@pytest.mark.row(n=4)
@pytest.mark.row(n=5)
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_the_newest_save(tmp_path, kills):
    """Each kill comes up to eight seconds after the packages are imported, in a run that saves about every second."""
    folder, rng = tmp_path / "run", np.random.default_rng()
    reached = games = scores = resumed = 0
    for kill in range(kills):
        with Running(folder, ENDLESS, "--save_period=40") as running:
            running.wait_for(lambda: "Training on" in running.printed.read_text())
            time.sleep(rng.uniform(0, 8))
            seen = newest(folder) if checkpoint.numbered(str(folder)) else 0  # what a user could have been told
            running.process.kill()
            running.process.wait()
        output = running.printed.read_text()
        if reached and "resumed" in output:
            assert f"resumed {folder}/model.ckpt-{reached}: {reached * STEPS:,} agent steps, {games:,} games" in output
            resumed += 1
        assert "damaged" not in output
        if not seen:
            continue

        copy = tmp_path / "copy"  # looked at here, mended by the program's own restart
        shutil.copytree(folder, copy)
        state, said = Run(copy), []
        state.progress = state.saver.progress = Progress(2, 4)
        state.saver.checkpoint = checkpoint.Saver(str(copy), state.shared, state.progress).checkpoint
        path = state.saver.resume(warn=said.append)
        assert all("has no .index file" in text for text in said), said  # never a damaged one
        saved = checkpoint.read(path)
        assert equal(state.state()[:10], [saved[key] for key in weight_keys()])
        assert all(np.all(np.isfinite(x)) for x in state.state())
        assert all(np.any(x != 1) for x in state.state()[10:])  # RMSProp's slots have moved
        progress = state.progress
        assert progress.iteration >= max(seen, reached)
        assert progress.agent_steps == progress.iteration * STEPS
        assert progress.episodes >= games
        assert progress.recent_scores().size >= scores
        reached, games, scores = progress.iteration, progress.episodes, progress.recent_scores().size
        shutil.rmtree(copy)
        print(f"kill {kill + 1}: iteration {reached}, {games} games")

    end = run(folder, f"--max_iteration={max(reached, 1)}")
    assert end.returncode == 0, end.stderr
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    expected = {"config.json", "progress.csv", "per-eps", ".lock"}
    expected |= {name + suffix for name in checkpoints(folder) for suffix in (DATA, INDEX)}
    assert names == expected  # nothing half-written is left
    print(f"{kills} kills, {resumed} restarts that said what they resumed, iteration {reached} reached")


def weight_keys():
    """Return the keys of a checkpoint that hold the network's variables, in the order of `trainable_variables`."""
    network = ActorCritic(4)
    names = {id(v): f"{kind}/{layer}" for kind in ("weights", "biases") for layer, v in getattr(network, kind).items()}
    return [names[id(v)] + "/.ATTRIBUTES/VARIABLE_VALUE" for v in network.trainable_variables]


# Row 6: full disks.


def own_mounts():
    """Return the words before a command that may mount disks nobody else sees; skip where the system forbids it."""
    words = ["unshare", "--map-root-user", "--mount"]
    with contextlib.suppress(FileNotFoundError):
        trial = [*words, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            return words
    pytest.skip("this system does not let a user mount a disk of their own")


# With a real, small disk on the folder: run until it is full, or fill it up; then resume on it.
SMALL_DISK = """
import json, subprocess, sys
sys.path.insert(0, "tests")
from conftest import ENDLESS, Running, checkpoints, newest, run
folder, size = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
if size == "200m":
    with Running(folder, ENDLESS) as running:
        running.wait_for(lambda: "iteration 12 " in running.printed.read_text())
        with open(folder + "/filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        status = running.process.wait(timeout=60)
        errors = running.printed.read_text()
    subprocess.run(["rm", folder + "/filler"], check=True)
else:
    process = run(folder, ENDLESS)
    status, errors = process.returncode, process.stderr
kept = checkpoints(folder)
again = run(folder, "--max_iteration=1")
print(json.dumps([status, errors, kept, again.returncode, again.stdout, again.stderr]))
"""


@pytest.mark.row(n=6)
@pytest.mark.parametrize(
    "size, saves",
    [pytest.param(size, n, marks=pytest.mark.slow) for size, n in (("20m", 1), ("40m", 1), ("200m", 3))] + [("56m", 2)],
)
def test_full_disk_ends_the_run_and_what_was_saved_is_resumed(tmp_path, size, saves):
    """A save takes 16 MB, and `last.ckpt` as much. Of the 200 MB another program takes the last byte during the run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = [*own_mounts(), sys.executable, "-c", SMALL_DISK, str(folder), size]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    status, errors, kept, again, output, more_errors = json.loads(process.stdout.splitlines()[-1])
    assert status == 1
    last = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()][-1]
    assert last.startswith(f"a3c.py: error: cannot {'write' if 'report' in last else 'save'} "), errors
    assert "No space left on device" in last
    numbers = [name for name in kept if name != "last.ckpt"]
    assert len(numbers) == saves
    assert again == 0, more_errors
    assert f"resumed {folder}/{numbers[0]}:" in output
    assert "damaged" not in output


@pytest.mark.slow
@pytest.mark.row(n=6)
def test_limit_on_file_size_ends_the_run_with_earlier_saves_untouched(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt*")}
    limit = (5_000_000, resource.RLIM_INFINITY)
    process = run(folder, ENDLESS, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"a3c.py: error: cannot save {folder}/model.ckpt-")
    assert ", earlier saves are intact: " in last
    assert {path.name: path.read_bytes() for path in folder.glob("*.ckpt*")} == before


COPY_FAILS = """
import errno, shutil, sys
sys.path.insert(0, "tests")
from startup import UserError
from test_checkpoint import Run
run = Run(sys.argv[1])
run.update(10)
run.saver.save()
run.update(20)
def fill_up(old, new):
    raise OSError(errno.ENOSPC, "No space left on device")
shutil.copyfile = fill_up
try:
    run.saver.save()
except UserError as error:
    print("UserError:", error)
"""


@pytest.mark.row(n=6)
def test_disk_that_is_full_before_the_copy_to_last_leaves_the_old_last(tmp_path):
    words = [sys.executable, "-c", COPY_FAILS, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"UserError: cannot save {tmp_path}/model.ckpt-20, earlier saves are intact: ")
    assert checkpoint.load_network(f"{tmp_path}/last.ckpt", 4)[1] == 10
    assert checkpoint.load_network(f"{tmp_path}/model.ckpt-20", 4)[1] == 20
    assert not list(tmp_path.glob(".unfinished*"))


# Row 7: log folders that cannot be used.


@pytest.mark.row(n=7)
@pytest.mark.parametrize("name", [".lock", "config.json", "progress.csv", "per-eps"])
def test_wrong_kind_of_file_in_the_log_folder_is_an_error_before_training(tmp_path, main, no_training, name):
    if name == "per-eps":
        (tmp_path / name).write_text("in place of a folder")
    else:
        (tmp_path / name).mkdir()
    status, _, errors = main(f"--log_dir={tmp_path}")
    assert status == 1
    assert errors.splitlines()[-1].startswith("a3c.py: error: ")
    assert str(tmp_path) in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.row(n=7)
def test_log_folder_that_the_system_refuses_is_an_error_before_training(main, no_training):
    status, _, errors = main("--log_dir=/proc/a3c/run")
    assert status == 1
    assert errors.startswith("a3c.py: error: ")
    assert "/proc/a3c" in errors


@pytest.mark.row(n=7)
@pytest.mark.row(n=22)
@pytest.mark.parametrize("program", ["a3c.py", "a3c-test.py"])
def test_disk_that_is_read_only_is_an_error_before_anything_is_played(trained, tmp_path, program):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    flags = [f"--log_dir={disk}"] if program == "a3c.py" else [f"--model={trained[0]}", f"--out={disk}"]
    words = [*own_mounts(), "sh", "-c", mount, str(disk), sys.executable, program, *flags, "--device=cpu"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{program}: error: ")
    assert "Read-only file system" in line
    assert str(disk) in line


# Row 8: every file of a checkpoint, damaged in every way.

POINTS = range(20)
DAMAGES = [f"{how} {point}" for how in ("truncated", "flipped") for point in POINTS] + ["emptied", "removed"]


def damage(path, how):
    """Damage a file: cut off or with one bit flipped at one of 20 points from its first byte to its last, or worse."""
    kind, _, point = how.partition(" ")
    content = bytearray(path.read_bytes())
    position = int(point or 0) * (len(content) - 1) // POINTS[-1]
    if kind == "removed":
        path.unlink()
    elif kind == "flipped":
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
    else:
        path.write_bytes(content[: position if kind == "truncated" else 0])


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """Return the folder of a run that saved after updates 20 and 30, its files, its states, and a run to resume in."""
    folder = tmp_path_factory.mktemp("two")
    first, states = Run(folder), {}
    for iteration in (20, 30):
        first.update(iteration)
        first.saver.save()
        states[iteration] = first.state()
    files = {path: path.read_bytes() for path in folder.iterdir()}
    return folder, files, states, Run(folder, seed=2)


@pytest.fixture
def intact(two_saves):
    """Return `two_saves` with all files as they were written."""
    for path, content in two_saves[1].items():
        path.write_bytes(content)
    return two_saves


@pytest.mark.row(n=8)
@pytest.mark.parametrize("suffix", [INDEX, DATA])
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damage_to_the_newest_checkpoint_is_named_and_the_one_before_resumed(intact, suffix, how):
    folder, _, states, other = intact
    for path in folder.glob("last.ckpt*"):
        path.unlink()
    damage(folder / ("model.ckpt-30" + suffix), how)
    other.update(99)
    said = []
    resumed = other.saver.resume(warn=said.append)
    if how.startswith("flipped") and not said:  # a bit that means nothing: the index ends with some
        assert suffix == INDEX
        assert resumed == str(folder / "model.ckpt-30")
        assert equal(other.state(), states[30])
        return
    assert resumed == str(folder / "model.ckpt-20")
    assert equal(other.state(), states[20])
    assert other.progress.iteration == 20
    (text,) = said
    assert str(folder / "model.ckpt-30") in text


@pytest.mark.row(n=8)
@pytest.mark.row(n=11)
@pytest.mark.parametrize("suffix", [INDEX, DATA])
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damage_to_the_checkpoint_to_be_watched_is_named_and_nothing_loaded(intact, suffix, how):
    folder, _, states, _ = intact
    damage(folder / ("last.ckpt" + suffix), how)
    try:
        network, _ = checkpoint.load_network(checkpoint.resolve(str(folder / "last.ckpt")), 4)
    except CheckpointError as error:
        assert "last.ckpt" in str(error)
    else:  # a bit that means nothing: the index ends with some
        assert how.startswith("flipped")
        assert suffix == INDEX
        assert equal([v.numpy() for v in network.trainable_variables], states[30][:10])


# Rows 12 and 14: an exception or a stall in any thread, at any place.

PLACES = ["environment step", "network step", "save"]
GROUPS = [0, *(pytest.param(middle, marks=pytest.mark.slow) for middle in (1, 2, 3))]


@pytest.fixture
def four_groups(monkeypatch):
    """Return a function that lets one of four groups do `fault()` at a place, once all groups are at work."""
    agents = []

    def inject(place, group, fault):
        def fault_in_time():
            if len(agents) == 4 and all(agent.steps > 10 for agent in agents):
                fault(agents[0].config)

        class Watched(GroupAgent):
            def __init__(self, index, *arguments):
                super().__init__(index, *arguments)
                agents.append(self)
                if (place, index) == ("network step", group):
                    rollout = self.rollout
                    self.rollout = lambda *arguments: (fault_in_time(), rollout(*arguments))[1]

        save = checkpoint.Saver.save

        def save_or_fail(self):
            if place == "save" and threading.current_thread().name == f"group {group}":
                fault_in_time()
            return save(self)

        here = place == "environment step"
        games = [FaultyEnv(fault_in_time if here and n == group else lambda: None) for n in range(4)]
        use_games(monkeypatch, *games)
        monkeypatch.setattr(groups, "GroupAgent", Watched)
        monkeypatch.setattr(checkpoint.Saver, "save", save_or_fail)

    return inject


def threads_of_groups():
    return [thread for thread in threading.enumerate() if thread.name.startswith("group")]


@pytest.mark.row(n=12)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("place", PLACES)
def test_exception_in_any_thread_stops_all_and_is_shown_and_the_run_saved(tmp_path, main, four_groups, place, group):
    def pull_the_cable(config):
        raise RuntimeError("cable pulled")

    four_groups(place, group, pull_the_cable)
    status, output, errors = main(f"--log_dir={tmp_path}", "--num_threads=4")
    assert status == 1
    assert "in pull_the_cable" in errors  # the original traceback
    assert errors.endswith(f"GroupFailure: group {group}, RuntimeError: cable pulled\n")
    assert f"saved {tmp_path}/last.ckpt" in output
    assert not threads_of_groups()
    state = Run(tmp_path)
    assert state.resume()
    assert state.progress.iteration == last_iteration(tmp_path) >= 4


@pytest.mark.row(n=14)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("place", PLACES)
def test_stall_of_any_thread_is_named_and_a_save_kept(tmp_path, main, monkeypatch, four_groups, place, group):
    over = threading.Event()

    def stall(config):
        config.stall_timeout = 3.0  # from here on, so that the groups' first steps may take their time
        over.wait(60)

    monkeypatch.setattr(groups, "STOP_GRACE", 0.2)
    monkeypatch.setattr(groups, "SAVE_GRACE", 0.2)
    four_groups(place, group, stall)
    try:
        status, output, errors = main(f"--log_dir={tmp_path}", "--num_threads=4")
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
    state = Run(tmp_path)
    assert state.resume()
    assert state.warnings == []
    assert state.progress.iteration >= 3


# The program, in which the emulators of the second group are asked for a step that nobody ordered: C++ waits for ever.
STALLED = """
import runpy
import environment
make, built = environment.make_training_envs, []
def make_and_stall(*arguments):
    envs = make(*arguments)
    built.append(envs)
    if len(built) == 2:
        step, taken = envs.step, []
        def step_or_stall(actions):
            taken.append(1)
            return step(actions) if len(taken) < 40 else envs.recv()
        envs.step = step_or_stall
    return envs
environment.make_training_envs = make_and_stall
runpy.run_path("a3c.py", run_name="__main__")
"""


@pytest.mark.row(n=14)
def test_emulator_that_waits_for_ever_in_native_code_is_named_and_the_process_ends(tmp_path):
    folder = tmp_path / "run"
    with Running(folder, ENDLESS, "--stall_timeout=10", program=("-c", STALLED)) as running:
        assert running.process.wait(timeout=60) == 1
        output = running.printed.read_text()
    assert "TimeoutError: group 1 has not taken a step for 10 s" in output
    assert f"saved {folder}/last.ckpt" in output
    assert last_iteration(folder) == newest(folder) >= 6


# Row 13: numbers that are not finite, in the whole program.


@pytest.mark.row(n=13)
@pytest.mark.parametrize("iteration, kept", [(8, ["model.ckpt-6", "model.ckpt-3"]), (6, ["model.ckpt-3"])])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_end_the_run_and_are_never_saved(
    tmp_path, main, monkeypatch, iteration, kept, value
):
    def make(*arguments):
        agent = GroupAgent(*arguments)
        update = agent.update

        def update_and_spoil(gradients, rate):
            update(gradients, rate)
            if agent.progress.iteration + 1 == iteration:
                for network in (agent.shared, agent.network):
                    network.biases["policy"].assign(tf.fill([4], value))

        agent.update = update_and_spoil
        return agent

    monkeypatch.setattr(groups, "GroupAgent", make)
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    status, output, errors = main(f"--log_dir={tmp_path}", "--num_threads=1", "--max_iteration=100")
    assert status == 1
    assert f"iteration {iteration}: not finite: policy_bias" in errors.splitlines()[-1]
    assert "saved" not in output
    assert checkpoints(tmp_path) == ["last.ckpt", *kept]
    assert checkpoint.load_network(f"{tmp_path}/{kept[0]}", 4)[1] == int(kept[0][-1])


# Row 15: games.


@pytest.mark.row(n=15)
@pytest.mark.parametrize("game", ["CartPole-v1", "breakout", "Pong", "*", "", "Breakout-v0 "])
def test_game_that_is_not_atari_ends_with_one_line_and_near_names(main, no_training, game):
    status, _, errors = main(f"--game={game}")
    assert status == 1
    (line,) = errors.splitlines()
    assert line.startswith(f"a3c.py: error: game = {game!r} is not ")
    assert "Did you mean" in line


# Row 16: every field, by thousands of values.

ABOUT = st.sampled_from(
    [0, 1, -1, 0.0, -0.0, 1.0, math.nextafter(1, 2), 5e-324, 2**31 - 2**20, 2**31 - 2**20 + 1, 2**31]
)
ANYTHING = st.one_of(
    ABOUT,
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
)
TEXTS = st.one_of(ABOUT.map(str), st.integers().map(str), st.floats().map(repr), st.text(max_size=8))
PARSER = a3c.config_parser("test")


def bounds(name):
    """Return the smallest and the largest number that a field takes."""
    low = 0 if name in MAY_BE_ZERO else 1 if name in COUNTS else math.ulp(0.0)
    return low, 1 if name in FACTORS else 2**31 - 2**20


def check_taken(name, given_value, taken):
    """Check what a field took: a number of its type and in its bounds, the one that was given; or a text."""
    if name in SWITCHES:
        assert type(taken) is bool and str(taken).lower() == str(given_value).lower()
    elif name not in NUMBERS:
        assert type(taken) is str and (taken == given_value or (name == "log_dir" and given_value == ""))
    elif taken is None:
        assert name in OPTIONAL and str(given_value).lower() == "none"
    else:
        low, high = bounds(name)
        assert type(taken) is (int if name in COUNTS else float)
        assert low <= taken <= high
        assert type(given_value) in (int, float, str)
        assert taken == (int if name in COUNTS else float)(given_value)


@pytest.mark.row(n=16)
@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=ANYTHING)
def test_any_value_is_taken_rightly_or_refused_by_name(name, value):
    try:
        taken = getattr(Config(**{name: value}), name)
    except ValueError as error:
        assert str(error).startswith(f"{name} = ")
        assert ": must be " in str(error)
        assert isinstance(value, str) or repr(value) in str(error)
    else:
        check_taken(name, value, taken)


@pytest.mark.row(n=16)
@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_any_flag_is_taken_rightly_or_ends_with_2_and_its_name(name, text):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = a3c.config_from(PARSER, PARSER.parse_args([f"--{name}={text}"]))
    except SystemExit as stopped:
        assert stopped.code == 2
        assert f"error: {name} = " in errors.getvalue()
        assert ": must be " in errors.getvalue()
    else:
        check_taken(name, text, getattr(config, name))


@pytest.mark.row(n=16)
@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_numbers_in_bounds_are_taken_and_those_outside_refused(name, data):
    low, high = bounds(name)
    kind = st.integers if name in COUNTS else st.floats
    inside = data.draw(kind(low, high))
    assert getattr(Config(**{name: inside}), name) == inside
    assert getattr(a3c.config_from(PARSER, PARSER.parse_args([f"--{name}={inside!r}"])), name) == inside
    outside = data.draw(kind(max_value=low).filter(lambda x: x < low) | kind(high).filter(lambda x: x > high))
    with pytest.raises(ValueError, match=f"^{name} = "):
        Config(**{name: outside})


# Rows 17 and 18: devices.


@pytest.mark.row(n=17)
def test_device_auto_says_which_it_took(tmp_path, main, monkeypatch):
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    status, output, _ = main(f"--log_dir={tmp_path}", "--num_threads=1", "--max_iteration=1", "--device=auto")
    assert status == 0
    assert "Training on GPU:0" in output if tf.config.list_physical_devices("GPU") else "Training on CPU:0" in output


@pytest.mark.row(n=18)
@pytest.mark.parametrize("group", GROUPS)
def test_memory_that_runs_out_in_a_thread_says_what_to_lower(tmp_path, main, four_groups, group):
    """Simulated: TensorFlow's error is raised where the network is computed; no GPU is filled."""

    def run_out(config):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64,84,84,4]")

    four_groups("network step", group, run_out)
    status, output, errors = main(f"--log_dir={tmp_path}", "--num_threads=4")
    assert status == 1
    assert errors.splitlines()[-1] == (
        "a3c.py: error: out of memory: lower --agents_per_thread or --num_threads, or use another --device"
    )
    assert f"saved {tmp_path}/last.ckpt" in output
    assert last_iteration(tmp_path) >= 3


@pytest.mark.row(n=18)
@pytest.mark.parametrize("module, part", [(a3c, "SharedNetwork"), (groups, "GroupAgent")])
def test_memory_that_runs_out_while_building_says_what_to_lower(trained, tmp_path, main, monkeypatch, module, part):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)

    def run_out(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[7744,256]")

    monkeypatch.setattr(module, part, run_out)
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    status, _, errors = main(f"--log_dir={folder}", ENDLESS)
    assert status == 1
    assert "lower --agents_per_thread or --num_threads" in errors.splitlines()[-1]
    assert last_iteration(folder) == newest(folder) == 6


# Row 22: watching.


def watch(*flags, **environment):
    words = [sys.executable, "a3c-test.py", "--device=cpu", "--iter=1", *flags]
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.row(n=22)
@pytest.mark.parametrize("display", ["", ":99"])
def test_window_without_a_display_ends_before_playing_with_the_way_out(trained, tmp_path, display):
    """`:99` is a display that is named but is not there."""
    process = watch(f"--model={trained[0]}", f"--out={tmp_path}", "--render", DISPLAY=display, WAYLAND_DISPLAY="")
    assert process.returncode in (1, 2)
    assert "play.mp4" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "results.json").exists() or not (tmp_path / "results.json").read_bytes()


@pytest.mark.row(n=22)
@pytest.mark.parametrize("name", ["results.json", "play.mp4", ""])
def test_output_that_cannot_be_written_ends_before_playing(trained, tmp_path, name):
    if name:
        (tmp_path / name).mkdir()
    process = watch(f"--model={trained[0]}", f"--out={tmp_path if name else '/proc/a3c'}")
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    assert lines[-1].startswith("a3c-test.py: error: ")
    assert (name or "/proc/a3c") in lines[-1]
    assert "Traceback" not in process.stderr
    assert "game 1" not in process.stdout


# Row 23: packages.


@pytest.fixture
def start_with(tmp_path):
    """Return a function that starts a command where only `packages`, name -> version, seem to be installed."""

    def start(program: list[str], packages):
        for name, version in packages.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        words = [sys.executable, "-S", *program]  # without the packages that are installed
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return start


def one_line(process):
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.row(n=23)
@pytest.mark.parametrize("package", startup.REQUIRED)
@pytest.mark.parametrize("state", ["missing", "too old", "too old to count"])
def test_package_that_is_missing_or_too_old_is_named_in_one_line(start_with, package, state):
    others = {name: oldest for name, oldest in startup.REQUIRED.items() if name != package}
    oldest = startup.REQUIRED[package]
    version = {"too old": "0.9.9rc1", "too old to count": "0"}.get(state)
    line = one_line(start_with(["a3c.py"], {**others, package: version} if version else others))
    found = f"{version} is too old" if version else "is not installed"
    assert line == f"{package} {found}: {package}>={oldest} is needed. Run: pip install -r requirements.txt"


@pytest.mark.row(n=23)
@pytest.mark.parametrize("program", ["a3c.py", "a3c-test.py", "plot.py", "benchmarks.bench"])
def test_every_command_checks_its_packages_first(start_with, program):
    words = [program] if program.endswith(".py") else ["-m", program]
    assert one_line(start_with(words, {})).startswith("tensorflow is not installed")


@pytest.mark.row(n=23)
@pytest.mark.parametrize("found", ["2.21.0", "2.21", "2.21.0rc1", "2.22.dev20260101", "3", "10.0.1+local"])
def test_versions_that_are_new_enough_are_taken(monkeypatch, found):
    monkeypatch.setattr(startup.importlib.metadata, "version", lambda package: found)
    startup.check_packages({"tensorflow": "2.21"})


# Row 24: weeks of training, in small.


@pytest.mark.slow
@pytest.mark.row(n=24)
def test_weeks_of_training_keep_memory_threads_and_files_flat(tmp_path):
    """Half an hour of the real program, or WEEKS_MINUTES; its first tenth is warm-up."""
    minutes = float(os.environ.get("WEEKS_MINUTES", "30"))
    folder, samples = tmp_path / "run", []  # of (minutes, MB, threads, open files)
    flags = ["--agents_per_thread=16", "--summary_period=100", "--save_period=1000"]
    start = time.monotonic()
    with Running(folder, ENDLESS, *flags) as running:
        process = Path(f"/proc/{running.process.pid}")
        while (now := (time.monotonic() - start) / 60) < minutes:
            time.sleep(min(10, minutes))
            assert running.process.poll() is None, running.printed.read_text()
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            memory, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
            samples.append((now, memory, threads, len(os.listdir(process / "fd"))))
            if len(samples) % 6 == 0:
                print("minute {:.0f}: {:.1f} MB, {} threads, {} open files".format(*samples[-1]), flush=True)
        status, output = running.send(signal.SIGINT)
    assert status == 130
    flat = [sample for sample in samples if sample[0] > minutes / 10]
    third = len(flat) // 3
    early, late = (statistics.median(sample[1] for sample in part) for part in (flat[:third], flat[-third:]))
    table = rows(folder)
    hours = float(table[-1]["seconds"]) / 3600
    events = sum(path.stat().st_size for path in folder.rglob("events.*"))
    kilobytes = {"progress.csv": (folder / "progress.csv").stat().st_size, "TensorBoard": events, "screen": len(output)}
    print(f"{len(samples)} samples, {table[-1]['iteration']} updates in {hours * 60:.1f} minutes")
    print(f"memory {early:.1f} MB in the first third after warm-up, {late:.1f} MB in the last")
    for what, size in kilobytes.items():
        print(f"{what}: {size / len(table):.0f} bytes a row, {size / 1024 / hours:.0f} KB an hour at {len(table)} rows")
    assert abs(late - early) < 0.02 * early
    for index in (2, 3):  # threads; open files, which a save may add to for a moment
        counts = [sample[index] for sample in flat]
        assert statistics.median(counts[:third]) == statistics.median(counts[-third:])
        assert max(counts[-third:]) <= max(counts) <= min(counts) + (0 if index == 2 else 3)
    assert len(checkpoints(folder)) == 4  # three and the last
    assert all(size / len(table) < 3000 for size in kilobytes.values())


# Every game.

GAMES = {
    spec.kwargs["game"]: key
    for key, spec in gymnasium.registry.items()
    if spec.entry_point == "ale_py.env:AtariEnv" and key.startswith("ALE/")
}
SAMPLE = ["pitfall", "video_chess"]


TWO_PLAYERS = {"combat", "joust", "maze_craze", "warlords"}  # ale-py ships them, and registers no game for one player


def test_every_rom_is_a_registered_game_or_for_two_players_only():
    assert set(roms.get_all_rom_ids()) == set(GAMES) | TWO_PLAYERS
    for rom in TWO_PLAYERS:
        with pytest.raises(ValueError, match=r"is not known\. Did you mean"):
            find_game(f"ALE/{rom.title().replace('_', '')}-v5")


@pytest.mark.parametrize(
    "rom", [pytest.param(rom, marks=() if rom in SAMPLE else pytest.mark.slow) for rom in sorted(GAMES)]
)
def test_every_game_trains_for_three_updates_and_is_watched_for_fifty_steps(tmp_path, main, rom):
    game = GAMES[rom]
    flags = ["--num_threads=1", "--agents_per_thread=2", "--max_iteration=3"]
    status, output, errors = main(f"--log_dir={tmp_path}", f"--game={game}", *flags)
    assert status == 0, errors
    assert f"saved {tmp_path}/last.ckpt" in output
    network, iteration = checkpoint.load_network(f"{tmp_path}/last.ckpt", find_game(game).num_actions)
    assert iteration == 3
    screens = []
    with contextlib.closing(gymnasium.wrappers.TimeLimit(make_watching_env(find_game(game)), 50)) as env:
        score, _ = watching.play_game(env, network, seed=0, policy="softmax", epsilon=0.0, film=screens.append)
    assert np.isfinite(score)
    assert 1 <= len(screens) <= 50
    assert screens[0].shape[2] == 3
