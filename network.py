"""The actor-critic network, the n-step returns, the loss, the clip and the shared RMSProp update.

Source: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", section 4 and supplement 3;
`network.py` of hiwonjoon/tf-a3c-gpu for the layers, the initial weights and the average-norm clip.

Shapes: T steps of an unroll, B games of a group, A actions, F filters of the first convolution.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from environment import FRAME_SIZE, history_to_frames
from startup import tf

WEIGHT_STDDEV = 0.02
HIDDEN_UNITS = 256


def choose_dtype(compute_dtype: str, device: str) -> str:
    """Turn `auto` into bfloat16 where `device` is a CPU that multiplies it (AMX or AVX512-BF16), else into float32."""
    if compute_dtype != "auto":
        return compute_dtype
    cpu = Path("/proc/cpuinfo")
    fast = "CPU" in device and cpu.exists() and re.search(r"\b(amx_bf16|avx512_bf16)\b", cpu.read_text())
    return "bfloat16" if fast else "float32"


class ActorCritic(tf.Module):
    """Two convolutions and a hidden layer, followed by a policy head and a value head.

    Another layer needs a shape in `__init__` and a line in `__call__`. All variables are in `weights` and `biases`, by
    layer: only these are saved. A new argument of `__init__` is also passed on by `SharedNetwork`, `a3c.make_network`
    and `checkpoint.load_network`.

    Args:
      num_actions: A.
      seed: of the initial weights.
      compute_dtype: of the weights and the layers. Logits and values are float32 in any case.
      filters: of the first convolution; the second has twice as many.
      background: grey level that is subtracted from the pixels. A screen that is mostly bright needs it: else the first
        updates push most filters of the first convolution below zero everywhere, where they stop learning.
    """

    def __init__(
        self, num_actions: int, seed: int = 0, compute_dtype: str = "float32", filters: int = 32, background: int = 0
    ):
        super().__init__()
        self.num_actions, self.compute_dtype = num_actions, tf.as_dtype(compute_dtype)
        flat = (FRAME_SIZE // 8 + 1) ** 2 * 2 * filters  # SAME padding rounds up: 84 -> 21 -> 11
        shapes = {
            "conv1": [8, 8, 4, filters],
            "conv2": [4, 4, filters, 2 * filters],
            "hidden": [flat, HIDDEN_UNITS],
            "policy": [HIDDEN_UNITS, num_actions],
            "value": [HIDDEN_UNITS, 1],
        }
        self.weights, self.biases = {}, {}
        for index, (layer, shape) in enumerate(shapes.items()):
            normal = tf.random.stateless_truncated_normal if "conv" in layer else tf.random.stateless_normal
            initial = tf.cast(normal(shape, [seed, index], stddev=WEIGHT_STDDEV), self.compute_dtype)
            self.weights[layer] = tf.Variable(initial, name=layer)
            self.biases[layer] = tf.Variable(tf.zeros(shape[-1:], self.compute_dtype), name=f"{layer}_bias")
        if background:  # added to the pixels; a variable, so that checkpoints hold it
            self.biases["input"] = tf.Variable(tf.cast(-background, self.compute_dtype), trainable=False, name="input")

    def __call__(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return logits [B, A] and value [B] of `history` [B, 84, 84] uint32. Pixels are 0..255."""
        x = tf.cast(history_to_frames(history), self.compute_dtype)
        w, b = self.weights, self.biases
        x = x + b["input"] if "input" in b else x
        # oneDNN computes the gradient of `bias_add` along with that of the convolution, in float32. In bfloat16 it is
        # summed one number at a time in bfloat16, and up to half of it was lost; that of `tf.add` is off by 0.3 %.
        add = tf.nn.bias_add if self.compute_dtype == tf.float32 else tf.add
        x = tf.nn.relu(add(tf.nn.conv2d(x, w["conv1"], 4, "SAME"), b["conv1"]))  # [B, 21, 21, F]
        x = tf.nn.relu(add(tf.nn.conv2d(x, w["conv2"], 2, "SAME"), b["conv2"]))  # [B, 11, 11, 2F]
        x = tf.reshape(x, [x.shape[0], -1])
        x = tf.nn.relu(x @ w["hidden"] + b["hidden"])  # [B, HIDDEN_UNITS]
        logits = x @ w["policy"] + b["policy"]
        value = x @ w["value"] + b["value"]
        return tf.cast(logits, tf.float32), tf.cast(tf.squeeze(value, axis=1), tf.float32)

    def copy_from(self, other: "ActorCritic"):
        """Set all trainable weights to those of `other`."""
        for mine, theirs in zip(self.trainable_variables, other.trainable_variables, strict=True):
            mine.assign(tf.cast(theirs, mine.dtype))


class Losses(NamedTuple):
    """Scalars reported of one update. Entropy is positive, and the loss contains minus `entropy_beta` times it.

    The first ones are the terms of `a3c_loss`, in its order. A new one gets a column in `report.py` too.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    gradient_norm: float  # global norm before the clip


def draw_action(logits: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draw an action [B] int32 for each game from logits [B, A]; the same seed, [2] int32, draws the same actions.

    If no logit is finite, the actions are out of range.
    """
    return tf.squeeze(tf.random.stateless_categorical(logits, 1, seed, dtype=tf.int32), axis=1)


