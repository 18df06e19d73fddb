"""Train an agent to play an Atari game by A3C: edit a hyperparameter below, run `python a3c.py`, watch the curve.

Four threads each play 64 games for 5 steps on their own copy of one network, make one gradient of these steps, apply it
to the shared network as soon as no other does, and copy its weights back. The threads' loop is in `async_agent.py`,
the network and its update in `network.py`, starting and stopping in `groups.py`.

A second run in the same log folder resumes the first, with the settings that flags or a preset gave it. Only a new flag
changes those; an edited default counts for all others. Changes are reported and noted in `config.json`.

Source: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning"; hiwonjoon/tf-a3c-gpu.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import argparse
import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Sequence, Set
from typing import Literal

import checkpoint
import settings
from environment import Game, find_game
from groups import Groups, run_folder
from network import SharedNetwork, choose_dtype
from progress import Progress
from report import Report
from settings import Count, CountOrZero, Fraction, Positive, PositiveFraction, PositiveOrZero, Size, Steps, Unroll
from startup import UserError, tf


@dataclasses.dataclass
class Config:
    """Every hyperparameter, with the original's defaults. Each is also a flag: `--num_threads 2 --grad_clip None`.

    An agent step is one action in one game. An update, the original's iteration, has 64 games * 5 steps = 320 of them.
    """

    game: str = "Breakout-v0"  # any Atari id of ale-py: Pong-v0, SpaceInvaders-v4, ALE/MsPacman-v5
    log_dir: str = ""  # folder of the run, `~` is your home; empty means log/<game>
    initial_model: str = ""  # checkpoint, or folder of a run, whose weights a new run begins with; empty means random
    device: str = "auto"  # where the network lives: auto (a GPU if there is one), cpu, gpu, gpu:N
    random_seed: CountOrZero = 113  # weights, games and actions; with one thread a run repeats bit for bit

    num_threads: Size = 4  # groups of games, each with a thread and a copy of the network
    agents_per_thread: Size = 64  # games in a group
    ray_address: str | None = None  # games on a Ray cluster: auto, local, HOST:PORT, ray://HOST:PORT; docs/scaling.md
    unroll_step: Unroll = 5  # agent steps of each game per update
    max_agent_steps: Steps = 320_000_000  # agent steps in all: the original's 1,000,000 updates
    max_iteration: Count | None = None  # updates in all; None is no limit
    frameskip: Count | None = None  # emulator frames per agent step; None is the game's own
    random_frameskip: bool = False  # draw it at random for each step, if the game's id does so; False takes its mean
    max_pool: bool = False  # a frame is the maximum of a step's last two: shows what flickers (ALE/Asteroids-v5)
    noop_max: CountOrZero = 0  # before a game do nothing for a random number of emulator frames, up to this
    fire_reset: bool = False  # press FIRE once at the start of each game, if it has that
    discount_factor: PositiveFraction = 0.99  # gamma: what a reward one agent step later counts for
    gae_lambda: Fraction = 1.0  # lambda of generalised advantage estimation; 1 is the plain n-step return
    life_loss_ends_return: bool = False  # a lost life ends the return as if the game were over; it goes on
    reward_clip: Positive | None = 1.0  # learn from rewards clipped to -this..this; None: raw scores

    learning_rate: Positive = 2.5e-4  # at the start; falls in a straight line to a tenth, where it stays
    annealing_steps: Steps | None = None  # agent steps over which the rate falls; None is half of the run
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # each has its own best learning_rate
    decay: Fraction = 0.99  # of RMSProp's mean square, per update
    rmsprop_epsilon: Positive = 1e-10  # added to the mean square, inside the root
    adam_epsilon: Positive = 1e-5  # added to Adam's root of the mean square
    grad_clip: Positive | None = 0.1  # limit of each gradient tensor's L2 norm / number of elements; None: no limit
    global_clip: Positive | None = None  # limit of the L2 norm of all gradients together; None: no limit
    entropy_beta: PositiveOrZero = 0.01  # weight of the policy's entropy in the loss, at the start
    entropy_annealing_steps: Steps | None = None  # agent steps over which it falls to a tenth, too; None: it stays
    value_weight: PositiveOrZero = 1.0  # weight of the value loss in the loss
    average_window: Fraction = 0.0  # also keep an average network, two thirds of it of this last part; 0: do not

    subtract_background: bool = False  # subtract the background's grey level from the pixels (Pong needs it)
    input_scale: Literal["raw", "unit"] = "raw"  # raw: pixels of 0..255; unit: of 0..1, and initial weights to match
    network: Literal["original", "pooled", "deep"] = "original"  # first filters 8x8, pooled: 5x5, deep: 5x5 and 3x3
    filters: Count = 32  # filters of the first convolution; the others have twice as many
    lstm: CountOrZero = 0  # units of an LSTM, a memory, after the hidden layer; 0: none. Use input_scale = unit
    last_action: bool = False  # the network also gets what was done last, which the screen shows only frames later
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the copies; auto: bfloat16 if the CPU has it

    save_steps: Steps = 6_400_000  # agent steps between checkpoints; the newest three are kept
    save_minutes: Positive = 10.0  # save at least this often, in minutes
    summary_period: Count = 100  # updates between lines of the report, of progress.csv and of TensorBoard
    stall_timeout: Positive = 300.0  # save and end the run if a group makes no step for so many seconds

    def __post_init__(self):
        """Check every field. Raises UserError, a ValueError, naming the first wrong field and its value."""
        settings.check_settings(self)
        settings.check_path("log_dir", self.log_dir)

    @property
    def folder(self) -> str:
        """The folder of the run."""
        return os.path.expanduser(self.log_dir) or os.path.join("log", self.game)

    @property
    def steps_per_update(self) -> int:
        """Agent steps that one update learns from."""
        return self.agents_per_thread * self.unroll_step

    @property
    def total_steps(self) -> int:
        """Agent steps of the whole run, whichever limit comes first, if all its updates have today's size."""
        return min(self.max_agent_steps, self.steps_per_update * (self.max_iteration or self.max_agent_steps))

    def is_finished(self, progress: Progress) -> bool:
        """Return whether a run that has come so far is over."""
        return progress.agent_steps >= self.max_agent_steps or progress.iteration >= (self.max_iteration or math.inf)

    def learning_rate_at(self, agent_steps: int) -> float:
        """Return the learning rate of the update after so many agent steps."""
        return self.learning_rate * _annealed(agent_steps, self.annealing_steps or self.total_steps / 2)

    def entropy_beta_at(self, agent_steps: int) -> float:
        """Return the entropy's weight of the update after so many agent steps."""
        return self.entropy_beta * _annealed(agent_steps, self.entropy_annealing_steps or math.inf)

    def average_rate_at(self, agent_steps: int) -> float:
        """Return how far the average network goes towards the newest with the update after so many steps, 0 to 1.

        So after n updates the network of update k has a share that grows with k ** (1 / average_window - 1), and those
        of the last `average_window` of the run have two thirds together.
        """
        return 1 / max(1.0, self.average_window * (agent_steps / self.steps_per_update + 1))


