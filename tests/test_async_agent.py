"""A group of games on fake environments with known rewards and ends; two tests play the real Breakout."""

import collections
import gc
import itertools
import threading
import time
import weakref

import gymnasium
import numpy as np
import pytest
from conftest import ScriptedEnv, heads

import async_agent
import environment
import network
from async_agent import GroupAgent, GroupFailure
from environment import find_game, history_to_frames, make_training_envs
from network import ActorCritic, SharedNetwork
from progress import Progress
from startup import tf

NUM_ACTIONS = 4
NOOP = np.zeros(2, np.int32)


def make_agent(env, config, *, index=0, shared=None, progress=None, on_update=lambda losses: None, size=(84, 84)):
    """Return an agent whose games have begun, in which they show frames of `size`."""
    layers = {name: getattr(config, name) for name in ("filters", "lstm", "last_action", "input_scale")}
    shared = shared or SharedNetwork(NUM_ACTIONS, config.decay, config.random_seed, **layers)
    progress = progress or Progress(config.num_threads, env.num_envs)
    agent = GroupAgent(index, lambda: env, shared, progress, config, on_update, size)
    agent.envs = agent.make_envs()
    agent.reset()
    return agent


def record_updates(agent):
    """Let the agent's updates change nothing; return the list that they go into, as (gradients, learning rate)."""
    updates = []
    agent.update = lambda gradients, rate, _: updates.append(([g.numpy() for g in gradients], rate))
    return updates


def all_weights(shared):
    return [v.numpy() for v in (*shared.trainable_variables, *shared.mean_squares)]


def gradients_of_an_update(config, rewards):
    agent = make_agent(ScriptedEnv(rewards), config)
    updates = record_updates(agent)
    agent.iterate()
    return updates[0][0]


# Rewards and scores.


def test_scores_are_the_raw_sums_of_whole_games(make_config):
    rewards = [[5, 0], [-2, 10], [0.5, 20], [7, 30], [1, 40]]
    ends = [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0]]
    agent = make_agent(ScriptedEnv(rewards, ends), make_config())
    assert agent.progress.recent_scores().size == 0
    for _ in range(5):
        agent.step(NOOP)
    np.testing.assert_array_equal(agent.progress.scores, [[3.5, 60]])
    assert agent.progress.episodes == 2
    for _ in range(3):
        agent.step(NOOP)
    np.testing.assert_array_equal(agent.progress.scores, [[7 + 1 + 5 - 2 + 0.5, 60]])
    assert agent.progress.episodes == 3


def test_game_that_is_cut_off_counts_as_ended(make_config):
    agent = make_agent(ScriptedEnv([[3, 4]], cuts=[[1, 0]]), make_config())
    _, _, done, _ = agent.step(NOOP)
    np.testing.assert_array_equal(done, [True, False])
    np.testing.assert_array_equal(agent.progress.recent_scores(), [3])


def test_scores_of_a_group_go_into_its_own_row_unclipped(make_config):
    progress = Progress(2, 2)
    agent = make_agent(ScriptedEnv([[30, -4]], [[1, 1]]), make_config(num_threads=2), index=1, progress=progress)
    agent.step(NOOP)
    np.testing.assert_array_equal(progress.scores, [[np.nan, np.nan], [30, -4]])


