"""Checkpoints of hiwonjoon/tf-a3c-gpu itself: the names of their weights, and the frames that their network saw."""

import gymnasium
import numpy as np
from PIL import Image

from environment import FRAME_SIZE

LAYERS = {  # there -> here
    "master/conv1": "conv1",
    "master/conv2": "conv2",
    "master/linear1": "hidden",
    "master/linear-policy": "policy",
    "master/linear-value": "value",
}
KINDS = {"w": "weights", "b": "biases"}


def translate(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights among a checkpoint's tensors under their names here; nothing if the original has not made it.

    It saved no optimiser and no counts. All are float32, and the layout is the same.
    """
    names = {name: name.rpartition("/") for name in tensors}
    return {
        f"{KINDS[kind]}/{LAYERS[layer]}": tensors[name]
        for name, (layer, _, kind) in names.items()
        if layer in LAYERS and kind in KINDS
    }


class OriginalFrames(gymnasium.ObservationWrapper):
    """Turns RGB screens [H, W, 3] uint8 into the [84, 84] uint8 that the original made of them.

    It cut its luminance off to whole numbers. SciPy's `imresize`, which is gone, was Pillow's resize.
    """

    observation_space = gymnasium.spaces.Box(0, 255, [FRAME_SIZE, FRAME_SIZE], np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Return the frame of a screen."""
        red, green, blue = np.moveaxis(observation, -1, 0)
        luminance = (0.2126 * red + 0.7152 * green + 0.0722 * blue).astype(np.uint8)
        return np.asarray(Image.fromarray(luminance).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BILINEAR))
