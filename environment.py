r"""Atari: what a game is, many games at once for training, one real game for watching, and the frame history.

    Training                                   Watching (`a3c-test.py`)
    AtariVectorEnv, B games in C++             gymnasium.make(game), one by one
      grey 210x160 by ALE's palette              grey 210x160 by ALE's palette
                        \                       /
                      area resize to 84x84, uint8
                      history of 4 frames [B, 84, 84] uint32
                      bitcast -> [B, 84, 84, 4] uint8, oldest frame first

Source: `async_agent.py` and `history_buffer.py` of hiwonjoon/tf-a3c-gpu; Mnih et al. 2015 for the four frames.
"""

import difflib
import math
import warnings
from typing import NamedTuple

import ale_py
import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv

from startup import UserError, tf

FRAME_SIZE = 84  # height and width of a frame, pixels

gymnasium.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for every game


class Game(NamedTuple):
    """One registered Atari game, with the settings of its Gymnasium id and what training changes in them."""

    id: str  # "Breakout-v0"
    rom: str  # "breakout"
    num_actions: int
    screen: tuple[int, int]  # height and width, pixels
    background: int  # grey level, 0..255, of most of the screen in play
    repeat_action_probability: float  # sticky actions: chance that the emulator repeats the last action
    max_frames: int  # emulator frames after which a game is cut off
    frameskip: int  # emulator frames per agent step in training, or their mean
    frameskip_range: tuple[int, int] | None  # (low, high), both included, where the id draws it at random
    random_frameskip: bool  # whether training draws the frame-skip at random, too
    max_pool: bool = False  # whether a frame is the maximum of the last two of its step
    noop_max: int = 0  # most emulator frames without an action before a game begins, drawn anew for each
    fire_reset: bool = False  # whether a game begins with FIRE, where it has that; counts as one of these frames

    def describe(self) -> str:
        """Return one line that says what is played, and how it differs from the registered environment."""
        skip = f"frame-skip {self.frameskip}"
        if self.frameskip_range:
            low, high = self.frameskip_range
            how = "on average, drawn from" if self.random_frameskip else "the mean of this id's random"
            skip += f" ({how} {low}..{high})"
        skip += f", sticky actions {self.repeat_action_probability:g}" + ", maximum of two frames" * self.max_pool
        skip += f", up to {self.noop_max} no-ops" * bool(self.noop_max) + ", FIRE at the start" * self.fire_reset
        return f"{self.id}: {self.num_actions} actions, {skip}"