@pytest.mark.parametrize("clip, learned", [(1.0, [1, -1]), (2.5, [2.5, -0.25]), (None, [30, -0.25])])
def test_rewards_to_learn_from_are_clipped_as_asked(make_config, clip, learned):
    raw = [30, -4] if clip == 1.0 else [30, -0.25]
    found = gradients_of_an_update(make_config(reward_clip=clip), [raw] * 5)
    expected = gradients_of_an_update(make_config(reward_clip=None), [learned] * 5)
    other = gradients_of_an_update(make_config(reward_clip=None), [[1, -0.5]] * 5)
    for one, same, another in zip(found, expected, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert np.any(one != another)


@pytest.mark.parametrize("ends_return", [True, False])
def test_lost_life_ends_the_return_where_asked_but_never_the_game(make_config, ends_return):
    lives = [[3, 3], [2, 3], [2, 2], [3, 1], [3, 1]]  # the first game ends with its step 4 and has new lives
    ends = [[0, 0], [0, 0], [0, 0], [1, 0], [0, 0]]
    env = ScriptedEnv(np.ones([5, 2]), ends, lives=lives)
    agent = make_agent(env, make_config(life_loss_ends_return=ends_return))
    found = []
    for _ in range(5):
        frame, _, done, return_ends = agent.step(NOOP)
        agent.history = environment.push_frame(agent.history, frame, done)
        found.append(return_ends)
    lost = [[0, 0], [1, 0], [0, 1], [1, 1], [0, 0]]
    np.testing.assert_array_equal(found, np.array(lost if ends_return else ends, bool))
    np.testing.assert_array_equal(agent.progress.recent_scores(), [4])
    frames = history_to_frames(agent.history).numpy()
    np.testing.assert_array_equal(frames[1], np.stack(env.frames[2:6, 1], axis=-1))  # whole over the lost lives


def test_lives_of_the_real_breakout_are_counted(make_config):
    agent = make_agent(make_training_envs(find_game("Breakout-v0"), 2, 1), make_config(life_loss_ends_return=True))
    ended = np.zeros(2, int)
    for step in range(2000):
        *_, ends = agent.step(np.full(2, 1 if step % 2 else 3, np.int32))
        ended += ends
        if agent.progress.episodes:
            break
    assert agent.progress.episodes >= 1
    assert ended.max() == 5  # one for each life of a game that ended


# The rollout.


def test_history_is_emptied_where_a_game_ended(make_config):
    env = ScriptedEnv(np.zeros([3, 2]), [[0, 0], [1, 0], [0, 0]])
    agent = make_agent(env, make_config(unroll_step=3))
    agent.iterate()
    found = history_to_frames(agent.history).numpy()  # [B, 84, 84, 4]
    black = np.zeros([84, 84])
    np.testing.assert_array_equal(found[0], np.stack([black, black, env.frames[2, 0], env.frames[3, 0]], axis=-1))
    np.testing.assert_array_equal(found[1], np.stack(env.frames[:, 1], axis=-1))


def test_history_holds_screens_made_small(make_config):
    env = ScriptedEnv(np.zeros([2, 2]))
    env.frames = np.random.default_rng(1).integers(1, 256, [3, 2, 210, 160], np.uint8)
    agent = make_agent(env, make_config(unroll_step=2), size=(210, 160))
    agent.iterate()
    small = np.stack([environment.preprocess(screens) for screens in env.frames], axis=-1)  # [B, 84, 84, 3]
    np.testing.assert_array_equal(history_to_frames(agent.history)[..., 1:], small)


@pytest.mark.parametrize("gae_lambda, value_weight", [(1.0, 1.0), (0.8, 0.5)])
def test_gradient_equals_that_of_a_second_pass_over_the_same_states(make_config, gae_lambda, value_weight):
    """The whole rollout again by loops: histories, actions, returns cut at ends, one batch through a fresh network."""
    weights = {"gae_lambda": gae_lambda, "value_weight": value_weight}
    config = make_config(grad_clip=None, discount_factor=0.9, entropy_beta=0.05, **weights)
    rewards = np.array([[1, 0], [0, -3], [0.5, 0], [0, 1], [1, 0.25]])
    ends = np.array([[0, 0], [0, 1], [0, 0], [0, 0], [1, 0]], bool)
    env = ScriptedEnv(rewards, ends)
    agent = make_agent(env, config)
    updates = record_updates(agent)
    agent.iterate()

    states, black = [], np.zeros([84, 84], np.uint8)
    queues = [collections.deque([black] * 4, maxlen=4) for _ in range(2)]
    for step in range(6):
        for game, queue in enumerate(queues):
            if step and ends[step - 1, game]:
                queue.extend([black] * 4)
            queue.append(env.frames[step, game])
        states.append([np.stack(queue, axis=-1).view(np.uint32)[..., 0] for queue in queues])
    fresh = ActorCritic(NUM_ACTIONS, config.random_seed)
    values = [heads(fresh, tf.constant(np.stack(state)))[1].numpy() for state in states]
    following = values[5]
    returns = np.zeros([5, 2], np.float32)
    for step in reversed(range(5)):
        following = gae_lambda * following + (1 - gae_lambda) * values[step + 1]
        following = np.clip(rewards[step], -1, 1) + 0.9 * np.where(ends[step], 0, following)
        returns[step] = following

    with tf.GradientTape() as tape:
        logits, values = heads(fresh, tf.constant(np.concatenate(states[:5])))  # [T * B, ...]
        log_probs = tf.math.log_softmax(logits)
        advantages = returns.ravel() - values
        chosen = tf.gather(log_probs, np.concatenate(env.actions), axis=1, batch_dims=1)
        policy_loss = -tf.reduce_mean(chosen * advantages.numpy())
        entropy = -tf.reduce_mean(tf.reduce_sum(tf.exp(log_probs) * log_probs, axis=1))
        loss = policy_loss + value_weight * tf.reduce_mean(advantages**2) - 0.05 * entropy
    expected = tape.gradient(loss, fresh.trainable_variables)
    ((found, _),) = updates
    for one, other in zip(found, expected, strict=True):
        scale = float(tf.reduce_max(tf.abs(other)))
        assert scale > 0
        np.testing.assert_allclose(one, other, atol=1e-4 * scale)


def test_recurrent_gradient_equals_that_of_each_game_played_alone_and_goes_back_to_the_games_begin(make_config):
    """The second rollout, whose state comes from the first; one of the games ends in each."""
    config = make_config(lstm=6, input_scale="unit", filters=2, grad_clip=None, entropy_beta=0.0)
    rewards, ends = np.random.default_rng(1).normal(size=[10, 2]) / 2, np.zeros([10, 2], bool)
    ends[2, 0] = ends[6, 1] = True
    env = ScriptedEnv(rewards, ends)
    agent = make_agent(env, config)
    updates = record_updates(agent)
    agent.iterate()
    between = agent.state.numpy()
    agent.iterate()
    fresh = ActorCritic(NUM_ACTIONS, config.random_seed, filters=2, lstm=6, input_scale="unit")

    def replay(through_time):
        losses = []
        for game in range(2):
            history = environment.push_frame(environment.empty_history(1), env.frames[:1, game], np.ones(1, bool))
            seen, state = [], fresh.initial_state(1)
            for step in range(11):
                state = fresh.initial_state(1) if step > 0 and ends[step - 1, game] else state
                if step == 5:
                    np.testing.assert_allclose(state[0], between[game], atol=1e-6)
                state = state if through_time and step > 5 else tf.stop_gradient(state)
                logits, value, state = fresh(history, state)
                seen.append((logits[0], value[0]))
                if step < 10:
                    end = ends[step : step + 1, game]
                    history = environment.push_frame(history, env.frames[step + 1 : step + 2, game], end)
            following = tf.stop_gradient(seen[10][1])
            for step in reversed(range(5, 10)):
                logits, value = seen[step]
                following = np.clip(rewards[step, game], -1, 1) + 0.99 * (0 if ends[step, game] else following)
                advantage = following - value
                log_prob = tf.math.log_softmax(logits)[env.actions[step][game]]
                losses.append(advantage**2 - log_prob * tf.stop_gradient(advantage))
        return tf.add_n(losses) / 10

    for through_time in (True, False):
        with tf.GradientTape() as tape:
            loss = replay(through_time)
        expected = tape.gradient(loss, fresh.trainable_variables)
        off = [
            np.abs(one - other).max() / np.abs(other).max() for one, other in zip(updates[1][0], expected, strict=True)
        ]
        assert max(off) < 1e-3 if through_time else max(off) > 0.01


def test_memory_is_emptied_when_all_games_begin_anew(make_config):
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config(lstm=6, input_scale="unit", filters=2))
    agent.iterate()
    assert np.all(np.any(agent.state.numpy() != 0, axis=1))
    agent.reset()
    np.testing.assert_array_equal(agent.state, np.zeros([2, 12]))


