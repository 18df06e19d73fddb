"""Watch a trained agent play: `python a3c-test.py --model ./models/breakout-v0/last.ckpt --out /tmp/result`.

Plays the registered Gymnasium environment as it is, with its random frame-skip and sticky actions; prints every
game's raw score; writes `results.json`, anew after each game, and a video, `play.mp4`, into --out.
"""

import startup  # isort: skip  # first: it checks the packages and sets TensorFlow up

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import gymnasium
import numpy as np
from tqdm import tqdm

import checkpoint
from environment import Game, empty_history, find_game, make_watching_env, preprocess, push_frame
from startup import UserError, refusing, tf

EMULATOR_FPS = 60
WITHOUT_WINDOW = "Leave it out and look at play.mp4 instead"
VIDEO_SCALE = 2  # the screen of 160x210 pixels is shown at twice its size


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags; a wrong value ends the program with a message that names it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="./models/breakout-v0/last.ckpt", help="a checkpoint, or a run's folder (%(default)s)")
    add("--out", default="/tmp/result", help="folder for results.json and play.mp4 (%(default)s)")
    add("--game", help="an Atari id of Gymnasium; by default what the config.json beside the checkpoint says")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N (%(default)s)")
    add("--iter", type=int, default=100, help="games to play (%(default)s)")
    add("--policy", choices=["greedy", "softmax"], default="greedy", help="the likeliest action, or one drawn from pi")
    add(
        "--epsilon",
        type=float,
        default=0.01,
        help="greedy only: share of random actions, as the original (%(default)s)",
    )
    add("--seed", type=int, default=0, help="game i is played with seed + i (%(default)s)")
    add("--frameskip", type=int, help="emulator frames per agent step; by default the game's own, which may be random")
    add("--film", type=int, default=1, help="games in the video, from the first on (%(default)s)")
    add("--render", action="store_true", help="show ALE's window, at the speed of the console")
    arguments = parser.parse_args()
    for name, low, high in (("iter", 1, 2**31), ("epsilon", 0, 1), ("seed", 0, 2**31 - 2**20), ("film", 0, 2**31)):
        if not low <= getattr(arguments, name) <= high:
            parser.error(f"{name} = {getattr(arguments, name)}: must be from {low} to {high:,}")
    if arguments.frameskip is not None and not 1 <= arguments.frameskip <= 1000:
        parser.error(f"frameskip = {arguments.frameskip}: must be from 1 to 1,000")
    if arguments.render and sys.platform == "linux" and not (os.getenv("DISPLAY") or os.getenv("WAYLAND_DISPLAY")):
        parser.error(f"--render: there is no display (DISPLAY is not set). {WITHOUT_WINDOW}")
    return arguments


def open_game(game: Game, render: bool) -> gymnasium.Env:
    """Build the game, with a window if `render`. Raises UserError if the display cannot show one."""
    if render and sys.platform == "linux":
        os.environ.setdefault("SDL_VIDEODRIVER", "x11,wayland")  # else it draws nowhere if the display does not answer
    try:
        return make_watching_env(game, "human" if render else None)
    except RuntimeError as error:
        if not render:
            raise
        raise UserError(f"--render: the display does not answer ({error}). {WITHOUT_WINDOW}") from error


