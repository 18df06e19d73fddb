"""The arithmetic against slow NumPy loops written from the formulas, and against TensorFlow 1's optimiser."""

import numpy as np
import pytest
from conftest import heads

import network as net
from environment import history_to_frames
from startup import tf

T, B, A = 5, 3, 4  # unroll steps, games, actions


@pytest.fixture
def rollout():
    """Return a random rollout: logits [T, B, A], values, actions, rewards, dones [T, B], bootstrap [B]."""
    rng = np.random.default_rng(1)
    return {
        "logits": rng.normal(0, 2, [T, B, A]).astype(np.float32),
        "values": rng.normal(0, 2, [T, B]).astype(np.float32),
        "actions": rng.integers(0, A, [T, B]),
        "rewards": rng.normal(0, 1, [T, B]).astype(np.float32),
        "dones": np.array([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]], bool),
        "bootstrap": rng.normal(0, 3, [B]).astype(np.float32),
    }


def random_history(num_games=2):
    """Return a history [B, 84, 84] uint32 of noise."""
    return tf.constant(np.random.default_rng(3).integers(0, 2**32, [num_games, 84, 84], np.uint32))


def log_softmax(row):
    return row - row.max() - np.log(np.sum(np.exp(row - row.max())))


# Returns.


def test_returns_equal_the_discounted_sum_up_to_the_end_of_the_game(rollout):
    discount = 0.9
    expected = np.zeros([T, B])
    for b in range(B):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                expected[t, b] += weight * rollout["rewards"][k, b]
                weight *= discount
                if rollout["dones"][k, b]:
                    break
            else:
                expected[t, b] += weight * rollout["bootstrap"][b]
    values = list(rollout["values"])
    found = net.n_step_returns(list(rollout["rewards"]), list(rollout["dones"]), values, rollout["bootstrap"], discount)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 0.95, 1.0])
