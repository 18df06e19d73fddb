"""What several tests share: TensorFlow set up as the program does, games whose course is known, the program at work."""

import startup  # isort: skip  # first: it sets TensorFlow up

import collections
import contextlib
import csv
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a3c
import checkpoint
import groups
import plot
from a3c import Config
from network import SharedNetwork
from progress import Progress
from startup import tf

startup.choose_device("cpu", num_groups=2)  # it cannot be set later


def pytest_itemcollected(item):
    """Note the rows of the fault table that a test belongs to, for the summary below and for `--junitxml`."""
    item.user_properties.append(("rows", [mark.kwargs["n"] for mark in item.iter_markers("row")]))


def pytest_terminal_summary(terminalreporter):
    """Print how many cases of each row of `docs/reliability.md` ran, and how they ended."""
    counts = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in dict(getattr(report, "user_properties", [])).get("rows", []):
                counts[row][outcome] += 1
    if counts:
        terminalreporter.section("faults injected")
    for row, outcomes in sorted(counts.items()):
        ended = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"row {row:2}: {ended}")


class ScriptedEnv(gymnasium.vector.VectorEnv):
    """B games that pay and end by a script, whatever is played, and that restart in the same step.

    Args:
      rewards: [S, B] raw rewards of the steps; after the last step the script starts again.
      ends, cuts: [S, B] bool, whether a game is over (terminated) or is cut off (truncated) with the step.
      lives: [S, B] left after the step.
    """

    def __init__(self, rewards, ends=None, cuts=None, lives=None):
        self.rewards = np.asarray(rewards, np.float64)
        shape = steps, self.num_envs = self.rewards.shape
        self.ends, self.cuts = (np.zeros(shape, bool) if x is None else np.asarray(x, bool) for x in (ends, cuts))
        self.lives = np.zeros(shape, np.int32) if lives is None else np.asarray(lives, np.int32)
        # What `reset` and then the steps show. Noise, nowhere black.
        self.frames = np.random.default_rng(0).integers(1, 256, [steps + 1, self.num_envs, 84, 84], np.uint8)
        self.actions = []  # of the steps so far, each [B]
        self.seeds = []  # of the resets so far

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return self.frames[0][:, None], {}

    def step(self, actions):
        now = len(self.actions) % len(self.rewards)
        self.actions.append(np.array(actions))
        return (
            self.frames[now + 1][:, None],
            self.rewards[now],
            self.ends[now],
            self.cuts[now],
            {"lives": self.lives[now]},
        )


@pytest.fixture
def make_config(tmp_path):
    """Return a function that makes the Config of a small one-thread run into `tmp_path`."""

    def make(**fields):
        small = {
            "log_dir": str(tmp_path),
            "device": "cpu",
            "num_threads": 1,
            "agents_per_thread": 2,
            "max_iteration": 1000,
        }
        return Config(**{**small, **fields})

    return make


# The program in a process of its own.

ROOT = Path(__file__).parent.parent
TINY = ["--num_threads=2", "--agents_per_thread=4", "--summary_period=2", "--save_steps=60", "--device=cpu"]
ENDLESS = "--max_iteration=None"
LONG = "--max_iteration=3000"  # for what must end before; in this process nobody would end it
RARELY = "--save_steps=1000000000"
SMALL = ["--num_threads=1", "--agents_per_thread=2", ENDLESS, RARELY]


def command(folder, *flags, program=("a3c.py",)):
    return [sys.executable, *program, *TINY, f"--log_dir={folder}", *flags]


def run(folder, *flags, **options):
    """Run the program to its end."""
    words = command(folder, *flags)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options)