def n_step_returns(rewards, ends, values, bootstrap, discount: float, gae_lambda: float = 1.0) -> tf.Tensor:
    """Return R_t = r_t + discount * R_{t+1}, with R_T = bootstrap and no look across the end of a return.

    Paper, algorithm S3. A `gae_lambda` below 1 trusts the values more: R_{t+1} is mixed with V_{t+1}, lambda to
    1 - lambda, which makes R_t - V_t the generalised advantage estimate (Schulman et al. 2015).

    rewards, ends, values: T tensors [B], float32, bool and float32; bootstrap [B] float32 -> [T, B] float32.
    """
    returns, following = [], bootstrap
    values = [*values[1:], bootstrap]  # of the states that follow
    for reward, end, value in zip(*map(reversed, (rewards, ends, values)), strict=True):
        following = gae_lambda * following + (1 - gae_lambda) * value if gae_lambda < 1 else following
        following = reward + discount * tf.where(end, 0.0, following)
        returns.append(following)
    return tf.stack(returns[::-1])


def policy_loss(logits: tf.Tensor, actions: tf.Tensor, advantages: tf.Tensor) -> tf.Tensor:
    """Return -mean(log pi(a|s) * advantage); no gradient goes through the advantages."""
    negative_log_prob = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=actions, logits=logits)
    return tf.reduce_mean(negative_log_prob * tf.stop_gradient(advantages))


def value_loss(advantages: tf.Tensor) -> tf.Tensor:
    """Return mean(advantage ** 2)."""
    return tf.reduce_mean(tf.square(advantages))


def mean_entropy(logits: tf.Tensor) -> tf.Tensor:
    """Return the mean entropy of the policies in logits [..., A], in nats."""
    return tf.reduce_mean(-tf.reduce_sum(tf.nn.softmax(logits) * tf.nn.log_softmax(logits), axis=-1))


def a3c_loss(logits, values, actions, returns, entropy_beta: float, value_weight: float = 1.0):
    """Return the loss of a rollout and its three terms, all scalars.

    logits: T tensors [B, A]; values: T tensors [B]; actions: T tensors [B] int32; returns: [T, B] float32.
    """
    logits, actions = tf.stack(logits), tf.stack(actions)
    advantages = returns - tf.stack(values)
    policy, value, entropy = policy_loss(logits, actions, advantages), value_loss(advantages), mean_entropy(logits)
    return policy + value_weight * value - entropy_beta * entropy, (policy, value, entropy)


def clip_gradients(gradients: Sequence[tf.Tensor], clip: float | None, global_clip: float | None = None):
    """Return the gradients in float32, clipped, and their global norm before that.

    Each is scaled down so that its average norm, its L2 norm divided by its number of elements, is at most `clip`;
    then all together so that their global norm is at most `global_clip`. None turns a clip off.
    """
    gradients = [tf.cast(gradient, tf.float32) for gradient in gradients]
    norms = tf.sqrt(2 * tf.stack([tf.nn.l2_loss(gradient) for gradient in gradients]))
    scales = tf.ones_like(norms)
    if clip is not None:
        average_norms = norms / [float(gradient.shape.num_elements()) for gradient in gradients]
        scales = clip / tf.maximum(average_norms, clip)
    if global_clip is not None:
        scales *= global_clip / tf.maximum(tf.norm(norms * scales), global_clip)
    return [gradient * scale for gradient, scale in zip(gradients, tf.unstack(scales), strict=True)], tf.norm(norms)


class SharedNetwork(ActorCritic):
    """The network that all threads train, with the state of its RMSProp.

    RMSProp is TensorFlow 1's, as in the original: the mean square starts at one (not zero) and epsilon stands inside
    the square root. Keras' starts at zero and its first step is about ten times larger.
    """

    def __init__(
        self,
        num_actions: int,
        decay: float,
        seed: int = 0,
        epsilon: float = 1e-10,
        filters: int = 32,
        background: int = 0,
        copies_dtype: str = "float32",
    ):
        super().__init__(num_actions, seed, filters=filters, background=background)
        self.decay, self.epsilon, self.copies_dtype = decay, epsilon, copies_dtype
        self.filters, self.background = filters, background
        variables = self.trainable_variables
        saved = {v.ref() for v in (*self.weights.values(), *self.biases.values())}
        if lost := [v.name for v in variables if v.ref() not in saved]:
            raise ValueError(f"put {', '.join(lost)} into `weights` or `biases`: nothing else is saved")
        self.mean_squares = [tf.Variable(tf.ones_like(v), trainable=False) for v in variables]
        self.no_momenta = [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]  # required, never used

    def make_copy(self) -> ActorCritic:
        """Return a network for a thread: equal, but computing in `copies_dtype`."""
        copy = ActorCritic(self.num_actions, 0, self.copies_dtype, self.filters, self.background)
        copy.copy_from(self)
        return copy

    def apply_gradients(self, gradients, learning_rate):
        """Take one RMSProp step. The caller lets one thread in at a time ("locked" in the original)."""
        slots = zip(self.trainable_variables, self.mean_squares, self.no_momenta, gradients, strict=True)
        for variable, mean_square, momentum, gradient in slots:
            tf.raw_ops.ResourceApplyRMSProp(
                var=variable.handle,
                ms=mean_square.handle,
                mom=momentum.handle,
                lr=learning_rate,
                rho=self.decay,
                momentum=0.0,
                epsilon=self.epsilon,
                grad=gradient,
                use_locking=True,
            )