@pytest.mark.parametrize("lstm", [0, 6])
def test_last_action_goes_on_from_update_to_update_and_is_none_where_a_game_begins(make_config, lstm):
    ends = np.zeros([5, 2], bool)
    ends[4, 0] = ends[2, 1] = True
    env = ScriptedEnv(np.ones([5, 2]), ends)
    agent = make_agent(env, make_config(lstm=lstm, last_action=True, input_scale="unit", filters=2))
    agent.iterate()
    np.testing.assert_array_equal(agent.state[:, 2 * lstm :], [np.zeros(4), np.eye(4)[env.actions[4][1]]])
    agent.reset()
    np.testing.assert_array_equal(agent.state, np.zeros([2, 2 * lstm + 4]))


def test_copy_takes_the_background_off_as_the_shared_network_does(make_config):
    shared = SharedNetwork(NUM_ACTIONS, 0.99, seed=1, background=87)
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config(), shared=shared)
    for one, other in zip(heads(shared, agent.history), heads(agent.network, agent.history), strict=True):
        np.testing.assert_array_equal(one, other)
    before = all_weights(shared)
    agent.iterate()
    assert any(np.any(v != old) for v, old in zip(all_weights(shared), before, strict=True))


def test_gradients_are_clipped_before_the_update(make_config):
    gradients = gradients_of_an_update(make_config(grad_clip=1e-9), np.ones([5, 2]))
    average_norms = [np.linalg.norm(gradient) / gradient.size for gradient in gradients]
    np.testing.assert_allclose(average_norms, 1e-9, rtol=1e-3)
    gradients = gradients_of_an_update(make_config(grad_clip=None, global_clip=1e-6), np.ones([5, 2]))
    assert np.sqrt(sum(np.sum(gradient**2) for gradient in gradients)) == pytest.approx(1e-6, rel=1e-3)