def _annealed(agent_steps: int, length: float) -> float:
    """Return what is left, 1 to 0.1, of what falls over so many agent steps."""
    return 1.0 - 0.9 * min(1.0, agent_steps / length)


# What `--preset` changes. What each change does to the score and to the speed is in docs/results.md.
PRESETS = {
    "original": {},
    "fast": {  # a good score sooner
        "agents_per_thread": 32,  # more updates for the same agent steps
        "life_loss_ends_return": True,  # the agent learns sooner what a life is worth
        "subtract_background": True,  # nothing changes where it is black, as in Breakout; Pong does not learn without
        "filters": 16,  # a third faster
        "learning_rate": 3e-4,
        "annealing_steps": 10_000_000,
        "entropy_annealing_steps": 10_000_000,
        "global_clip": 2.0,  # a burst of large gradients does not break the policy
    },
}
PRESETS["strong"] = PRESETS["fast"] | {  # a better score in more time, on the game as it is registered
    "random_frameskip": True,
    "agents_per_thread": 16,
    "network": "deep",  # sees better where the ball is, and where it goes
    "annealing_steps": 12_000_000,
    "entropy_annealing_steps": 3_000_000,  # random moves spoil long games
    "global_clip": 20.0,  # gradients of long games are larger: a tighter clip takes most from those of lost lives
    "average_window": 0.1,  # the newest network wanders
}


def parse_config(flags: Sequence[str], given: dict | None = None) -> Config:
    """Return the Config that flags ask for: one for each field, and `--preset`, which is for new runs.

    What no flag says is as it was `given` to the run that goes on, or in a new run (None) as in the preset; else as in
    Config. A wrong flag ends the program with status 2 and a message on stderr that names it; `--help` ends it with the
    list of all.
    """
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=PRESETS, default="original")
    chosen, others = preset.parse_known_args(flags)
    about = f"Train an agent by A3C. --preset {{{','.join(PRESETS)}}} sets the defaults of a new run."
    return settings.parse_flags(Config(**(PRESETS[chosen.preset] if given is None else given)), others, about)


def given_to_run(folder: str) -> dict | None:
    """Return the settings that the run in a folder was given by flags or a preset; None where there is no run."""
    path = os.path.join(folder, settings.CONFIG)
    if not (checkpoint.all_checkpoints(folder) and os.path.exists(path)):
        return None
    saved = settings.read_config(path)
    given = saved.get("given", [name for name in saved if saved[name] != getattr(Config, name, None)])
    return {k: saved[k] for k in given if k in Config.__dataclass_fields__ and k in saved and k != "log_dir"}