def test_advantages_equal_generalised_advantage_estimation(rollout, gae_lambda):
    """The sum over k of (discount * lambda) ** k * delta_{t+k}, Schulman et al. 2015, equation 16."""
    discount, values = 0.9, np.concatenate([rollout["values"], rollout["bootstrap"][None]])
    expected = np.zeros([T, B])
    for b in range(B):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                following = 0 if rollout["dones"][k, b] else values[k + 1, b]
                expected[t, b] += weight * (rollout["rewards"][k, b] + discount * following - values[k, b])
                weight *= discount * gae_lambda
                if rollout["dones"][k, b]:
                    break
    returns = net.n_step_returns(
        *(list(rollout[name]) for name in ("rewards", "dones", "values")), rollout["bootstrap"], discount, gae_lambda
    )
    np.testing.assert_allclose(returns - rollout["values"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gae_lambda", [0.5, 1.0])
def test_returns_ignore_a_bootstrap_behind_the_end_of_a_game(gae_lambda):
    dones, values = np.array([[False], [True]]), [np.float32([9]), np.float32([1])]
    rewards = list(np.ones([2, 1], np.float32))
    found = net.n_step_returns(rewards, list(dones), values, np.float32([np.inf]), 0.5, gae_lambda)
    np.testing.assert_array_equal(found, [[1.5], [1.0]])


# Loss.


def test_loss_terms_equal_the_formulas_written_as_loops(rollout):
    returns = rollout["rewards"]
    policy, value, entropy = [], [], []
    for t in range(T):
        for b in range(B):
            log_prob = log_softmax(rollout["logits"][t, b].astype(np.float64))
            advantage = float(returns[t, b]) - float(rollout["values"][t, b])
            policy.append(-log_prob[rollout["actions"][t, b]] * advantage)
            value.append(advantage**2)
            entropy.append(-np.sum(np.exp(log_prob) * log_prob))
    expected = np.mean(policy), np.mean(value), np.mean(entropy)

    rolled = list(rollout["logits"]), list(rollout["values"]), list(rollout["actions"]), returns
    for weight, arguments in ((1.0, [0.01]), (0.25, [0.01, 0.25])):
        loss, terms = net.a3c_loss(*rolled, *arguments)
        np.testing.assert_allclose([float(x) for x in terms], expected, rtol=1e-5)
        np.testing.assert_allclose(loss, expected[0] + weight * expected[1] - 0.01 * expected[2], rtol=1e-5)


def test_gradient_of_the_loss_equals_the_one_derived_by_hand(rollout):
    beta, returns = 0.05, rollout["rewards"]
    by_logits, by_values = np.zeros([T, B, A]), np.zeros([T, B])
    for t in range(T):
        for b in range(B):
            log_prob = log_softmax(rollout["logits"][t, b].astype(np.float64))
            prob = np.exp(log_prob)
            advantage = float(returns[t, b]) - float(rollout["values"][t, b])
            chosen = np.arange(A) == rollout["actions"][t, b]
            entropy = -np.sum(prob * log_prob)
            # d(-log p_chosen)/dlogit_i = p_i - [i chosen]; dH/dlogit_i = -p_i (log p_i + H)
            by_logits[t, b] = ((prob - chosen) * advantage + beta * prob * (log_prob + entropy)) / (T * B)
            by_values[t, b] = -2 * advantage / (T * B)

    logits, values = tf.constant(rollout["logits"]), tf.constant(rollout["values"])
    with tf.GradientTape() as tape:
        tape.watch([logits, values])
        loss, _ = net.a3c_loss(
            tf.unstack(logits), tf.unstack(values), tf.unstack(tf.constant(rollout["actions"])), returns, beta
        )
    found = tape.gradient(loss, [logits, values])
    np.testing.assert_allclose(found[0], by_logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1], by_values, rtol=1e-4, atol=1e-6)


def test_policy_loss_sends_no_gradient_into_the_values(rollout):
    values = tf.constant(rollout["values"])
    with tf.GradientTape() as tape:
        tape.watch(values)
        loss = net.policy_loss(rollout["logits"], rollout["actions"], rollout["rewards"] - values)
    assert tape.gradient(loss, values) is None


@pytest.mark.parametrize("logits, entropy", [([0.0] * 4, np.log(4)), ([0.0, -1e4, -1e4, -1e4], 0.0)])
def test_entropy_is_positive_and_in_nats_from_certain_to_uniform(logits, entropy):
    np.testing.assert_allclose(net.mean_entropy(tf.constant([logits])), entropy, atol=1e-6)


# Clip.


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_clip_bounds_each_tensors_norm_per_element(scale):
    rng = np.random.default_rng(0)
    gradients = [scale * rng.normal(size=shape).astype(np.float32) for shape in ([3, 4], [5], [1])]
    clip = 0.1
    expected = []
    for gradient in gradients:
        average_norm = np.sqrt(sum(x * x for x in gradient.ravel().tolist())) / gradient.size
        expected.append(gradient * (clip / average_norm) if average_norm > clip else gradient)

    found, norm = net.clip_gradients([tf.constant(g) for g in gradients], clip)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(np.square(g)) for g in gradients)), rtol=1e-5)


@pytest.mark.parametrize("gradients, clip", [([[1e3, -1e3], [7.0]], None), ([[0.0, 0.0, 0.0]], 0.1)])
def test_gradients_stay_as_they_are_without_a_clip_or_if_they_are_zero(gradients, clip):
    found, norm = net.clip_gradients([tf.constant(gradient) for gradient in gradients], clip)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(norm, np.linalg.norm(np.concatenate(gradients)), rtol=1e-6)


@pytest.mark.parametrize("clip, scale", [(2.5, 0.5), (5.0, 1.0), (8.0, 1.0)])
def test_global_clip_bounds_the_norm_of_all_gradients_together(clip, scale):
    gradients = [tf.constant([3.0, 0.0]), tf.constant([[4.0]])]
    found, norm = net.clip_gradients(gradients, None, clip)
    assert float(norm) == 5
    np.testing.assert_allclose(found[0], [3 * scale, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1], [[4 * scale]], rtol=1e-6)


# The update.


def random_gradients(variables, rng):
    return [tf.constant(rng.normal(0, 10.0 ** rng.integers(-4, 1), v.shape).astype(np.float32)) for v in variables]


