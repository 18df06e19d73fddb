"""What a GPU computes is what the CPU computes, and training runs on it. Skipped where TensorFlow sees no GPU."""

import contextlib
import subprocess

import numpy as np
import pytest
from conftest import ENDLESS, Running, ScriptedEnv, has_rows, heads, last_iteration, run

from async_agent import GroupAgent
from environment import empty_history, history_to_frames, push_frame
from network import SharedNetwork, a3c_loss, clip_gradients, draw_action, n_step_returns
from progress import Progress
from startup import UserError, choose_device, tf

with contextlib.suppress(UserError):  # TensorFlow is at work already: run this file by itself
    choose_device("auto", num_groups=2)  # conftest.py has hidden the GPU
pytestmark = pytest.mark.skipif(not tf.config.get_visible_devices("GPU"), reason="TensorFlow sees no GPU")

STEPS, GAMES, ACTIONS = 5, 8, 4


def one_update(device, **layers):
    """Return all that an update computes on `device` from the same frames, actions and rewards."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (STEPS + 1, GAMES, 84, 84), np.uint8)
    dones, rewards = rng.random((STEPS, GAMES)) < 0.2, rng.normal(size=(STEPS, GAMES)).astype(np.float32)
    actions = [tf.constant(row, tf.int32) for row in rng.integers(0, ACTIONS, (STEPS, GAMES))]
    with tf.device(device):
        network = SharedNetwork(ACTIONS, decay=0.99, seed=1, filters=16, background=87, **layers)
        state = network.initial_state(GAMES)
        history = push_frame(empty_history(GAMES), frames[0], np.ones(GAMES, bool))
        logits, values = [], []
        with tf.GradientTape() as tape:
            for step in range(STEPS):
                logit, value, state = network(history, state)
                logits.append(logit)
                values.append(value)
                history = push_frame(history, frames[step + 1], dones[step])
                state = tf.where(dones[step][:, None], 0.0, state)
            bootstrap = tf.stop_gradient(network(history, state)[1])
            returns = tf.stop_gradient(n_step_returns(list(rewards), list(dones), values, bootstrap, 0.99))
            loss, _ = a3c_loss(logits, values, actions, returns, 0.01)
        gradients, norm = clip_gradients(tape.gradient(loss, network.trainable_variables), 0.1, 2.0)
        network.apply_gradients(gradients, 1e-3)
        computed = {"logits": tf.stack(logits), "values": tf.stack(values), "returns": returns}
        computed |= {"loss": loss, "norm": norm}
    computed |= {f"gradient {v.name}": g for v, g in zip(network.trainable_variables, gradients, strict=True)}
    computed |= {f"updated {v.name}": v for v in network.trainable_variables}
    assert all(tensor.device.endswith(device) for tensor in computed.values())
    return {"frames": history_to_frames(history).numpy(), **{name: t.numpy() for name, t in computed.items()}}


RECURRENT = {"lstm": 64, "input_scale": "unit", "optimizer": "adam", "epsilon": 1e-3}


@pytest.mark.parametrize("rounds, layers", [(False, {}), (True, {}), (False, RECURRENT)])
def test_update_is_as_on_the_cpu(rounds, layers):
    """By default, and in training, a GPU rounds to 10 bits what it multiplies (TF32)."""
    tf.config.experimental.enable_tensor_float_32_execution(rounds)
    try:
        cpu, gpu = one_update("CPU:0", **layers), one_update("GPU:0", **layers)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    np.testing.assert_array_equal(gpu.pop("frames"), cpu.pop("frames"))
    for name, expected in cpu.items():
        if rounds:
            assert np.linalg.norm(gpu[name] - expected) < 0.01 * np.linalg.norm(expected), name
        else:
            np.testing.assert_allclose(gpu[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_actions_are_drawn_from_the_policy():
    with tf.device("GPU:0"):
        network = SharedNetwork(ACTIONS, decay=0.99, seed=1)
        network.biases["policy"].assign(np.log([0.1, 0.2, 0.3, 0.4]))
        logits, _ = heads(network, empty_history(1000))  # black frames: all logits are the biases
        draws = np.concatenate([draw_action(logits, np.array([7, step], np.int32)).numpy() for step in range(20)])
    shares = np.bincount(draws, minlength=ACTIONS) / draws.size
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=5 * np.sqrt(0.25 / draws.size))


def test_history_and_weights_stay_on_the_gpu(make_config):
    config = make_config(agents_per_thread=GAMES)
    env = ScriptedEnv(np.ones([3, GAMES]), ends=np.eye(3, GAMES))
    with tf.device("GPU:0"):
        shared = SharedNetwork(ACTIONS, config.decay)
        agent = GroupAgent(0, lambda: env, shared, Progress(1, GAMES), config, lambda losses: None)
        agent.envs = agent.make_envs()
        agent.reset()
        agent.iterate()
    everything = [agent.history, *agent.network.variables, *shared.variables]
    assert {tensor.device.rpartition("device:")[2] for tensor in everything} == {"GPU:0"}


def test_run_trains_on_the_gpu_goes_on_on_the_cpu_and_back(tmp_path):
    for updates, device in (3, "gpu"), (6, "cpu"), (9, "gpu:0"):
        process = run(tmp_path, f"--max_iteration={updates}", f"--device={device}")
        assert process.returncode == 0, process.stderr
        assert f"Training on {device[:3].upper()}:0" in process.stdout
        assert last_iteration(tmp_path) == updates


@pytest.mark.row(n=35)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_auto_takes_the_gpu_and_the_cpu_leaves_it_alone_and_a_signal_saves(tmp_path, device):
    with Running(tmp_path, ENDLESS, f"--device={device}") as running:
        running.wait_for(lambda: has_rows(tmp_path, 4))
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
        users = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        status, output = running.send(2)
    assert status == 130
    assert f"Training on {'GPU' if device == 'auto' else 'CPU'}:0" in output
    assert device == "auto" or str(running.process.pid) not in users, users
    assert last_iteration(tmp_path) >= 6