def find_game(game_id: str, frameskip: int | None = None, random_frameskip: bool = False, **start_and_frames) -> Game:
    """Look up an Atari game such as `Breakout-v0`, `SpaceInvaders-v4` or `ALE/MsPacman-v5`.

    Training uses `frameskip` in place of the game's own. Without it, `random_frameskip` makes training draw it anew for
    every step where the id does so. `start_and_frames` are the last three fields of `Game`.

    Raises:
      UserError: no such game, or a Gymnasium environment that is not Atari; names the nearest Atari games. Or
        `max_pool` where training takes single frames.
    """
    atari = [key for key, spec in gymnasium.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"]
    if game_id not in atari:
        nearest = difflib.get_close_matches(game_id, atari, n=3, cutoff=0.4) or ["Breakout-v0", "ALE/Pong-v5"]
        kind = "is not an Atari game" if game_id in gymnasium.registry else "is not known"
        raise UserError(f"game = {game_id!r} {kind}. Did you mean {', '.join(nearest)}?")
    settings = gymnasium.spec(game_id).kwargs
    frameskip, frameskip_range = frameskip or settings["frameskip"], None
    if not isinstance(frameskip, int):
        frameskip_range = (frameskip[0], frameskip[1] - 1)
        frameskip = round(sum(frameskip_range) / 2)
    random_frameskip = random_frameskip and frameskip_range is not None
    single_frames = random_frameskip or frameskip == 1  # AtariVectorEnv is asked for a frame-skip of 1
    if single_frames and start_and_frames.get("max_pool"):
        raise UserError(f"max_pool = True: {game_id} would be played frame by frame here; set frameskip to 2 or more")
    env = _make(game_id)
    game = Game(
        id=game_id,
        rom=settings["game"],
        num_actions=int(env.action_space.n),
        screen=env.observation_space.shape,
        background=_background(env),
        repeat_action_probability=settings["repeat_action_probability"],
        max_frames=settings["max_num_frames_per_episode"],
        frameskip=frameskip,
        frameskip_range=frameskip_range,
        random_frameskip=random_frameskip,
        **start_and_frames,
    )
    env.close()
    return game


def _background(env: gymnasium.Env) -> int:
    """Return the median grey level of a game's screen after 20 steps: Pong's first screens differ."""
    screen, _ = env.reset(seed=0)
    for _ in range(20):
        screen, *_ = env.step(0)
    return int(np.median(screen))


def make_training_envs(
    game: Game, num_envs: int, num_threads: int, size: tuple[int, int] = (FRAME_SIZE, FRAME_SIZE)
) -> gymnasium.vector.VectorEnv:
    """Build `num_envs` games that run in C++ without Python's global lock, on so many threads, at least one.

    A game that ends restarts in the same step, so every row of every step is play. Rewards are raw scores. Takes
    about 65 ms per game (ALE loads the ROM) and holds the global lock for it; the first `reset(seed)` as long again.

    Observations are [B, 1, *size] uint8. Unless `size` is `game.screen`, ALE resizes all frames, also those in a random
    frame-skip that nobody sees. Its pixels are those of `preprocess`, to within one grey level.
    """
    envs = AtariVectorEnv(
        game.rom,
        num_envs,
        num_threads=num_threads,
        max_num_frames_per_episode=game.max_frames,
        repeat_action_probability=game.repeat_action_probability,
        frameskip=1 if game.random_frameskip else game.frameskip,
        img_height=size[0],
        img_width=size[1],
        grayscale=True,
        stack_num=1,  # the history is kept beside the network, so that only the newest frame travels
        maxpool=game.max_pool,
        noop_max=game.noop_max + 1,  # it draws 0..noop_max - 1
        use_fire_reset=game.fire_reset,
        reward_clipping=False,  # its default hides the score
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    return RandomFrameSkip(envs, *game.frameskip_range) if game.random_frameskip else envs


class RandomFrameSkip(gymnasium.vector.VectorWrapper):
    """Repeat the actions of each step for `low` to `high` emulator frames, both included.

    The number is drawn anew for every step, once for all games: each game sees what its id's random frame-skip would
    show it. A game that ends within a step restarts there, and plays the rest of the step with the same action.

    Args:
      envs: games with a frame-skip of one and same-step autoreset.
      low, high: the least and the most frames of a step.
    """

    def __init__(self, envs: gymnasium.vector.VectorEnv, low: int, high: int):
        super().__init__(envs)
        self.low, self.high, self.rng = low, high, np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        """Start all games; the seed also sets which frame-skips will be drawn."""
        self.rng = np.random.default_rng(seed)
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        """Return the last frame, the sum of the rewards up to the end of a game, and whether one has ended."""
        rewards, ended, cut = 0.0, False, False
        for _ in range(self.rng.integers(self.low, self.high + 1)):
            frame, reward, terminated, truncated, info = self.env.step(actions)
            rewards = rewards + np.where(ended | cut, 0.0, reward)
            ended, cut = ended | terminated, cut | truncated
        return frame, rewards, ended, cut, info


def make_watching_env(game: Game, render_mode: str | None = None, obs_type: str = "grayscale") -> gymnasium.Env:
    """Build the registered environment with its own frame-skip, be it random, unless the game was found with another.

    Observations are grey, [210, 160] uint8, or of another `obs_type` of ALE. How a game begins and what a frame is are
    as in training.
    """
    low, high = game.frameskip_range or (game.frameskip, game.frameskip)
    if game.max_pool or game.noop_max or game.fire_reset:
        return FrameByFrame(_make(game.id, obs_type, render_mode=render_mode, frameskip=1), game, low, high)
    return _make(game.id, obs_type, render_mode=render_mode, frameskip=low if low == high else (low, high + 1))


def _make(game_id: str, obs_type: str = "grayscale", **changes) -> gymnasium.Env:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium advises v5 over the v0 that the original's results are for
        return gymnasium.make(game_id, obs_type=obs_type, **changes)


class FrameByFrame(gymnasium.Wrapper):
    """Begins a game and makes its steps as `AtariVectorEnv` does it in C++ (`preprocessed_env.cpp` of ale-py).

    Args:
      env: the game with a frame-skip of one; observations [H, W] uint8.
      game: how it begins and what a frame is.
      low, high: the least and the most frames of a step.
    """

    def __init__(self, env: gymnasium.Env, game: Game, low: int, high: int):
        super().__init__(env)
        self.game, self.low, self.high = game, low, high

    def reset(self, *, seed=None, options=None):
        """Start a game and let its first frames pass: FIRE, if it is asked for, counts as one of the no-ops."""
        screen, info = self.env.reset(seed=seed, options=options)
        actions = self.unwrapped.get_action_meanings()
        first = [actions.index("FIRE")] if self.game.fire_reset and "FIRE" in actions else []
        for action in first + [0] * (int(self.np_random.integers(self.game.noop_max + 1)) - len(first)):
            screen, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                screen, info = self.env.reset()
        return screen, info

    def step(self, action):
        """Return the last screen of the step or the maximum of its last two, and the sum of the rewards."""
        screens, score, ended, cut = [], 0.0, False, False
        for _ in range(self.np_random.integers(self.low, self.high + 1)):
            screen, reward, ended, cut, info = self.env.step(action)
            screens.append(screen)
            score += reward
            if ended or cut:
                break
        return np.max(screens[-2:], axis=0) if self.game.max_pool else screen, score, ended, cut, info


def preprocess(screens: tf.Tensor) -> tf.Tensor:
    """Resize grey screens [B, H, W] uint8 to [B, 84, 84] uint8 by exact area; what has that size already stays.

    As `tf.image.resize` does it with "area", but in less than half of the time on a CPU.
    """
    height, width = screens.shape[1:]
    if height == width == FRAME_SIZE:
        return screens
    shares = area_shares(height)
    taps = int(np.count_nonzero(shares, axis=0).max())  # rows of a screen that a row of a frame is made of
    first = np.minimum((shares > 0).argmax(axis=0), height - taps)
    rows = 0.0  # [B, 84, W]
    for row in (first + tap for tap in range(taps)):
        rows += tf.cast(tf.gather(screens, row, axis=1), tf.float32) * shares[row, range(FRAME_SIZE), None]
    # The pattern of the columns repeats: 40 of 160 always make 21 of 84.
    repeats = math.gcd(width, FRAME_SIZE)
    columns = area_shares(width)[: width // repeats, : FRAME_SIZE // repeats]
    frames = tf.reshape(rows, [-1, width // repeats]) @ columns
    return tf.cast(tf.round(tf.reshape(frames, [-1, FRAME_SIZE, FRAME_SIZE])), tf.uint8)


def area_shares(size: int) -> np.ndarray:
    """Return what share [size, 84] float32 each of `size` pixels has in each of 84 that cover the same length."""
    pixels, frame = FRAME_SIZE * np.arange(size)[:, None], size * np.arange(FRAME_SIZE)  # where each begins
    overlaps = np.minimum(pixels + FRAME_SIZE, frame + size) - np.maximum(pixels, frame)
    return np.float32(np.maximum(overlaps, 0) / size)


# The history of a game is a shift register: four uint8 frames in one uint32, the newest in the highest byte.


def empty_history(num_envs: int) -> tf.Tensor:
    """Return [B, 84, 84] uint32 zeros: four black frames for each game."""
    return tf.zeros([num_envs, FRAME_SIZE, FRAME_SIZE], tf.uint32)


def push_frame(history: tf.Tensor, frame: tf.Tensor, is_first: tf.Tensor) -> tf.Tensor:
    """Shift `frame` [B, 84, 84] uint8 into `history` [B, 84, 84] uint32, emptied before where `is_first` [B] bool.

    `is_first` says that `frame` is the first of a new game.
    """
    kept = tf.bitwise.right_shift(history, tf.constant(8, tf.uint32)) * tf.cast(~is_first, tf.uint32)[:, None, None]
    return kept + tf.cast(frame, tf.uint32) * tf.constant(2**24, tf.uint32)


def history_to_frames(history: tf.Tensor) -> tf.Tensor:
    """View `history` [B, 84, 84] uint32 as [B, 84, 84, 4] uint8 frames, oldest first, without moving a byte."""
    return tf.bitcast(history, tf.uint8)