def test_actions_of_every_step_of_every_group_are_drawn_with_a_seed_of_their_own(make_config, monkeypatch):
    seeds = []

    def draw_action(logits, seed):
        def note(seed):
            seeds.append(tuple(seed))
            return NOOP

        return tf.ensure_shape(tf.numpy_function(note, [seed], tf.int32), [2])

    monkeypatch.setattr(async_agent, "draw_action", draw_action)
    for index in range(2):
        agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config(num_threads=2), index=index)
        for _ in range(2):
            agent.iterate()
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 5


def test_copies_in_bfloat16_train_the_shared_network_in_float32(make_config):
    shared = SharedNetwork(NUM_ACTIONS, 0.99, copies_dtype="bfloat16")
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config(), shared=shared)
    before = all_weights(shared)
    agent.iterate()
    for mine, theirs, old in zip(agent.network.trainable_variables, shared.trainable_variables, before, strict=False):
        assert np.any(theirs != old)
        assert theirs.dtype == tf.float32
        assert mine.dtype == tf.bfloat16
        np.testing.assert_array_equal(mine, tf.cast(theirs, tf.bfloat16))


@pytest.mark.parametrize("length, falls", [(15, [1, 0.4, 0.1, 0.1, 0.1]), (None, [1, 1, 1, 1, 1])])
def test_update_takes_the_learning_rate_and_the_weight_of_the_entropy_of_its_steps(length, falls, make_config):
    lengths = {"annealing_steps": 30, "entropy_annealing_steps": length}
    config = make_config(learning_rate=1e-3, entropy_beta=0.01, **lengths)
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), config)  # an update has 10 agent steps
    updates = record_updates(agent)
    weights, rollout = [], agent.rollout
    agent.rollout = lambda *inputs: weights.append(inputs[3]) or rollout(*inputs)
    for _ in range(5):
        agent.iterate()
    np.testing.assert_allclose([rate for _, rate in updates], [1e-3, 7e-4, 4e-4, 1e-4, 1e-4], rtol=1e-6)
    np.testing.assert_allclose(weights, 0.01 * np.array(falls), rtol=1e-6)


def test_copy_equals_the_shared_network_after_an_update(make_config):
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config())
    before = all_weights(agent.shared)
    agent.iterate()
    assert any(np.any(v != old) for v, old in zip(all_weights(agent.shared), before, strict=True))
    for mine, theirs in zip(agent.network.trainable_variables, agent.shared.trainable_variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_averages_follow_every_update(make_config):
    config = make_config(average_window=0.5, filters=2)
    shared = SharedNetwork(NUM_ACTIONS, config.decay, filters=2, average=True)
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), config, shared=shared)
    newest = []
    for _ in range(6):
        agent.iterate()
        newest.append([v.numpy() for v in shared.trainable_variables])
    shares = np.array([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3]) / 5  # rates of 1, 1, 2/3, 1/2, 2/5, 1/3 multiplied out
    for average, weights in zip(shared.averages, zip(*newest, strict=True), strict=True):
        np.testing.assert_allclose(average, np.tensordot(shares, np.stack(weights), 1), rtol=1e-5, atol=1e-7)