@pytest.mark.parametrize("epsilon", [1e-10, 1e-3])
def test_update_equals_tensorflow_1s_rmsprop(epsilon):
    shared = net.SharedNetwork(A, decay=0.99, seed=1, epsilon=epsilon)
    others = [tf.Variable(v) for v in shared.trainable_variables]
    rates = np.float32([2.5e-4, 2e-4, 1e-3, 1e-4])
    step = 0
    optimizer = tf.compat.v1.train.RMSPropOptimizer(lambda: rates[step], decay=0.99, epsilon=epsilon, use_locking=True)
    rng = np.random.default_rng(5)
    for step in range(len(rates)):  # the optimizer reads it
        gradients = random_gradients(others, rng)
        shared.apply_gradients(gradients, rates[step])
        optimizer.apply_gradients(zip(gradients, others, strict=True))
    for mine, other in zip(shared.trainable_variables, others, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_update_starts_its_mean_square_at_one():
    shared, decay, rate = net.SharedNetwork(A, decay=0.5, seed=1), 0.5, np.float32(0.01)
    expected = [v.numpy().astype(np.float64) for v in shared.trainable_variables]
    mean_squares = [np.ones_like(v) for v in expected]
    rng = np.random.default_rng(6)
    for _ in range(3):
        gradients = random_gradients(shared.trainable_variables, rng)
        for i, gradient in enumerate(gradients):
            g = gradient.numpy().astype(np.float64)
            mean_squares[i] = decay * mean_squares[i] + (1 - decay) * g**2
            expected[i] -= rate * g / np.sqrt(mean_squares[i] + 1e-10)
        shared.apply_gradients(gradients, rate)
    for mine, other in zip(shared.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_update_has_epsilon_inside_the_root():
    shared = net.SharedNetwork(A, decay=0.5, seed=1)
    for mean_square in shared.mean_squares:
        mean_square.assign(tf.zeros_like(mean_square))
    before = shared.biases["value"].numpy()
    tiny = [tf.fill(v.shape, 1e-6) for v in shared.trainable_variables]  # its square is far below epsilon
    shared.apply_gradients(tiny, np.float32(0.01))
    np.testing.assert_allclose(before - shared.biases["value"], 0.01 * 1e-6 / np.sqrt(5e-13 + 1e-10), rtol=1e-4)


def test_adam_equals_tensorflows_and_goes_on_with_the_slots_that_are_saved():
    shared = net.SharedNetwork(A, decay=0.99, seed=1, epsilon=1e-3, optimizer="adam")
    others = [tf.Variable(v) for v in shared.trainable_variables]
    optimizer = tf.compat.v1.train.AdamOptimizer(0.01, epsilon=1e-3, use_locking=True)
    rng = np.random.default_rng(5)
    for step in range(4):
        gradients = random_gradients(others, rng)
        shared.apply_gradients(gradients, np.float32(0.01))
        optimizer.apply_gradients(zip(gradients, others, strict=True))
        if step == 1:  # another network goes on
            first, shared = shared, net.SharedNetwork(A, decay=0.99, seed=2, epsilon=1e-3, optimizer="adam")
            shared.copy_from(first)
            for mine, theirs in zip(tf.nest.flatten(shared.slots), tf.nest.flatten(first.slots), strict=True):
                mine.assign(theirs)
    for mine, other in zip(shared.trainable_variables, others, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)  # of steps of about 0.01


def test_averages_go_towards_the_weights_and_change_nothing_else():
    plain, shared = (net.SharedNetwork(A, decay=0.99, seed=1, filters=2, average=kept) for kept in (False, True))
    expected = [v.numpy() for v in shared.trainable_variables]
    rng = np.random.default_rng(5)
    for rate in (0.5, 0.1, 0.25):
        gradients = random_gradients(shared.trainable_variables, rng)
        for network in (plain, shared):
            network.apply_gradients(gradients, np.float32(0.01))
            network.update_averages(np.float32(rate))
        expected = [old + rate * (v.numpy() - old) for old, v in zip(expected, shared.trainable_variables, strict=True)]
    for average, mine, theirs, other in zip(
        shared.averages, expected, shared.trainable_variables, plain.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(average, mine, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(theirs, other)
        assert np.any(average != theirs)
    assert plain.averages == []


# The network.


@pytest.mark.parametrize("filters", [32, 16])
def test_network_has_the_originals_shapes_and_as_many_filters_as_asked(filters):
    network = net.ActorCritic(6, filters=filters)
    assert {name: tuple(v.shape) for name, v in network.weights.items()} == {
        "conv1": (8, 8, 4, filters),
        "conv2": (4, 4, filters, 2 * filters),
        "hidden": (11 * 11 * 2 * filters, 256),
        "policy": (256, 6),
        "value": (256, 1),
    }
    assert [tuple(v.shape) for v in network.biases.values()] == [(filters,), (2 * filters,), (256,), (6,), (1,)]
    assert len(network.trainable_variables) == 10
    logits, value = heads(network, random_history(num_games=3))
    assert (logits.shape, value.shape) == ([3, 6], [3])


@pytest.mark.parametrize(
    "kind, strides, sides, pooled",
    [("pooled", [2, 2], [42, 11], [True, False]), ("deep", [2, 1, 1, 1], [42, 21, 11, 11], [True, True, False, False])],
)
def test_pooled_networks_take_the_maximum_of_finer_convolutions(kind, strides, sides, pooled):
    network, history = net.ActorCritic(6, 2, network=kind, filters=16), random_history(num_games=2)
    w = {name: variable.numpy().astype(np.float64) for name, variable in network.weights.items()}
    b = {name: np.random.default_rng(0).normal(size=variable.shape) for name, variable in network.biases.items()}
    for name, variable in network.biases.items():
        variable.assign(b[name])
    x = history_to_frames(history).numpy()
    for number, (stride, side, maximum) in enumerate(zip(strides, sides, pooled, strict=True), 1):
        weights = w[f"conv{number}"]
        size = len(weights)
        missing = (side - 1) * stride + size - x.shape[1]  # the half of it is added before, as TensorFlow does it
        around = (missing // 2, missing - missing // 2)
        x = np.pad(x, [(0, 0), around, around, (0, 0)])
        patches = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
        x = np.maximum(np.einsum("nxycij,ijcf->nxyf", patches, weights, optimize=True) + b[f"conv{number}"], 0)
        assert x.shape == (2, side, side, 16 if number == 1 else 32)
        if maximum:
            odd = side % 2  # an empty row and column then end the picture; ReLU makes all others at least as large
            x = np.pad(x, [(0, 0), (0, odd), (0, odd), (0, 0)])
            half = (side + odd) // 2
            x = x.reshape(2, half, 2, half, 2, -1).max(axis=(2, 4))
    x = np.maximum(x.reshape(2, -1) @ w["hidden"] + b["hidden"], 0)
    np.testing.assert_allclose(heads(network, history)[0], x @ w["policy"] + b["policy"], rtol=1e-3, atol=1e-3)


def test_initial_weights_have_the_originals_spread():
    network = net.ActorCritic(6, seed=11)
    for layer, variable in network.weights.items():
        weights = variable.numpy()
        error = 3 / np.sqrt(weights.size)  # about three standard errors
        assert abs(weights.mean()) < 0.02 * error
        if "conv" in layer:
            assert np.abs(weights).max() <= 2 * 0.02
            spread = 0.8796 * 0.02  # of a normal that is cut off at two standard deviations
        else:
            assert weights.size < 5000 or np.abs(weights).max() > 3 * 0.02
            spread = 0.02
        assert abs(weights.std() / spread - 1) < error
    for variable in network.biases.values():
        np.testing.assert_array_equal(variable, np.zeros(variable.shape))


def test_layers_that_the_original_does_not_have_keep_the_size_of_their_input():
    weights = net.ActorCritic(6, seed=11, network="deep").weights
    for layer, inputs in {"conv3": 576, "conv4": 576}.items():
        assert abs(np.std(weights[layer]) / 0.8796 / np.sqrt(2 / inputs) - 1) < 3 / np.sqrt(weights[layer].numpy().size)
    assert np.std(weights["conv2"]) == pytest.approx(0.8796 * 0.02, rel=0.05)


def test_initial_weights_for_unit_input_keep_its_size():
    network = net.ActorCritic(6, seed=11, lstm=512, input_scale="unit")
    inputs = {"conv1": 256, "conv2": 512, "hidden": 7744, "lstm": 768, "policy": 512, "value": 512}
    for layer, number in inputs.items():
        weights = network.weights[layer].numpy()
        gain = {"policy": 0.01, "value": 1, "lstm": 1}.get(layer, 2) * (0.8796**2 if "conv" in layer else 1)  # cut off
        assert weights.std() == pytest.approx(np.sqrt(gain / number), rel=3 / np.sqrt(2 * weights.size))
    assert len(network.trainable_variables) == 12


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("background", [0, 87])
def test_unit_input_is_the_raw_one_divided_by_256_after_the_background_is_taken_off(background, compute_dtype):
    options = {"filters": 4, "background": background}
    raw, unit = (net.ActorCritic(2, 0, compute_dtype, **options, input_scale=scale) for scale in ("raw", "unit"))
    unit.copy_from(raw)
    unit.weights["conv1"].assign(256 * raw.weights["conv1"])
    for one, other in zip(heads(raw, random_history()), heads(unit, random_history()), strict=True):
        assert np.all(one != 0)
        np.testing.assert_array_equal(one, other)


def test_lstm_is_that_of_the_formula_and_stands_between_the_hidden_layer_and_the_heads():
    network, history = net.ActorCritic(A, 3, lstm=5, input_scale="unit"), random_history(num_games=3)
    assert network.initial_state(3).shape == [3, 10]
    assert not np.any(network.initial_state(3))
    network.biases["lstm"].assign(np.linspace(-1, 1, 20))
    plain = net.ActorCritic(256, input_scale="unit")  # its logits are the hidden layer
    for layer in ("conv1", "conv2", "hidden"):
        plain.weights[layer].assign(network.weights[layer])
    plain.weights["policy"].assign(np.eye(256))
    hidden = heads(plain, history)[0].numpy()
    before = np.random.default_rng(2).normal(size=[3, 10]).astype(np.float32)
    logits, values, after = (x.numpy() for x in network(history, before))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    w = {name: v.numpy().astype(np.float64) for name, v in network.weights.items()}
    for game in range(3):
        inputs = [*hidden[game], *before[game, :5]]
        for unit in range(5):
            take, keep, new, show = (
                sum(x * w["lstm"][i, gate * 5 + unit] for i, x in enumerate(inputs))
                + float(network.biases["lstm"][gate * 5 + unit])
                for gate in range(4)
            )
            cell = sigmoid(keep + 1) * before[game, 5 + unit] + sigmoid(take) * np.tanh(new)
            assert after[game, 5 + unit] == pytest.approx(cell, abs=1e-5)
            assert after[game, unit] == pytest.approx(sigmoid(show) * np.tanh(cell), abs=1e-5)
    np.testing.assert_allclose(logits, after[:, :5] @ w["policy"], atol=1e-5)
    np.testing.assert_allclose(values, (after[:, :5] @ w["value"])[:, 0], atol=1e-5)


@pytest.mark.parametrize("lstm", [0, 5])
def test_last_action_is_added_to_the_hidden_layer(lstm):
    layers = {"filters": 4, "lstm": lstm, "input_scale": "unit"}
    network, plain = net.ActorCritic(A, 3, **layers, last_action=True), net.ActorCritic(A, 3, **layers)
    assert network.initial_state(2).shape == [2, 2 * lstm + A]
    history, memory = random_history(num_games=2), np.random.default_rng(2).normal(size=[2, 2 * lstm]).astype("f")
    before = network.remember(tf.pad(memory, [[0, 0], [0, A]]), tf.constant([2, 0]))
    plain_before = plain.remember(memory, tf.constant([2, 0]))
    for mine, theirs in zip(network(history, before)[:2], plain(history, plain_before)[:2], strict=True):
        np.testing.assert_array_equal(mine, theirs)  # at first it changes nothing
    network.weights["action"].assign(np.random.default_rng(1).normal(size=[A, 256]))
    told, none = network(history, before), network(history, tf.pad(memory, [[0, 0], [0, A]]))
    for game, action in enumerate([2, 0]):
        plain.biases["hidden"].assign(network.weights["action"][action])
        *heads_alone, after = (x[game] for x in plain(history, memory))
        for mine, theirs in zip(told[:2], heads_alone, strict=True):
            np.testing.assert_allclose(mine[game], theirs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(told[2][game], [*after, *np.eye(A)[action]], rtol=1e-4, atol=1e-5)
        plain.biases["hidden"].assign(np.zeros(256))  # in the first step of a game
        np.testing.assert_allclose(none[1][game], plain(history, memory)[1][game], rtol=1e-5)
        assert abs(told[1][game] - none[1][game]) > 0.001


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    one, same, other = (net.ActorCritic(4, seed).weights["conv1"].numpy() for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert not np.any(one == other)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_background_is_taken_off_the_pixels_and_is_not_trained(compute_dtype):
    plain = net.ActorCritic(2, 1, compute_dtype)
    less = net.ActorCritic(2, 1, compute_dtype, background=87)
    frames = np.random.default_rng(0).integers(0, 100, [3, 84, 84, 4], np.uint8)
    history, brighter = (tf.bitcast(tf.constant(x), tf.uint32) for x in (frames, frames + np.uint8(87)))
    for one, other in zip(heads(plain, history), heads(less, brighter), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(less.trainable_variables) == len(plain.trainable_variables)


def test_variable_that_would_not_be_saved_is_refused(monkeypatch):
    make = net.ActorCritic.__init__

    def with_one_more(self, *arguments, **options):
        make(self, *arguments, **options)
        self.scale = tf.Variable(1.0, name="scale")

    monkeypatch.setattr(net.ActorCritic, "__init__", with_one_more)
    with pytest.raises(ValueError, match="put scale:0 into `weights` or `biases`"):
        net.SharedNetwork(A, 0.99)


def test_pixels_enter_as_0_to_255_in_the_order_oldest_first():
    network = net.ActorCritic(2)
    for variable in network.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    # One path through the network: the channel-th frame's pixel (2, 2), which conv1 reads without padding at (0, 0).
    for channel, expected in enumerate([10.0, 20.0, 30.0, 255.0]):
        conv1 = np.zeros([8, 8, 4, 32], np.float32)
        conv1[4, 4, channel, 0] = 1  # SAME pads 2 rows above: row 4 of the kernel is row 2 of the frame
        network.weights["conv1"].assign(conv1)
        conv2 = np.zeros([4, 4, 32, 64], np.float32)
        conv2[1, 1, 0, 0] = 1
        network.weights["conv2"].assign(conv2)
        hidden = np.zeros([11 * 11 * 64, 256], np.float32)
        hidden[0, 0] = 1
        network.weights["hidden"].assign(hidden)
        network.weights["value"].assign(np.eye(256, 1, dtype=np.float32))
        history = np.zeros([1, 84, 84, 4], np.uint8)
        history[0, 2, 2] = [10, 20, 30, 255]
        _, value = heads(network, tf.constant(history.view(np.uint32)[..., 0]))
        assert float(value[0]) == expected


# Acting.


def test_actions_are_drawn_actions_with_the_policys_probabilities():
    network = net.ActorCritic(A)
    network.weights["policy"].assign(tf.zeros_like(network.weights["policy"]))
    probabilities = np.float32([0.1, 0.2, 0.3, 0.4])
    network.biases["policy"].assign(np.log(probabilities))
    history = random_history(num_games=100)
    actions = [net.draw_action(heads(network, history)[0], np.int32([5, step])) for step in range(20)]
    shares = np.bincount(np.ravel(actions), minlength=A) / 2000
    np.testing.assert_allclose(shares, probabilities, atol=0.05)  # more than four standard errors


def test_actions_are_drawn_the_same_actions_from_the_same_seed_only():
    network, history = net.ActorCritic(A), random_history(num_games=30)
    one, same, other = (net.draw_action(heads(network, history)[0], np.int32([1, n])).numpy() for n in (2, 2, 3))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_actions_out_of_range(wrong):
    network = net.ActorCritic(A)
    network.biases["policy"].assign(tf.fill([A], wrong))
    action = net.draw_action(heads(network, random_history())[0], np.int32([1, 2])).numpy()
    assert np.all((action < 0) | (action >= A))


@pytest.mark.parametrize("layers, off", [({}, 0.05), ({"lstm": 32, "input_scale": "unit"}, 0.1)])
def test_bfloat16_copy_computes_what_float32_does_to_its_precision_and_leaves_the_shared_network_in_float32(
    layers, off
):
    shared = net.SharedNetwork(4, 0.99, seed=3, **layers)
    exact, coarse = net.ActorCritic(4, **layers), net.ActorCritic(4, compute_dtype="bfloat16", **layers)
    gradients = []
    history = tf.constant(np.random.default_rng(1).integers(0, 2**32, [8, 84, 84], np.uint32))
    for copy in (exact, coarse):
        copy.copy_from(shared)
        with tf.GradientTape() as tape:
            logits, values = heads(copy, history)
            loss = tf.reduce_sum(logits[:, 0]) + tf.reduce_sum(values)
        assert logits.dtype == values.dtype == tf.float32
        clipped, _ = net.clip_gradients(tape.gradient(loss, copy.trainable_variables), None)
        assert all(gradient.dtype == tf.float32 for gradient in clipped)
        gradients.append(clipped)
    assert {variable.dtype for variable in coarse.trainable_variables} == {tf.bfloat16}
    for one, other in zip(*gradients, strict=True):
        assert np.linalg.norm(one - other) < off * np.linalg.norm(one)
    shared.apply_gradients(gradients[1], np.float32(1e-3))
    assert {variable.dtype for variable in shared.variables} == {tf.float32}
