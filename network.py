"""The actor-critic network, the n-step returns, the loss, the clip and the shared update.

Source: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", section 4 and supplement 3;
`network.py` of hiwonjoon/tf-a3c-gpu for the layers, the initial weights and the average-norm clip.

Shapes: T steps of an unroll, B games of a group, A actions, F filters of the first convolution, U units of the LSTM, S
numbers of a state.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from environment import FRAME_SIZE, history_to_frames
from startup import tf

WEIGHT_STDDEV = 0.02
# What a network begins with. Of each convolution: height and width, stride, its filters in relation to the first's, and
# whether the maximum of each 2 x 2 of its outputs goes on.
CONVOLUTIONS = {
    "original": [(8, 4, 1, False), (4, 2, 2, False)],
    "pooled": [(5, 2, 1, True), (4, 2, 2, False)],
    "deep": [(5, 2, 1, True), (3, 1, 2, True), (3, 1, 2, False), (3, 1, 2, False)],
}
GAINS = {"lstm": 1.0, "value": 1.0, "policy": 0.01}  # initial weights have the variance gain / inputs; others 2 (He)
FORGET_BIAS = 1.0  # an LSTM begins by keeping 0.73 of what it knows
HIDDEN_UNITS = 256
ADAM_BETAS = 0.9, 0.999


def choose_dtype(compute_dtype: str, device: str) -> str:
    """Turn `auto` into bfloat16 where `device` is a CPU that multiplies it (AMX or AVX512-BF16), else into float32."""
    if compute_dtype != "auto":
        return compute_dtype
    cpu = Path("/proc/cpuinfo")
    fast = "CPU" in device and cpu.exists() and re.search(r"\b(amx_bf16|avx512_bf16)\b", cpu.read_text())
    return "bfloat16" if fast else "float32"


def first_shapes(network: str, filters: int) -> dict[str, list[int]]:
    """Return the shapes of a network's weights, by layer, from the first convolution to the hidden layer."""
    shapes, side, depth = {}, FRAME_SIZE, 4
    for number, (size, stride, multiple, pooled) in enumerate(CONVOLUTIONS[network], 1):
        shapes[f"conv{number}"] = [size, size, depth, multiple * filters]
        side, depth = math.ceil(side / stride / (1 + pooled)), multiple * filters  # SAME padding rounds up
    return shapes | {"hidden": [side * side * depth, HIDDEN_UNITS]}