def test_progress_counts_updates_and_agent_steps_and_reports_each_with_the_lock_held(make_config):
    reported = []
    agent = make_agent(
        ScriptedEnv(np.ones([5, 2])),
        make_config(unroll_step=3),
        on_update=lambda losses: reported.append((agent.progress.iteration, agent.progress.lock.locked(), losses)),
    )
    for _ in range(4):
        agent.iterate()
    assert agent.progress.iteration == 4
    assert agent.progress.agent_steps == 4 * 3 * 2
    assert len(agent.envs.actions) == 4 * 3
    assert [(number, locked) for number, locked, _ in reported] == [(n, True) for n in (1, 2, 3, 4)]
    assert all(np.all(np.isfinite(losses)) for _, _, losses in reported)


def test_nothing_is_traced_after_the_start(make_config, monkeypatch):
    """Whatever is traced runs the Python of these functions again."""
    agent = make_agent(ScriptedEnv(np.ones([7, 2]), np.eye(7, 2)), make_config())
    for name in ("push_frame", "draw_action", "n_step_returns", "a3c_loss", "clip_gradients"):
        monkeypatch.setattr(async_agent, name, lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr(network.ActorCritic, "__call__", lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr(SharedNetwork, "apply_gradients", lambda *_: pytest.fail("traced again"))
    for _ in range(4):
        agent.iterate()
    assert agent.progress.iteration == 4


def test_agent_is_freed_with_its_games_though_tensorflow_keeps_what_its_graph_calls(make_config):
    agent = make_agent(ScriptedEnv(np.ones([5, 2])), make_config())
    agent.iterate()
    agent, games = weakref.ref(agent), weakref.ref(agent.envs)
    gc.collect()
    assert agent() is None
    assert games() is None


# Threads.


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def run_threads(agents):
    """Run each agent in a thread until all have stopped; raise what a thread raised."""
    coordinator = tf.train.Coordinator()
    threads = [threading.Thread(target=a.run, args=(coordinator, "/CPU:0"), daemon=True) for a in agents]
    for thread in threads:
        thread.start()
    coordinator.join(threads, stop_grace_period_secs=30)


@pytest.mark.parametrize("limit", [{"max_iteration": 7}, {"max_agent_steps": 61}])
def test_groups_together_make_exactly_as_many_updates_as_asked(make_config, limit):
    config = make_config(num_threads=3, **limit)
    shared, progress = SharedNetwork(NUM_ACTIONS, config.decay), Progress(3, 2)
    agents = [
        make_agent(ScriptedEnv(np.ones([5, 2])), config, index=index, shared=shared, progress=progress)
        for index in range(3)
    ]
    run_threads(agents)
    assert progress.iteration == 7
    assert progress.agent_steps == 7 * 5 * 2


def test_groups_learn_once_all_have_begun(make_config):
    class Slow(ScriptedEnv):
        built = threading.Event()

        def reset(self, **options):
            assert self.built.wait(30)
            return super().reset(**options)

    config = make_config(num_threads=2, max_iteration=None)
    shared, progress, coordinator = SharedNetwork(NUM_ACTIONS, config.decay), Progress(2, 2), tf.train.Coordinator()
    envs = [ScriptedEnv(np.ones([5, 2])), Slow(np.ones([5, 2]))]
    agents = [GroupAgent(i, lambda i=i: envs[i], shared, progress, config, lambda _: None) for i in range(2)]
    threads = [threading.Thread(target=a.run, args=(coordinator, "/CPU:0"), daemon=True) for a in agents]
    for thread in threads:
        thread.start()
    wait_until(lambda: progress.begun == 1)
    began = time.monotonic()
    time.sleep(0.5)
    assert progress.iteration == 0
    assert agents[0].alive_at > began > agents[1].alive_at  # it is not the first that keeps the run waiting
    Slow.built.set()
    wait_until(lambda: min(agent.steps for agent in agents) > 10)
    coordinator.request_stop()
    coordinator.join(threads, stop_grace_period_secs=30)


def test_seeds_of_all_games_differ_from_one_another_and_from_those_of_other_runs(make_config):
    seeds = []
    for random_seed, iteration, index in itertools.product((1, 2), (0, 1), (0, 1)):  # a resumed run plays on
        envs, progress = ScriptedEnv(np.ones([5, 2])), Progress(2, 2)
        progress.iteration = iteration
        agent = make_agent(envs, make_config(random_seed=random_seed), index=index, progress=progress)
        seeds += [*envs.seeds[0], agent.seeds[0]]
    assert len(set(map(int, seeds))) == len(seeds) == 8 * 3
    assert 0 <= min(seeds) <= max(seeds) < 2**31


@pytest.mark.row(n=34)
def test_game_that_ends_waits_for_nothing_that_an_update_holds(make_config):
    """It would keep a thread of TensorFlow waiting: where that has no more of them, the update could never end."""
    agent = make_agent(ScriptedEnv(np.ones([5, 2]), ends=np.ones([5, 2])), make_config())
    thread = threading.Thread(target=agent.step, args=[NOOP], daemon=True)
    with agent.progress.lock:
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert agent.progress.episodes == 2


@pytest.mark.row(n=12)
def test_exception_in_an_environment_stops_all_groups_and_is_the_cause_of_a_group_failure(make_config):
    class Broken(ScriptedEnv):
        def step(self, actions):
            if len(self.actions) == 12:
                raise KeyError("cable pulled")
            return super().step(actions)

    config = make_config(num_threads=2, max_iteration=1_000_000)
    shared, progress = SharedNetwork(NUM_ACTIONS, config.decay), Progress(2, 2)
    agents = [
        make_agent(kind(np.ones([5, 2])), config, index=index, shared=shared, progress=progress)
        for index, kind in enumerate((ScriptedEnv, Broken))
    ]
    with pytest.raises(GroupFailure, match="group 1, KeyError: 'cable pulled'") as failure:
        run_threads(agents)
    assert isinstance(failure.value.__cause__, KeyError)


@pytest.mark.row(n=13)
@pytest.mark.parametrize(
    "rewards, bias, said",
    [
        ([[1, 1], [np.nan, 1]], [0, 0, 0, 0], "iteration 0: not finite"),  # the loss
        (np.ones([5, 2]), [np.nan, 0, 0, 0], "iteration 0: "),  # one logit
        (np.ones([5, 2]), [np.nan] * 4, "iteration 0: the policy's logits are not finite"),
    ],
)
def test_loss_or_policy_that_is_not_finite_raises_and_changes_nothing(make_config, rewards, bias, said):
    agent = make_agent(ScriptedEnv(rewards), make_config())
    before = all_weights(agent.shared)
    agent.network.biases["policy"].assign(bias)
    with pytest.raises(FloatingPointError, match=said):
        agent.iterate()
    for one, other in zip(all_weights(agent.shared), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert agent.progress.iteration == 0
    if np.all(np.isnan(bias)):
        assert agent.envs.actions == []  # they would hang the native games


# Whole runs.


def test_one_thread_repeats_bit_for_bit_with_the_same_seed(make_config):
    game = find_game("Breakout-v0")

    def train(seed):
        config = make_config(random_seed=seed)
        losses = []
        envs = make_training_envs(game, 2, 1, game.screen)
        agent = make_agent(envs, config, on_update=losses.append, size=game.screen)
        for _ in range(6):
            agent.iterate()
        return losses, all_weights(agent.shared)

    one, same, other = train(1), train(1), train(2)
    assert one[0] == same[0]
    for mine, theirs in zip(one[1], same[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one[0] != other[0]


class CueEnv(gymnasium.vector.VectorEnv):
    """Each frame shows a white band in one of four places; the action of that number pays 1. A game is ten steps."""

    def __init__(self, num_envs):
        self.num_envs, self.rng = num_envs, np.random.default_rng(0)
        self.steps, self.paid = 0, []  # the mean reward of each step

    def show(self):
        self.cue = self.rng.integers(0, NUM_ACTIONS, self.num_envs)
        rows = np.arange(84) // 21  # band of each row
        shown = (rows == self.cue[:, None]) * np.uint8(255)
        return np.broadcast_to(shown[:, None, :, None], [self.num_envs, 1, 84, 84])

    def reset(self, *, seed=None, options=None):
        return self.show(), {}

    def step(self, actions):
        reward = (actions == self.cue).astype(np.float64)
        self.paid.append(reward.mean())
        self.steps += 1
        ended = np.full(self.num_envs, self.steps % 10 == 0)
        return self.show(), reward, ended, np.zeros(self.num_envs, bool), {}


def test_agent_learns_to_do_what_the_frame_shows(make_config):
    """Chance pays 0.25 a step. With the original's rates it is near 0.98 after 140 updates, whatever the seed."""
    config = make_config(agents_per_thread=8, filters=16, discount_factor=0.5, max_iteration=1_000_000)
    env = CueEnv(8)
    agent = make_agent(env, config)
    for _ in range(140):
        agent.iterate()
    assert np.mean(env.paid[:25]) < 0.5
    assert np.mean(env.paid[-100:]) > 0.9
    assert np.mean(agent.progress.recent_scores()) > 9


class NextActionEnv(gymnasium.vector.VectorEnv):
    """Pays 1 for the action that follows the last one, 0 that follows 3; all frames are alike, and no game ends."""

    def __init__(self, num_envs):
        self.num_envs, self.last, self.paid = num_envs, np.zeros(num_envs, int), []

    def show(self):
        return np.full([self.num_envs, 1, 84, 84], 128, np.uint8)

    def reset(self, *, seed=None, options=None):
        return self.show(), {}

    def step(self, actions):
        reward, never = (actions == (self.last + 1) % 4).astype(float), np.zeros(self.num_envs, bool)
        self.last = actions
        self.paid.append(reward.mean())
        return self.show(), reward, never, never, {}


@pytest.mark.parametrize("last_action", [True, False])
def test_agent_learns_what_its_last_action_tells_if_it_is_told(make_config, last_action):
    """Without it no policy pays more than 0.25 a step."""
    layers = {"filters": 2, "last_action": last_action, "input_scale": "unit"}
    fields = {"agents_per_thread": 16, "learning_rate": 4e-3, "grad_clip": None, "discount_factor": 0.5}
    env = NextActionEnv(16)
    shared = SharedNetwork(NUM_ACTIONS, 0.99, seed=1, epsilon=1e-5, optimizer="adam", **layers)
    agent = make_agent(env, make_config(max_iteration=1_000_000, **fields), shared=shared)
    for _ in range(150):
        agent.iterate()
    late = np.mean(env.paid[-50:])
    assert late > 0.8 if last_action else late < 0.35


class MemoryEnv(gymnasium.vector.VectorEnv):
    """A game begins with a white or a black frame; after four grey ones, action 0 or 1 says which, for 1 or -1."""

    def __init__(self, num_envs):
        self.num_envs, self.rng = num_envs, np.random.default_rng(0)
        self.steps, self.paid = 0, []  # the mean reward of each game's last step

    def show(self):
        grey = np.full(self.num_envs, 128, np.uint8)
        if self.steps % 5 == 0:
            self.cue = self.rng.integers(0, 2, self.num_envs)
            grey = np.uint8(255) * self.cue.astype(np.uint8)
        return np.broadcast_to(grey[:, None, None, None], [self.num_envs, 1, 84, 84])

    def reset(self, *, seed=None, options=None):
        return self.show(), {}

    def step(self, actions):
        self.steps += 1
        reward, ended = np.zeros(self.num_envs), np.full(self.num_envs, self.steps % 5 == 0)
        if ended[0]:
            reward = np.where(actions == self.cue, 1.0, -1.0)
            self.paid.append(reward.mean())
        return self.show(), reward, ended, np.zeros(self.num_envs, bool), {}


@pytest.mark.parametrize("lstm, updates", [(32, 400), (0, 200)])
def test_agent_learns_what_the_last_four_frames_do_not_show_if_it_has_a_memory(make_config, lstm, updates):
    """With an LSTM it is above 0.95 after 350 updates, with seeds 1 to 3; without, no policy pays more than 0."""
    layers = {"filters": 2, "lstm": lstm, "input_scale": "unit"}
    fields = {"agents_per_thread": 16, "learning_rate": 4e-3, "entropy_beta": 0.02, "grad_clip": None}
    config = make_config(max_iteration=1_000_000, **fields)
    env = MemoryEnv(16)
    shared = SharedNetwork(NUM_ACTIONS, 0.99, seed=1, epsilon=1e-5, optimizer="adam", **layers)
    agent = make_agent(env, config, shared=shared)
    for _ in range(updates):
        agent.iterate()
    late = np.mean(env.paid[-50:])
    assert late > 0.8 if lstm else late < 0.3