class Running:
    """The program at work in the background, for a `with` block; killed at its end if it still runs."""

    def __init__(self, folder, *flags, program=("a3c.py",), **options):
        self.folder, self.printed = folder, Path(f"{folder}-output.txt")  # not a pipe: nobody empties it
        with open(self.printed, "w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, **options}
            self.process = subprocess.Popen(command(folder, *flags, program=program), cwd=ROOT, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def wait_for(self, condition, seconds=60):
        """Return once `condition()` holds; the program must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.printed.read_text()
            assert time.monotonic() < end, self.printed.read_text()
            time.sleep(0.1)

    def send(self, number):
        """Send a signal; return the exit status, which must come within 10 s, and all that was printed."""
        self.process.send_signal(number)
        return self.process.wait(timeout=10), self.printed.read_text()

    def goes_on(self, updates=10):
        """Return once it has made so many updates more."""
        self.wait_for(lambda: has_rows(self.folder))
        before = iterations(self.folder)[-1]
        self.wait_for(lambda: iterations(self.folder)[-1] >= before + updates)

    def ends_saved(self):
        """End it; check that this takes less than ten seconds and that all is saved."""
        before = iterations(self.folder)[-1]
        assert self.send(signal.SIGTERM)[0] == 128 + signal.SIGTERM
        assert last_iteration(self.folder) == newest(self.folder) >= before


def rows(folder):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def iterations(folder):
    return [int(row["iteration"]) for row in rows(folder)]


def checkpoints(folder):
    names = [os.path.basename(path) for path in checkpoint.all_checkpoints(str(folder))]
    return sorted(names, key=lambda name: name != "last.ckpt")  # which goes first, then the newest


def last_iteration(folder):
    """Return after how many updates `last.ckpt` was saved; every tensor of it is read."""
    return checkpoint.read(str(Path(folder) / "last.ckpt"))[1]


def newest(folder):
    """Return the number of the newest checkpoint."""
    return int(checkpoint.numbered(str(folder))[0].rpartition("-")[2])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the folder of a finished run of six updates and its process."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, "--max_iteration=6")


# The program in this process.


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs the command line in this process: status, what it printed, its errors."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background pytest would ignore it, and so the run

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["a3c.py", *TINY, *flags])
        status = a3c.main()
        return status, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def play(main, monkeypatch, tmp_path):
    """Return a function that trains one group in `tmp_path`/run in this process, with games that cost no time."""

    def call(*flags, games=None):
        use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])) if games is None else games)
        return main(f"--log_dir={tmp_path}/run", "--num_threads=1", "--filters=4", RARELY, *flags)

    return call


@pytest.fixture
def no_training(monkeypatch):
    """Let the test fail if games are built."""
    monkeypatch.setattr(groups, "make_training_envs", lambda *_: pytest.fail("training started"))


class FaultyEnv(ScriptedEnv):
    """Four games that pay nothing and, from the 31st step on, do `fault()`."""

    def __init__(self, fault):
        super().__init__(np.zeros([5, 4]))
        self.fault = fault

    def step(self, actions):
        if len(self.actions) >= 30:
            self.fault()
        return super().step(actions)


def heads(network, history):
    """Return a network's logits and values of games that begin with `history`."""
    return network(history, network.initial_state(len(history)))[:2]


def use_games(monkeypatch, *envs):
    """Let the groups play `envs`, which show frames, not screens."""
    waiting, games_of = list(envs), groups.games_of

    @contextlib.contextmanager
    def small_games_of(*arguments):
        with games_of(*arguments) as (agent_class, make_envs, _):
            yield agent_class, make_envs, (84, 84)

    monkeypatch.setattr(groups, "games_of", small_games_of)
    monkeypatch.setattr(groups, "make_training_envs", lambda *_: waiting.pop(0))


# Runs that save without games, the files of a run, and disks that nobody else sees.


class Resumable:
    """A network, its progress and the saver of both. No two of different seeds have equal weights."""

    def __init__(self, folder, seed=1, num_actions=4, **options):
        self.shared = SharedNetwork(num_actions, 0.99, seed, **options)
        self.progress = Progress(2, 3)
        self.saver = checkpoint.Saver(str(folder), self.shared, self.progress)
        self.warnings = []

    def save(self, iteration):
        """Change weights, RMSProp's slots and progress as training would, and save them."""
        self.update(iteration)
        return self.saver.save()

    def update(self, iteration):
        gradients = [tf.fill(v.shape, 0.3) for v in self.shared.trainable_variables]
        self.shared.apply_gradients(gradients, np.float32(1e-3))
        self.progress.iteration, self.progress.agent_steps = iteration, iteration * 10

    def resume(self):
        return self.saver.resume(warn=self.warnings.append)

    def state(self):
        return [v.numpy() for v in (*self.shared.trainable_variables, *tf.nest.flatten(self.shared.slots))]


def resumed(folder):
    """Return the progress of the newest save, which must be complete."""
    state = Resumable(folder)
    assert state.resume() == checkpoint.numbered(str(folder))[0]
    assert state.warnings == []
    return state.progress


def refusal(ended, program="a3c.py"):
    """Return what a program says at its end where it refuses something; `ended`: status, what it printed, errors."""
    status, _, errors = ended
    assert status == 1
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert line.startswith(f"{program}: error: ")
    return line.removeprefix(f"{program}: error: ")


def ended(words, seconds=120, **options):
    """Run a command to its end in the project's folder: status, what it printed, its errors."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": seconds, **options}
    process = subprocess.run(words, **options)
    return process.returncode, process.stdout, process.stderr


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.ckpt*")}


def equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.fixture
def trained_copy(trained, tmp_path):
    """Return a folder with a copy of the finished run `trained`."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@contextlib.contextmanager
def limited_files(size):
    """Let a write beyond so many bytes of a file fail, as on a full disk, in this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def own_mounts():
    """Return the words before a command that may mount disks nobody else sees; skip where the system forbids it."""
    words = ["unshare", "--map-root-user", "--mount"]
    with contextlib.suppress(FileNotFoundError):
        trial = [*words, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            return words
    pytest.skip("this system does not let a user mount a disk of their own")


# What a run reports.


def has_rows(folder, number=2):
    """Return whether `progress.csv` has so many rows."""
    return (Path(folder) / "progress.csv").exists() and len(rows(folder)) >= number


def tensorboard(folder):
    """Return the curves that TensorBoard shows of a folder's files: tag -> points with step and value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


# The programs that are not modules of the package, and their pictures.

SHIPPED = ROOT / "models/breakout-v0"
OLD = ROOT / "models/breakout-v0-fast"  # its config.json is of an older version
watching = importlib.import_module("a3c-test")  # no name that `import` can say


@pytest.fixture
def draw(monkeypatch):
    """Return a function that runs plot.py in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
        plot.main()

    return call


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that plot.py saves from now on."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved
