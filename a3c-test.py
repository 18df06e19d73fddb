"""Watch a trained agent play: `python a3c-test.py --model ./models/breakout-v0/last.ckpt --out /tmp/result`.

Plays the registered Gymnasium environment, up to 16 games side by side, with its random frame-skip and sticky actions,
unless the agent's run was given another frame-skip, start of a game or kind of frame. Prints the raw score of every
game, and writes `results.json` (anew after each game) and a video, `play.mp4`.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import collections
import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

import a3c
import checkpoint
import settings
from environment import Game, empty_history, find_game, history_to_frames, make_watching_env, preprocess, push_frame
from film import Moment, open_film
from network import ActorCritic
from original import OriginalFrames
from startup import UserError, as_user_error, tf

ROWS = 16  # games in a call of the network. Always as many, if need be empty ones: the last digits depend on it


@dataclasses.dataclass
class Flags:
    """Watch a trained agent play. These flags say what and how."""

    model: str = "./models/breakout-v0/last.ckpt"  # a checkpoint, or the folder of a run: its newest one
    out: str = "/tmp/result"  # folder for results.json and play.mp4
    game: str | None = None  # an Atari id of ale-py; None is the one in the config.json beside the checkpoint
    device: str = "auto"  # auto, cpu, gpu or gpu:N
    iter: settings.Count = 100  # games to play
    newest: bool = False  # play the newest weights, also where the run has kept an average of them (average_window)
    policy: Literal["greedy", "softmax"] = "greedy"  # the likeliest action, or one drawn from the policy
    epsilon: settings.Fraction = 0.01  # share of random actions in the greedy policy; 0.01 as in the original
    seed: settings.CountOrZero = 0  # game i is played with seed + i
    frameskip: settings.Count | None = None  # emulator frames per agent step; None is the run's, else the game's own
    film: settings.CountOrZero = 1  # games in the video, from the first one on
    explain: bool = False  # the video also shows what the agent sees, chooses and expects
    render: bool = False  # show ALE's window, at the speed of the console

    def __post_init__(self):
        settings.check_settings(self)


def open_window(game: Game, obs_type: str) -> gymnasium.Env:
    """Build the game with a window. Raises UserError if no display can show one."""
    if sys.platform == "linux":
        os.environ.setdefault("SDL_VIDEODRIVER", "x11,wayland")  # else SDL draws nowhere if there is no display
    try:
        if sys.platform == "linux" and not (os.getenv("DISPLAY") or os.getenv("WAYLAND_DISPLAY")):
            raise RuntimeError("DISPLAY is not set")
        return make_watching_env(game, "human", obs_type)
    except RuntimeError as error:
        raise UserError(f"--render: no display answers: {error}. Leave it out and look at play.mp4 instead") from error


def choose_action(logits: np.ndarray, policy: str, epsilon: float, rng: np.random.Generator) -> int:
    """Return an action for logits [A]: drawn from their softmax, or the likeliest but for a share of random ones."""
    if not np.all(np.isfinite(logits)):
        raise UserError("the network's logits are not finite: this checkpoint cannot play")
    if policy == "softmax":
        probabilities = np.exp(logits - logits.max(), dtype=np.float64)
        return int(rng.choice(len(logits), p=probabilities / probabilities.sum()))
    return int(rng.integers(len(logits))) if rng.random() < epsilon else int(logits.argmax())


def play_game(env: gymnasium.Env, seed: int, policy: str, epsilon: float, film: Callable | None = None) -> Generator:
    """Play a game to its end. Yields what it shows, whether that is its beginning and the action that led to it.

    It is sent what the network makes of that: logits [A], value, history [84, 84] uint32. Returns the raw score, and
    what it was at each loss of a life; nothing where the game has no lives. `film` is called with moments.
    """
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    score, lives, lives_lost_at, is_first, ended, action = 0.0, info["lives"], [], True, False, 0
    while not ended:
        screen = env.unwrapped.ale.getScreenRGB() if film else None
        logits, value, history = yield observation, is_first, action
        action = choose_action(logits, policy, epsilon, rng)
        observation, reward, terminated, truncated, info = env.step(action)
        is_first, ended, life_lost = False, terminated or truncated, info["lives"] < lives
        if film:
            frames = history_to_frames(history).numpy()
            film(Moment(screen, frames, logits, value, score, lives, action, reward, ended, life_lost))
        score, lives = score + float(reward), info["lives"]
        if life_lost:
            lives_lost_at.append(score)
    return score, lives_lost_at


def decide(network: ActorCritic, history, state, actions, observations, is_first):
    """Return the new history and state, logits [B, A] and values [B] of B games with `observations` [B, H, W] uint8.

    They are what the last `actions` [B] int32 led to, but where a game begins, which `is_first` [B] bool says.
    """
    history = push_frame(history, preprocess(observations), is_first)
    state = tf.where(is_first[:, None], 0.0, network.remember(state, actions))
    games, others = history.shape[0], [0, ROWS - history.shape[0]]
    logits, values, state = network(tf.pad(history, [others, [0, 0], [0, 0]]), tf.pad(state, [others, [0, 0]]))
    return history, state[:games], logits[:games], values[:games]


def play_games(
    envs: Sequence, network: Callable, state: tf.Tensor, flags: Flags, film: Callable | None = None, signals=()
):
    """Play all games, side by side in `envs`, until a signal is in `signals`. `state` [B, S] is the network's.

    Yields (score, lives lost at, seed) of each game as it ends. The first environment plays those for the film.

    In each round all games advance by a step, in threads: each, a generator, is sent what the network made of what it
    showed last, acts, and yields what it shows now. Then one call of the network is for all.
    """
    seeds, ended = range(flags.seed, flags.seed + flags.iter), collections.deque()
    filmed, others = seeds[: flags.film], iter(seeds[flags.film :])

    def play_in_turn(env: gymnasium.Env, seeds: Iterable[int]) -> Generator:
        for seed in seeds:
            score, lives_lost_at = yield from play_game(
                env, seed, flags.policy, flags.epsilon, film if seed in filmed else None
            )
            ended.append((score, lives_lost_at, seed))

    first = itertools.chain(filmed, others)
    games = {index: play_in_turn(env, others if index else first) for index, env in enumerate(envs)}
    observations = np.zeros([len(envs), *envs[0].observation_space.shape], np.uint8)
    history, outputs = empty_history(len(envs)), [None] * len(envs)
    is_first, actions = np.ones(len(envs), bool), np.zeros(len(envs), np.int32)

    def advance(index: int) -> None:
        try:
            observations[index], is_first[index], actions[index] = games[index].send(outputs[index])
        except StopIteration:
            del games[index]

    with ThreadPoolExecutor(startup.available_cores()) as pool:  # ALE lets go of Python's global lock
        while games and not signals:
            list((pool.map if len(envs) > 1 else map)(advance, list(games)))  # a window belongs to the main thread
            while ended:
                yield ended.popleft()
            if games:
                history, state, *heads = network(history, state, actions, observations, is_first)
                outputs = list(zip(*(head.numpy() for head in heads), history.numpy(), strict=True))


def write_results(path: str, about: dict, games: list[tuple]) -> dict:
    """Write the games so far, each (score, lives lost at, seed), whole or not at all; return figures of the scores."""
    games = sorted(games, key=operator.itemgetter(2))
    columns = {name: [game[i] for game in games] for i, name in enumerate(("scores", "lives_lost_at", "seeds"))}
    names = {"mean": np.mean, "standard_deviation": np.std, "median": np.median, "maximum": np.max, "minimum": np.min}
    summary = {name: round(float(function(columns["scores"])), 2) for name, function in names.items() if games}
    settings.write_json(path, {**about, "games": len(games), **summary, **columns})
    return summary


def keep_to_this_process(folder: str, stack: contextlib.ExitStack) -> None:
    """Raise UserError if another process writes its games into a folder; let none do so until `stack` is closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    startup.lock(descriptor, f"--out: another a3c-test.py writes into {folder!r}. Name another folder")


