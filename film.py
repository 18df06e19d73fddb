"""The film of a game: its screens, or beside them also what the agent sees, chooses and expects (`--explain`)."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import gymnasium
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from environment import Game
from startup import UserError, as_user_error

FRAMES_PER_SECOND = 60  # of the emulator
LOOKAHEAD = 300  # agent steps after which a return is taken for known: 0.99 ** 300 is 5 %
SECONDS = 10  # that the curves show

# Places on the explained film, in pixels. Whole multiples of the game's pixels keep it sharp.
WIDTH, MARGIN, TOP, SCALE = 1280, 24, 66, 3
RIGHT = 532  # left edge of what is beside the screen
POLICY = 284  # top of the policy
CURVE = 930  # left edge of the curves
DARK, DIM, GREY, WHITE = (18, 18, 24), (44, 46, 58), (150, 152, 165), (240, 240, 240)
CHOICE, VALUE, RETURN = (90, 200, 120), (240, 240, 240), (255, 160, 60)


class Moment(NamedTuple):
    """One agent step of a game: what was there before the action, and what the action brought."""

    screen: np.ndarray  # [H, W, 3] uint8, RGB
    frames: np.ndarray  # [84, 84, 4] uint8, what the network saw, oldest first
    logits: np.ndarray  # [A]
    value: float
    score: float
    lives: int
    action: int
    reward: float  # raw
    ended: bool  # whether the game is over
    life_lost: bool


@contextlib.contextmanager
def open_video(path: str, height: int, width: int, frameskip: int) -> Iterator[Callable[[np.ndarray | None], None]]:
    """Yield a function that adds an RGB picture [H, W, 3] uint8 to an H.264 file. Raises UserError if that fails."""
    if "libx264" not in av.codecs_available:
        raise UserError("no H.264 encoder in PyAV: pip install --upgrade --only-binary=:all: av, or give --film 0")
    with as_user_error(f"cannot write {path!r}"):
        file = open(path, "wb")  # noqa: SIM115  # a file, because FFmpeg takes `run:1` for a protocol
    # Fragments: a video that is cut short still plays, and nothing is kept in memory until the end.
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with file, av.open(file, "w", format="mp4", options=options) as container:
        rate = Fraction(FRAMES_PER_SECOND, frameskip)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"  # what browsers show

        def add(picture: np.ndarray | None) -> None:
            frame = None if picture is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
            with as_user_error(f"cannot write {path!r}"):
                container.mux(stream.encode(frame))

        yield add
        add(None)  # what the encoder still holds


@contextlib.contextmanager
def open_film(path: str, env: gymnasium.Env, game: Game, explained: dict | None) -> Iterator[Callable[[Moment], None]]:
    """Yield a function that adds a moment to a film: its screen, or what `Explanation` makes of it."""
    height, width = env.unwrapped.ale.getScreenDims()
    if explained is None:
        with open_video(path, 2 * height, 2 * width, game.frameskip) as show:
            yield lambda moment: show(moment.screen.repeat(2, axis=0).repeat(2, axis=1))
    else:
        with open_video(path, TOP + SCALE * height + MARGIN, WIDTH, game.frameskip) as show:
            explanation = Explanation(show, height, env.unwrapped.get_action_meanings(), game, explained)
            yield explanation.add
            explanation.finish()


class Explanation:
    """Draws moments, each once its return has come true: at the end of a life or a game, or LOOKAHEAD steps later.

    Args:
      show: called with each picture [H, W, 3] uint8.
      height: of the game's screen.
      actions: the names of the A actions.
      game: what is played.
      config: of the run that trained the agent; three of its settings say what the agent took for a return.
    """

    def __init__(self, show: Callable, height: int, actions: Sequence[str], game: Game, config: dict):
        self.show, self.config = show, config
        self.waiting = deque()  # moments that are not drawn yet
        self.curve = deque(maxlen=SECONDS * FRAMES_PER_SECOND // game.frameskip or 1)  # (value, return), drawn last
        self.low, self.high = 0.0, 0.1  # of the curves since the film began, so that their scale is steady
        self.font, self.large = ImageFont.load_default(16), ImageFont.load_default(24)
        self.bottom = TOP + SCALE * height
        self.row = min(34, (self.bottom - POLICY) // len(actions))  # height of an action's row

        self.empty = Image.new("RGB", (WIDTH, self.bottom + MARGIN), DARK)  # what stays as it is
        draw = ImageDraw.Draw(self.empty)
        draw.text((MARGIN, TOP - 14), game.id, GREY, self.font, anchor="ls")
        draw.text((RIGHT, TOP - 14), "What the network sees: the last four frames", GREY, self.font, anchor="ls")
        draw.text((RIGHT, POLICY - 14), "The policy, and the action taken", GREY, self.font, anchor="ls")
        for index, name in enumerate(actions):
            draw.text((RIGHT + 150, self._row(index)), name, WHITE, self.font, anchor="rm")
        x = CURVE
        for text, colour in (("Expected", VALUE), ("and true return", RETURN)):
            draw.text((x, POLICY - 14), text, colour, self.font, anchor="ls")
            x += self.font.getlength(text + " ")
        draw.text((CURVE, self.bottom), f"{SECONDS} s ago", GREY, self.font, anchor="ls")
        draw.text((WIDTH - MARGIN, self.bottom), "now", GREY, self.font, anchor="rs")

    def add(self, moment: Moment) -> None:
        """Take a moment, and draw those whose return is known by it."""
        self.waiting.append(moment)
        if self._ends_return(moment):
            self.finish()
        elif len(self.waiting) > LOOKAHEAD:
            self._draw_next()

    def finish(self) -> None:
        """Draw what is left."""
        while self.waiting:
            self._draw_next()

    def _draw_next(self) -> None:
        clip = self.config["reward_clip"] or math.inf
        *known, last = self.waiting
        if self._ends_return(last):
            known, following = self.waiting, 0.0
        else:
            following = last.value  # stands for its return
        for moment in reversed(known):
            following *= 0.0 if self._ends_return(moment) else self.config["discount_factor"]
            following += min(max(moment.reward, -clip), clip)
        moment = self.waiting.popleft()
        self.curve.append((moment.value, following))
        self.low, self.high = min(self.low, *self.curve[-1]), max(self.high, *self.curve[-1])
        self.show(self._draw(moment))

    def _ends_return(self, moment: Moment) -> bool:
        return moment.ended or (moment.life_lost and self.config["life_loss_ends_return"])

    def _draw(self, moment: Moment) -> np.ndarray:
        image = self.empty.copy()
        draw = ImageDraw.Draw(image)
        height, width, _ = moment.screen.shape
        screen = Image.fromarray(moment.screen).resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST)
        image.paste(screen, (MARGIN, TOP))
        lives = f"   lives {moment.lives}" if moment.lives else ""
        draw.text((MARGIN + SCALE * width, TOP - 14), f"score {moment.score:g}{lives}", WHITE, self.large, anchor="rs")
        for index in range(moment.frames.shape[-1]):
            frame = Image.fromarray(moment.frames[:, :, index].repeat(2, axis=0).repeat(2, axis=1))
            image.paste(frame, (RIGHT + index * (frame.width + 16), TOP))

        policy = np.exp(moment.logits - moment.logits.max())
        for index, share in enumerate(policy / policy.sum()):
            y, taken = self._row(index), index == moment.action
            left, half = RIGHT + 180, self.row // 2 - 2
            draw.rectangle((left, y - half, left + 120, y + half), DIM)
            draw.rectangle((left, y - half, left + round(120 * share), y + half), CHOICE if taken else GREY)
            draw.text((left + 170, y), f"{100 * share:.0f} %", WHITE if taken else GREY, self.font, anchor="rm")
            if taken:
                draw.polygon([(left - 20, y - 7), (left - 8, y), (left - 20, y + 7)], CHOICE)

        top, bottom, right = POLICY, self.bottom - 30, WIDTH - MARGIN
        scale = (bottom - top) / (self.high - self.low)
        for mark in {self.low if scale * self.low < -20 else 0.0, 0.0, self.high}:
            y = bottom - scale * (mark - self.low)
            draw.line((CURVE, y, right, y), DIM)
            draw.text((CURVE - 8, y), f"{mark:.1f}", GREY, self.font, anchor="rm")
        step = (right - CURVE) / max(1, self.curve.maxlen - 1)
        for which, colour in ((1, RETURN), (0, VALUE)):
            heights = [bottom - scale * (point[which] - self.low) for point in self.curve]
            points = [(right - step * age, y) for age, y in enumerate(reversed(heights))]
            draw.line(points, colour, 2)
        return np.asarray(image)

    def _row(self, index: int) -> int:
        """Return the middle of an action's row."""
        return POLICY + self.row * index + self.row // 2