@contextlib.contextmanager
def open_video(path: str, height: int, width: int, frames_per_second: Fraction) -> Iterator:
    """Yield a function that adds an RGB screen [H, W, 3] uint8 to an H.264 file, which is written as it goes.

    Raises:
      UserError: the file cannot be written, or this build of PyAV has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise UserError("no H.264 encoder in PyAV: pip install --upgrade --only-binary=:all: av, or give --film 0")
    with contextlib.ExitStack() as stack:
        with refusing(f"cannot write {path!r}"):  # a file, because FFmpeg takes `run:1` for a protocol
            file = stack.enter_context(open(path, "wb"))
        # Fragments: a video that is cut short still plays, and nothing is kept in memory until the end.
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        container = stack.enter_context(av.open(file, "w", format="mp4", options=options))
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "23"})
        stream.height, stream.width = height * VIDEO_SCALE, width * VIDEO_SCALE
        stream.pix_fmt = "yuv420p"  # what browsers show

        def write(frame: av.VideoFrame | None = None) -> None:
            with refusing(f"cannot write {path!r}"):
                container.mux(stream.encode(frame))

        def add(screen: np.ndarray) -> None:
            screen = screen.repeat(VIDEO_SCALE, axis=0).repeat(VIDEO_SCALE, axis=1)
            write(av.VideoFrame.from_ndarray(screen, format="rgb24"))

        yield add
        write()


def choose_action(logits: np.ndarray, policy: str, epsilon: float, rng: np.random.Generator) -> int:
    """Return an action for logits [A]: drawn from their softmax, or the likeliest but for a share of random ones.

    Raises:
      UserError: the logits are not finite.
    """
    if not np.all(np.isfinite(logits)):
        raise UserError("the network's logits are not finite: this checkpoint cannot play")
    if policy == "softmax":
        probabilities = np.exp(logits - logits.max(), dtype=np.float64)
        return int(rng.choice(len(logits), p=probabilities / probabilities.sum()))
    return int(rng.integers(len(logits))) if rng.random() < epsilon else int(logits.argmax())


def play_game(
    env: gymnasium.Env, network: Callable, seed: int, policy: str, epsilon: float, film
) -> tuple[float, list[float]]:
    """Play one whole game on the logits of `network`; `film` is called with each RGB screen [H, W, 3], unless None.

    Returns:
      The raw score, and what it was at each loss of a life; nothing where the game has no lives.
    """
    rng = np.random.default_rng(seed)
    screen, info = env.reset(seed=seed)
    history, same_game, score, ended = empty_history(1), np.array([False]), 0.0, False
    lives, lost_at = info["lives"], []
    while not ended:
        if film:
            film(env.unwrapped.ale.getScreenRGB())
        history = push_frame(history, preprocess(screen)[None], same_game)
        logits, _ = network(history)
        action = choose_action(logits[0].numpy(), policy, epsilon, rng)
        screen, reward, terminated, truncated, info = env.step(action)
        score, ended = score + float(reward), terminated or truncated
        if info["lives"] < lives:
            lost_at.append(score)
        lives = info["lives"]
    return score, lost_at


def main() -> int:
    """Load, play, print, write. Return the exit status."""
    arguments = parse_arguments()
    model, out = checkpoint.resolve(arguments.model), os.path.expanduser(arguments.out)
    config_path = os.path.join(os.path.dirname(model), checkpoint.CONFIG)
    config = {} if arguments.game and not os.path.exists(config_path) else checkpoint.read_config(config_path)
    frames = {name: config[name] for name in ("max_pool", "noop_max", "fire_reset") if name in config}
    game = find_game(arguments.game or config["game"], arguments.frameskip, **frames)
    device = startup.choose_device(arguments.device, num_groups=1)
    with tf.device(device):
        network, iteration = checkpoint.load_network(model, game.num_actions)
        network = tf.function(network.__call__, autograph=False)
        print(f"{game.id}, {model} after {iteration:,} updates, {arguments.policy}, on {device.strip('/')}", flush=True)

        results_path, film_path = (os.path.join(out, name) for name in ("results.json", "play.mp4"))
        with refusing(f"cannot write {results_path!r}"):  # found out, and named, before playing
            os.makedirs(out, exist_ok=True)
            open(results_path, "a").close()
            if not os.path.getsize(results_path):
                os.remove(results_path)
        results = {
            "game": game.id,
            "model": os.path.basename(model),
            "iteration": iteration,
            "policy": arguments.policy,
            "epsilon": arguments.epsilon if arguments.policy == "greedy" else None,
            "frameskip": arguments.frameskip,
            **frames,
            "versions": startup.versions(),
        }
        scores, lost_at, status = [], [], 0
        with contextlib.ExitStack() as stack:
            env = open_game(game, arguments.render)
            stack.callback(env.close)
            film = None
            if arguments.film:
                size = env.unwrapped.ale.getScreenDims()
                film = stack.enter_context(open_video(film_path, *size, Fraction(EMULATOR_FPS, game.frameskip)))
            bar = stack.enter_context(tqdm(total=arguments.iter, unit="game", dynamic_ncols=True))
            try:
                for number in range(arguments.iter):
                    seed = arguments.seed + number
                    filmed = film if number < arguments.film else None
                    score, lost = play_game(env, network, seed, arguments.policy, arguments.epsilon, filmed)
                    scores.append(score)
                    lost_at.append(lost)
                    write_results(results_path, results, scores, lost_at, arguments.seed)  # kept, however this ends
                    bar.write(f"game {number + 1}: {score:g}")
                    bar.set_postfix_str(f"mean {np.mean(scores):.1f}", refresh=False)
                    bar.update()
            except KeyboardInterrupt as stop:
                status = exit_status(stop)
    if scores:
        summary = write_results(results_path, results, scores, lost_at, arguments.seed)
        print(f"{len(scores)} games: " + ", ".join(f"{name.replace('_', ' ')} {x:.1f}" for name, x in summary.items()))
        print(f"wrote {results_path}" + (f" and {film_path}" if arguments.film else ""))
    return status


def write_results(path: str, about: dict, scores: list[float], lost_at: list[list[float]], seed: int) -> dict:
    """Write the results of the games so far, whole or not at all; return the figures that their scores are known by."""
    names = {"mean": np.mean, "standard_deviation": np.std, "median": np.median, "maximum": np.max, "minimum": np.min}
    summary = {name: round(float(function(scores)), 2) for name, function in names.items()}
    games = {"scores": scores, "lives_lost_at": lost_at, "seeds": [seed + number for number in range(len(scores))]}
    checkpoint.write_json(path, {**about, "games": len(scores), **summary, **games})
    return summary


def interrupt_once() -> Callable[[int], None]:
    """Return a handler of signals: the first one ends the games, another must not cut off the writing of results."""
    seen = []

    def interrupt(number: int) -> None:
        seen.append(number)
        if len(seen) == 1:
            raise KeyboardInterrupt(number)

    return interrupt


def exit_status(stop: KeyboardInterrupt) -> int:
    """Return the status of a program that a signal has ended."""
    return 128 + (stop.args or [signal.SIGINT])[0]


if __name__ == "__main__":
    with startup.undisturbed(interrupt_once()):
        try:
            status = main()
        except KeyboardInterrupt as stop:
            status = exit_status(stop)
        except UserError as error:
            print(f"a3c-test.py: error: {error}", file=sys.stderr)
            status = 1
    os._exit(status)  # not sys.exit: an output that hangs would keep Python from ending