class ActorCritic(tf.Module):
    """Convolutions, a hidden layer and, if asked for, an LSTM, followed by a policy head and a value head.

    Another layer needs a shape in `__init__` and a line in `__call__`. All variables are in `weights` and `biases`, by
    layer: only these are saved. A new argument of `__init__` is also passed on by `a3c.make_network` and
    `checkpoint.load_network`.

    Args:
      num_actions: A.
      seed: of the initial weights.
      compute_dtype: of the weights and the layers. Logits and values are float32 in any case.
      filters: of the first convolution; the others have twice as many.
      network: one of `CONVOLUTIONS`. "original" begins with a convolution of 8 x 8 pixels at every fourth; "pooled"
        with one of 5 x 5 at every second, of which the maximum of 2 x 2 goes on: it sees better where things are.
        "deep" has four convolutions, two of them pooled, as tensorpack's A3C, whose first is at every pixel.
      background: grey level that is subtracted from the pixels. A screen that is mostly bright needs it: else the first
        updates push most filters of the first convolution below zero everywhere, where they stop learning.
      lstm: U, 0 for none.
      last_action: whether the hidden layer also gets what was done last. The screen shows that only frames later.
      input_scale: "raw" is the original's, pixels of 0..255 and weights of N(0, 0.02); "unit" divides them by 256, and
        begins with weights that keep their size (He et al. 2015): what an LSTM is made for.
    """

    def __init__(
        self,
        num_actions: int,
        seed: int = 0,
        compute_dtype: str = "float32",
        filters: int = 32,
        network: str = "original",
        background: int = 0,
        lstm: int = 0,
        last_action: bool = False,
        input_scale: str = "raw",
    ):
        super().__init__()
        self.num_actions, self.compute_dtype = num_actions, tf.as_dtype(compute_dtype)
        self.kind, self.lstm, self.last_action = network, lstm, last_action
        self.convolutions, shapes = CONVOLUTIONS[network], first_shapes(network, filters)
        shapes["policy"], shapes["value"] = [lstm or HIDDEN_UNITS, num_actions], [lstm or HIDDEN_UNITS, 1]
        if lstm:
            shapes["lstm"] = [HIDDEN_UNITS + lstm, 4 * lstm]
        self.weights, self.biases = {}, {}
        for index, (layer, shape) in enumerate(shapes.items()):
            normal = tf.random.stateless_truncated_normal if "conv" in layer else tf.random.stateless_normal
            inputs = math.prod(shape[:-1])
            keeps_size = input_scale == "unit" or layer in ("conv3", "conv4")  # which the original does not have
            stddev = math.sqrt(GAINS.get(layer, 2.0) / inputs) if keeps_size else WEIGHT_STDDEV
            initial = tf.cast(normal(shape, [seed, index], stddev=stddev), self.compute_dtype)
            self.weights[layer] = tf.Variable(initial, name=layer)
            self.biases[layer] = tf.Variable(tf.zeros(shape[-1:], self.compute_dtype), name=f"{layer}_bias")
        if last_action:  # at first it changes nothing
            self.weights["action"] = tf.Variable(
                tf.zeros([num_actions, HIDDEN_UNITS], self.compute_dtype), name="action"
            )
        if background:  # added to the pixels; a variable, so that checkpoints hold it
            self.biases["input"] = tf.Variable(tf.cast(-background, self.compute_dtype), trainable=False, name="input")
        if input_scale == "unit":  # multiplies them after that; exact in bfloat16 too, as 1 / 255 would not be
            self.weights["input"] = tf.Variable(tf.cast(1 / 256, self.compute_dtype), trainable=False, name="scale")

    def initial_state(self, num_games: int) -> tf.Tensor:
        """Return what a network knows when a game begins, beside the frames: zeros [B, S] float32.

        First come 2U numbers, an LSTM's output and cells, then A, a one where the last action was. Without an LSTM, or
        without the last action, S has not these.
        """
        return tf.zeros([num_games, 2 * self.lstm + self.num_actions * self.last_action])

    def remember(self, state: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
        """Return the state [B, S] with `action` [B] int32 as the last one, if the network gets that."""
        if not self.last_action:
            return state
        return tf.concat([state[:, : 2 * self.lstm], tf.one_hot(action, self.num_actions)], axis=1)

    def __call__(self, history: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return logits [B, A], value [B] and the next state, of `history` [B, 84, 84] uint32 and `state` [B, S].

        The next state has the same last action: `remember` is for the next.
        """
        x = tf.cast(history_to_frames(history), self.compute_dtype)  # 0..255
        w, b = self.weights, self.biases
        x = x + b["input"] if "input" in b else x
        x = x * w["input"] if "input" in w else x
        # oneDNN computes the gradient of `bias_add` along with that of the convolution, in float32. In bfloat16 it is
        # summed one number at a time in bfloat16, and up to half of it was lost; that of `tf.add` is off by 0.3 %.
        add = tf.nn.bias_add if self.compute_dtype == tf.float32 else tf.add
        for number, (_, stride, _, pooled) in enumerate(self.convolutions, 1):
            x = add(tf.nn.conv2d(x, w[f"conv{number}"], stride, "SAME"), b[f"conv{number}"])
            x = tf.nn.relu(tf.nn.max_pool2d(x, 2, 2, "SAME") if pooled else x)  # at last [B, 11, 11, 2F]
        x = tf.reshape(x, [x.shape[0], -1])
        x = x @ w["hidden"] + b["hidden"]
        memory, last_action = state[:, : 2 * self.lstm], state[:, 2 * self.lstm :]
        x = x + tf.cast(last_action, self.compute_dtype) @ w["action"] if self.last_action else x
        x = tf.nn.relu(x)  # [B, HIDDEN_UNITS]
        if self.lstm:
            memory = lstm_step(x, memory, w["lstm"], b["lstm"])
            state = tf.concat([memory, last_action], axis=1)
            x = tf.cast(memory[:, : self.lstm], self.compute_dtype)  # [B, U]
        logits = x @ w["policy"] + b["policy"]
        value = x @ w["value"] + b["value"]
        return tf.cast(logits, tf.float32), tf.cast(tf.squeeze(value, axis=1), tf.float32), state

    def copy_from(self, other: "ActorCritic"):
        """Set all trainable weights to those of `other`."""
        for mine, theirs in zip(self.trainable_variables, other.trainable_variables, strict=True):
            mine.assign(tf.cast(theirs, mine.dtype))


def lstm_step(x: tf.Tensor, state: tf.Tensor, weights: tf.Tensor, biases: tf.Tensor) -> tf.Tensor:
    """Return the state [B, 2U] float32 of an LSTM, its output and its cells, after one more input x [B, N].

    Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000. `weights` are [N + U, 4U], from x and
    the last output to the input gate, the forget gate, the new values and the output gate.
    """
    output, cells = tf.split(state, 2, axis=1)
    gates = tf.concat([x, tf.cast(output, x.dtype)], axis=1) @ weights + biases
    take, keep, new, show = tf.split(tf.cast(gates, tf.float32), 4, axis=1)
    cells = tf.sigmoid(keep + FORGET_BIAS) * cells + tf.sigmoid(take) * tf.tanh(new)
    return tf.concat([tf.sigmoid(show) * tf.tanh(cells), cells], axis=1)


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
    """The network that all threads train, with the state of its optimizer, RMSProp or Adam, and its average.

    RMSProp is TensorFlow 1's, as in the original: the mean square starts at one (not zero) and epsilon stands inside
    the square root. Keras' starts at zero and its first step is about ten times larger. Adam (Kingma and Ba 2015) is
    TensorFlow's, with its epsilon outside the root; it ignores `decay`.

    Args:
      num_actions, seed: as of `ActorCritic`.
      decay: of RMSProp's mean square.
      epsilon: of either optimizer.
      copies_dtype: what the copies compute in.
      optimizer: "rmsprop" or "adam".
      average: whether to keep an average of the weights over the updates (Polyak and Juditsky 1992). It has not
        the noise that the last updates leave in the newest, and no training depends on it.
      layers: all else that `ActorCritic` takes, but for `compute_dtype`.
    """

    def __init__(
        self,
        num_actions: int,
        decay: float,
        seed: int = 0,
        epsilon: float = 1e-10,
        copies_dtype: str = "float32",
        optimizer: str = "rmsprop",
        average: bool = False,
        **layers,
    ):
        super().__init__(num_actions, seed, **layers)
        self.decay, self.epsilon, self.copies_dtype, self.layers = decay, epsilon, copies_dtype, layers
        self.optimizer = optimizer
        variables = self.trainable_variables
        saved = {v.ref() for v in (*self.weights.values(), *self.biases.values())}
        if lost := [v.name for v in variables if v.ref() not in saved]:
            raise ValueError(f"put {', '.join(lost)} into `weights` or `biases`: nothing else is saved")
        first = tf.zeros_like if optimizer == "adam" else tf.ones_like
        self.mean_squares = [tf.Variable(first(v), trainable=False) for v in variables]
        self.means = [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]  # of gradients, for Adam
        self.updates = tf.Variable(0.0, trainable=False)  # made by Adam
        self.averages = [tf.Variable(v, trainable=False) for v in variables if average]

    @property
    def slots(self) -> dict:
        """What a resumed run needs beside the weights: the optimizer's variables, and the averages if they are kept."""
        slots = {"mean_squares": self.mean_squares}
        slots |= {"means": self.means, "updates": self.updates} if self.optimizer == "adam" else {}
        return {**slots, "averages": self.averages} if self.averages else slots

    def make_copy(self) -> ActorCritic:
        """Return a network for a thread: equal, but computing in `copies_dtype`."""
        copy = ActorCritic(self.num_actions, 0, self.copies_dtype, **self.layers)
        copy.copy_from(self)
        return copy

    def apply_gradients(self, gradients, learning_rate):
        """Take one step of the optimizer. The caller lets one thread in at a time ("locked" in the original).

        `gradients` are in the order of `trainable_variables`, which is the same in all copies.
        """
        options = {"lr": learning_rate, "epsilon": self.epsilon, "use_locking": True}
        everything = zip(self.trainable_variables, gradients, self.mean_squares, self.means, strict=True)
        if self.optimizer == "adam":
            (beta1, beta2), updates = ADAM_BETAS, self.updates.assign_add(1.0)
            options |= {"beta1": beta1, "beta2": beta2, "beta1_power": beta1**updates, "beta2_power": beta2**updates}
            for variable, gradient, square, mean in everything:
                tf.raw_ops.ResourceApplyAdam(
                    var=variable.handle, grad=gradient, v=square.handle, m=mean.handle, **options
                )
        else:
            options |= {"rho": self.decay, "momentum": 0.0}
            for variable, gradient, square, unused in everything:
                tf.raw_ops.ResourceApplyRMSProp(
                    var=variable.handle, grad=gradient, ms=square.handle, mom=unused.handle, **options
                )

    def update_averages(self, rate):
        """Let the averages, if they are kept, go this part of the way to the weights: 0 to 1."""
        for average, variable in zip(self.averages, self.trainable_variables, strict=False):  # none, if not kept
            average.assign((1 - rate) * average + rate * variable)
