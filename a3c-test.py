"""Watch a trained agent play: `python a3c-test.py --model ./models/breakout-v0/last.ckpt --out /tmp/result`.

Plays the registered Gymnasium environment as it is, with its random frame-skip and sticky actions. Prints the raw score
of every game, and writes `results.json` (anew after each game) and a video, `play.mp4`.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Literal

import av
import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

import checkpoint
import settings
from environment import Game, empty_history, find_game, make_watching_env, preprocess, push_frame
from startup import UserError, refusing, tf

VIDEO_SCALE = 2  # the screen of 160x210 pixels is shown at twice its size


@dataclasses.dataclass
class Flags:
    """Watch a trained agent play. These flags say what and how."""

    model: str = "./models/breakout-v0/last.ckpt"  # a checkpoint, or the folder of a run: its newest one
    out: str = "/tmp/result"  # folder for results.json and play.mp4
    game: str | None = None  # an Atari id of Gymnasium; None is the one in the config.json beside the checkpoint
    device: str = "auto"  # auto, cpu, gpu or gpu:N
    iter: settings.Count = 100  # games to play
    policy: Literal["greedy", "softmax"] = "greedy"  # the likeliest action, or one drawn from the policy
    epsilon: settings.Fraction = 0.01  # share of random actions in the greedy policy; 0.01 as in the original
    seed: settings.CountOrZero = 0  # game i is played with seed + i
    frameskip: settings.Count | None = None  # emulator frames per agent step; None is the game's own, be it random
    film: settings.CountOrZero = 1  # games in the video, from the first one on
    render: bool = False  # show ALE's window, at the speed of the console

    def __post_init__(self):
        settings.check_settings(self)


def open_window(game: Game) -> gymnasium.Env:
    """Build the game with a window. Raises UserError if no display can show one."""
    if sys.platform == "linux":
        os.environ.setdefault("SDL_VIDEODRIVER", "x11,wayland")  # else SDL draws nowhere if there is no display
    try:
        if sys.platform == "linux" and not (os.getenv("DISPLAY") or os.getenv("WAYLAND_DISPLAY")):
            raise RuntimeError("DISPLAY is not set")
        return make_watching_env(game, "human")
    except RuntimeError as error:
        raise UserError(f"--render: no display answers: {error}. Leave it out and look at play.mp4 instead") from error


@contextlib.contextmanager
def open_video(path: str, height: int, width: int, frameskip: int) -> Iterator[Callable]:
    """Yield a function that adds an RGB screen [H, W, 3] uint8 to an H.264 file. Raises UserError if that fails."""
    if "libx264" not in av.codecs_available:
        raise UserError("no H.264 encoder in PyAV: pip install --upgrade --only-binary=:all: av, or give --film 0")
    with refusing(f"cannot write {path!r}"):
        file = open(path, "wb")  # noqa: SIM115  # a file, because FFmpeg takes `run:1` for a protocol
    # Fragments: a video that is cut short still plays, and nothing is kept in memory until the end.
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with file, av.open(file, "w", format="mp4", options=options) as container:
        rate = Fraction(60, frameskip)  # the emulator makes 60 frames a second
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23"})
        stream.height, stream.width = height * VIDEO_SCALE, width * VIDEO_SCALE
        stream.pix_fmt = "yuv420p"  # what browsers show

        def add(screen: np.ndarray | None) -> None:
            if screen is not None:
                screen = screen.repeat(VIDEO_SCALE, axis=0).repeat(VIDEO_SCALE, axis=1)
                screen = av.VideoFrame.from_ndarray(screen, format="rgb24")
            with refusing(f"cannot write {path!r}"):
                container.mux(stream.encode(screen))

        yield add
        add(None)  # what the encoder still holds


def choose_action(logits: np.ndarray, policy: str, epsilon: float, rng: np.random.Generator) -> int:
    """Return an action for logits [A]: drawn from their softmax, or the likeliest but for a share of random ones."""
    if not np.all(np.isfinite(logits)):
        raise UserError("the network's logits are not finite: this checkpoint cannot play")
    if policy == "softmax":
        probabilities = np.exp(logits - logits.max(), dtype=np.float64)
        return int(rng.choice(len(logits), p=probabilities / probabilities.sum()))
    return int(rng.integers(len(logits))) if rng.random() < epsilon else int(logits.argmax())


def play_game(
    env: gymnasium.Env, network: Callable, seed: int, policy: str, epsilon: float, film=None, signals: Sequence = ()
) -> tuple[float, list[float]]:
    """Play a game to its end, or until a signal is in `signals`; `film` is called with each RGB screen [H, W, 3].

    Returns the raw score, and what it was at each loss of a life; nothing where the game has no lives.
    """
    rng = np.random.default_rng(seed)
    screen, info = env.reset(seed=seed)
    history, is_first = empty_history(1), np.array([True])
    score, lives, lives_lost_at, ended = 0.0, info["lives"], [], False
    while not (ended or signals):
        if film:
            film(env.unwrapped.ale.getScreenRGB())
        history = push_frame(history, preprocess(screen)[None], is_first)
        is_first = np.array([False])
        logits, _ = network(history)
        action = choose_action(logits[0].numpy(), policy, epsilon, rng)
        screen, reward, terminated, truncated, info = env.step(action)
        score, ended = score + float(reward), terminated or truncated
        if info["lives"] < lives:
            lives_lost_at.append(score)
        lives = info["lives"]
    return score, lives_lost_at


def write_results(path: str, about: dict, games: list[tuple]) -> dict:
    """Write the games so far, each (score, lives lost at, seed), whole or not at all; return figures of the scores."""
    columns = {name: [game[i] for game in games] for i, name in enumerate(("scores", "lives_lost_at", "seeds"))}
    names = {"mean": np.mean, "standard_deviation": np.std, "median": np.median, "maximum": np.max, "minimum": np.min}
    summary = {name: round(float(function(columns["scores"])), 2) for name, function in names.items() if games}
    checkpoint.write_json(path, {**about, "games": len(games), **summary, **columns})
    return summary


def watch(flags: Flags, signals: Sequence[int]) -> None:
    """Load, play, print, write. Stop before the end once a signal is in `signals`."""
    model, out = checkpoint.resolve(flags.model), os.path.expanduser(flags.out)
    config_path = os.path.join(os.path.dirname(model), checkpoint.CONFIG)
    config = {} if flags.game and not os.path.exists(config_path) else checkpoint.read_config(config_path)
    as_trained = {name: config[name] for name in ("max_pool", "noop_max", "fire_reset") if name in config}
    game = find_game(flags.game or config["game"], flags.frameskip, **as_trained)
    device = startup.choose_device(flags.device)
    with tf.device(device), contextlib.ExitStack() as stack:
        network, iteration = checkpoint.load_network(model, game.num_actions)
        network = tf.function(network.__call__, autograph=False)
        print(f"{game.id}, {model} after {iteration:,} updates, {flags.policy}, on {device.strip('/')}", flush=True)
        about = {"game": game.id, "model": os.path.basename(model), "iteration": iteration, "policy": flags.policy}
        about |= {"epsilon": flags.epsilon if flags.policy == "greedy" else None, "frameskip": flags.frameskip}
        about |= {**as_trained, "versions": startup.versions()}

        env = stack.enter_context(contextlib.closing(open_window(game) if flags.render else make_watching_env(game)))
        results_path, film_path = os.path.join(out, "results.json"), os.path.join(out, "play.mp4")
        with refusing(f"cannot write {results_path!r}"):
            os.makedirs(out, exist_ok=True)
        games, film = [], None
        summary = write_results(results_path, about, games)  # so that nothing is played which cannot be written
        if flags.film:
            film = stack.enter_context(open_video(film_path, *env.unwrapped.ale.getScreenDims(), game.frameskip))
        bar = stack.enter_context(tqdm(total=flags.iter, unit="game", dynamic_ncols=True))
        for seed in range(flags.seed, flags.seed + flags.iter):
            filmed = film if len(games) < flags.film else None
            score, lives_lost_at = play_game(env, network, seed, flags.policy, flags.epsilon, filmed, signals)
            if signals:
                break
            games.append((score, lives_lost_at, seed))
            summary = write_results(results_path, about, games)
            bar.write(f"game {len(games)}: {score:g}")
            bar.set_postfix_str(f"mean {summary['mean']:.1f}", refresh=False)
            bar.update()
    print(f"{len(games)} games: " + ", ".join(f"{name.replace('_', ' ')} {x:.1f}" for name, x in summary.items()))
    print(f"wrote {results_path}" + (f" and {film_path}" if film else ""))


def main() -> int:
    """Run the command line and return the exit status."""
    signals = []
    with startup.undisturbed(signals.append):
        try:
            watch(tyro.cli(Flags, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)), signals)
        except UserError as error:
            print(f"a3c-test.py: error: {error}", file=sys.stderr)
            return 1
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    os._exit(main())  # not sys.exit: an output that hangs would keep Python from ending