def train(config: Config) -> int:
    """Train until `max_agent_steps` or a signal, resuming what the log folder holds. Return the exit status.

    A resumed run takes the config as it is here; `main` adds to it what the run was given. What differs is reported.

    Raises:
      UserError: no such game or device, the log folder cannot be used, or it holds a run that cannot be resumed.
      GroupFailure: an exception in a thread, which it names; TimeoutError: a group stalled.
    Whatever happens, the newest complete checkpoint stays, and a last one is saved if the network is sound.
    """
    signals = []
    with startup.uninterrupted(signals.append):
        return _train(config, signals)


def _train(config: Config, signals: list[int], given: Set[str] = frozenset()) -> int:
    game, device = game_and_device(config)
    config = dataclasses.replace(config, log_dir=config.folder)
    with run_folder(config.log_dir) as check, tf.device(device):
        shared = make_network(config, game, device)
        progress = Progress(config.num_threads, config.agents_per_thread)
        saver = checkpoint.Saver(config.log_dir, shared, progress, check=check)
        print(f"{game.describe()}. Training on {device.strip('/')} in {shared.copies_dtype}, into {config.log_dir}")
        if checkpoint.all_checkpoints(config.log_dir):
            settings.check_game(config)
        resumed = saver.resume(warn=print)
        if resumed:
            ignored = ". initial_model is for new runs only" * bool(config.initial_model)
            print(f"resumed {resumed}: {progress.agent_steps:,} agent steps, {progress.episodes:,} games{ignored}")
        elif config.initial_model:
            initial = checkpoint.resolve(config.initial_model)
            print(f"weights of {initial} after {checkpoint.load_weights(initial, shared):,} updates; all else is new")
        keep_config = settings.note_config(config, progress, resumed is not None, given)
        if not resumed:
            keep_config()  # else once all games have begun: a flag with which a run cannot go on does not stay
        if config.is_finished(progress):
            limits = f"max_iteration = {config.max_iteration}, max_agent_steps = {config.max_agent_steps}"
            done = f"iteration {progress.iteration:,}, {progress.agent_steps:,} agent steps"
            print(f"nothing to do: {done}. To go on, lift the limits: {limits}")
            return 0
        report = Report(config, progress, check)
        return Groups(config, shared, progress, saver, report, signals, on_begun=keep_config).run(game, device)


def game_and_device(config: Config) -> tuple[Game, str]:
    """Return the game to play and the TensorFlow device to compute on; raises UserError where there is none such."""
    names = "frameskip", "random_frameskip", "max_pool", "noop_max", "fire_reset"
    game = find_game(config.game, **{name: getattr(config, name) for name in names})
    return game, startup.choose_device(config.device, config.num_threads)


def make_network(config: Config, game: Game, device: str) -> SharedNetwork:
    """Return the network to train, with its initial weights."""
    return SharedNetwork(
        num_actions=game.num_actions,
        decay=config.decay,
        seed=config.random_seed,
        epsilon=config.adam_epsilon if config.optimizer == "adam" else config.rmsprop_epsilon,
        copies_dtype=choose_dtype(config.compute_dtype, device),
        optimizer=config.optimizer,
        average=config.average_window > 0,
        filters=config.filters,
        background=game.background if config.subtract_background else 0,
        lstm=config.lstm,
        last_action=config.last_action,
        input_scale=config.input_scale,
        network=config.network,
    )


def main() -> int:
    """Run the command line: flags name a folder, and beat what a run there was given. Return the exit status."""
    signals, flags = [], sys.argv[1:]
    with startup.uninterrupted(signals.append):
        try:
            folder = parse_config(flags).folder  # must be known before what its run was given, such as another game
            given = given_to_run(folder)
            if given is not None and "preset" in settings.names_in(flags):
                print("--preset is for new runs, and does nothing here. For a new run use another --log_dir")
            given_now = {*(given or ()), *settings.names_in(flags)} - {"log_dir"}
            config = parse_config(flags, given if given is None else {**given, "log_dir": folder})
            return _train(config, signals, given_now)
        except UserError as error:
            print(f"a3c.py: error: {error}", file=sys.stderr)
        except Exception as error:
            traceback.print_exc()
            if isinstance(error.__cause__ or error, tf.errors.ResourceExhaustedError):
                advice = "lower --agents_per_thread, --num_threads, --filters or --lstm, or use another --device"
                print(f"a3c.py: error: out of memory: {advice}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    os._exit(main())  # not sys.exit: a thread that hangs in native code or in an output would keep Python from ending