def watch(flags: Flags, signals: Sequence[int]) -> None:
    """Load, play, print, write. Stop before the end once a signal is in `signals`."""
    model, out = checkpoint.resolve(flags.model), os.path.expanduser(flags.out)
    config_path = os.path.join(os.path.dirname(model), settings.CONFIG)
    if not (flags.game or os.path.exists(config_path)):
        raise UserError(f"there is no {config_path}, which would say what to play. Name it, such as --game Breakout-v0")
    saved = settings.read_config(config_path) if os.path.exists(config_path) else {}
    config = a3c.Config(**{name: saved[name] for name in a3c.Config.__dataclass_fields__ if name in saved})
    as_trained = {name: getattr(config, name) for name in ("max_pool", "noop_max", "fire_reset")}
    frameskip = flags.frameskip or config.frameskip
    game = find_game(flags.game or config.game, frameskip, **as_trained)
    device = startup.choose_device(flags.device)
    with tf.device(device), contextlib.ExitStack() as stack:
        network, iteration = checkpoint.load_network(model, game.num_actions, flags.newest)
        graph = tf.function(functools.partial(decide, network), autograph=False)
        policy = "softmax" if flags.policy == "softmax" else f"greedy, {100 * flags.epsilon:.4g} % random"
        holds = checkpoint.kinds_in(model)
        small = "mean_squares" not in holds  # it has the average in place of the weights
        if flags.newest and config.average_window and small:
            raise UserError(f"--newest: {model} holds only the average of its run's networks")
        window = config.average_window if not flags.newest and (small or "averages" in holds) else 0.0
        weights = f", the average with a window of {window:g}" * (window > 0)
        low, high = game.frameskip_range or (game.frameskip, game.frameskip)
        skip = f"frame-skip {low}" + f" to {high} at random" * (high > low)
        updates = f"{model} after {iteration:,} updates{weights}"
        print(f"{game.id}, {skip}, {updates}, {policy}, on {device.strip('/')}", flush=True)
        about = {"game": game.id, "model": os.path.basename(model), "iteration": iteration, "policy": flags.policy}
        about |= {"epsilon": flags.epsilon if flags.policy == "greedy" else None, "frameskip": frameskip}
        about |= {"average_window": window} if window else {}
        about |= {**as_trained, "versions": settings.versions(), "games_wanted": flags.iter}

        of_original = "master" in holds
        open_game = open_window if flags.render else make_watching_env
        side_by_side = 1 if flags.render else min(ROWS, flags.iter, max(1, flags.iter - flags.film + 1))
        obs_type = "rgb" if of_original else "grayscale"
        envs = [
            stack.enter_context(contextlib.closing(open_game(game, obs_type=obs_type))) for _ in range(side_by_side)
        ]
        if of_original:
            envs = [OriginalFrames(env) for env in envs]
            about["preprocessing"] = "luminance and bilinear resize, as in the original"
            print(f"This is a checkpoint of the original. Its frames are made by {about['preprocessing']}")
        results_path, film_path = os.path.join(out, "results.json"), os.path.join(out, "play.mp4")
        with as_user_error(f"cannot write {results_path!r}"):
            os.makedirs(out, exist_ok=True)
        keep_to_this_process(out, stack)
        games, film = [], None
        if flags.film:
            explained = dataclasses.asdict(config) if flags.explain else None
            film = stack.enter_context(open_film(film_path, envs[0], game, explained))
        summary = write_results(results_path, about, games)  # so that nothing is played which cannot be written
        bar = stack.enter_context(tqdm(total=flags.iter, unit="game", dynamic_ncols=True))
        for score, lives_lost_at, seed in play_games(
            envs, graph, network.initial_state(len(envs)), flags, film, signals
        ):
            games.append((score, lives_lost_at, seed))
            summary = write_results(results_path, about, games)
            bar.write(f"game with seed {seed}: {score:g}")
            bar.set_postfix_str(f"mean {summary['mean']:.1f}", refresh=False)
            bar.update()
    figures = ", ".join(f"{name.replace('_', ' ')} {x:.1f}" for name, x in summary.items())
    print(f"{len(games)} games: {figures}" if games else "no game has ended")
    if 0 < len(games) < flags.iter:
        print(f"stopped before all {flags.iter} games: short ones end first, so these figures are not those of all")
    print(f"wrote {results_path}" + (f" and {film_path}" if film else ""))


def main() -> int:
    """Run the command line and return the exit status."""
    signals = []
    with startup.uninterrupted(signals.append):
        try:
            watch(tyro.cli(Flags, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)), signals)
        except UserError as error:
            print(f"a3c-test.py: error: {error}", file=sys.stderr)
            return 1
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    os._exit(main())  # not sys.exit: an output that hangs would keep Python from ending
