"""One thread and its group of games: roll out, learn, repeat.

Source: algorithm S3 of Mnih et al. 2016; `A3CGroupAgent` of hiwonjoon/tf-a3c-gpu, where one network plays many games
in one thread. Written against the plain `gymnasium.vector.VectorEnv` interface with same-step autoreset.
"""

import math
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import gymnasium
import numpy as np

from environment import FRAME_SIZE, empty_history, preprocess, push_frame
from network import Losses, SharedNetwork, a3c_loss, clip_gradients, draw_action, n_step_returns
from progress import Progress
from startup import UserError, tf

if TYPE_CHECKING:
    from a3c import Config


class GroupFailure(Exception):
    """Stands for an exception in a group's thread, its `__cause__`; the message names the group."""


class GroupAgent:
    """A group of games played by one copy of the network, in one thread. Made in the main thread, which traces graphs.

    Args:
      index: number of the group, from 0.
      make_envs: builds B games with same-step autoreset, once the thread runs; observations [B, 1, H, W] uint8;
        rewards are raw scores.
      shared: the network to train.
      progress: counts the updates; its lock is held during each.
      config: the hyperparameters.
      on_update: called with this update's losses while the lock is held.
      size: H, W of the observations.
    """

    def __init__(
        self,
        index: int,
        make_envs: Callable[[], gymnasium.vector.VectorEnv],
        shared: SharedNetwork,
        progress: Progress,
        config: "Config",
        on_update: Callable[[Losses], None],
        size: tuple[int, int] = (FRAME_SIZE, FRAME_SIZE),
    ):
        self.index, self.make_envs, self.shared, self.progress, self.config = index, make_envs, shared, progress, config
        self.on_update, self.size = on_update, size
        self.network = shared.make_copy()
        self.envs = None
        # What the next actions are for. An LSTM's state has not yet seen the newest frame; the last action led to it.
        self.history = empty_history(config.agents_per_thread)
        self.state = self.network.initial_state(config.agents_per_thread)
        self.episode_score = np.zeros(config.agents_per_thread)  # [B], raw, of the games in play
        self.lives = np.zeros(config.agents_per_thread)  # [B], left; updated where a lost life ends the return
        # The first is for the actions, the others for each game. A resumed run, at another iteration, plays others.
        sequence = np.random.SeedSequence([config.random_seed, progress.iteration, index])
        self.seeds = sequence.generate_state(1 + config.agents_per_thread).astype(np.int64) >> 1  # 0..2**31 - 1
        self.steps = 0  # of each game in this run; with the seed it fixes which actions are drawn
        self.alive_at = math.inf  # time of the last step; infinity until the group's turn to build
        self.failure = None  # what the games raised
        # Made into graphs now, in the main thread, and never again: two threads that do so at once disturb each other.
        history, state = tf.TensorSpec.from_tensor(self.history), tf.TensorSpec.from_tensor(self.state)
        seed, scalar = tf.TensorSpec([2], tf.int32), tf.TensorSpec([])
        gradients = [tf.TensorSpec(variable.shape) for variable in shared.trainable_variables]
        self.rollout = tf.function(self._rollout, autograph=False).get_concrete_function(history, state, seed, scalar)
        self.update = tf.function(self._update, autograph=False).get_concrete_function(gradients, scalar, scalar)

    def run(self, coordinator: tf.train.Coordinator, device: str) -> None:
        """Play and learn until the coordinator says stop; an exception stops all threads and its `join` raises it."""
        with coordinator.stop_on_exception(), tf.device(device):
            try:
                self._begin(coordinator)
                while not coordinator.should_stop() and not self.config.is_finished(self.progress):
                    self.iterate()
            except UserError:
                raise
            except Exception as error:
                raise GroupFailure(f"group {self.index}, {type(error).__name__}: {error}") from error
            coordinator.request_stop()

    def _begin(self, coordinator: tf.train.Coordinator) -> None:
        """Build and start the games, then wait for the other groups: building takes the cores that learning needs."""
        with self.progress.build_lock:
            self.alive_at = time.monotonic()
            if not coordinator.should_stop():
                self.envs = self.make_envs()
                self.alive_at = time.monotonic()
        if coordinator.should_stop():
            return
        self.reset()
        with self.progress.lock:
            self.progress.begun += 1
        while self.progress.begun < self.config.num_threads and not coordinator.should_stop():
            coordinator.wait_for_stop(0.1)
            self.alive_at = time.monotonic()

    def reset(self) -> None:
        """Start all games, and take the shared weights."""
        screen, _ = self.envs.reset(seed=self.seeds[1:])
        self.history = push_frame(self.history, preprocess(screen[:, -1]), np.ones(self.envs.num_envs, bool))
        self.state = tf.zeros_like(self.state)
        with self.progress.lock:  # where a lost host made this group begin again, others have learnt meanwhile
            self.network.copy_from(self.shared)

    def iterate(self) -> None:
        """Play `unroll_step` (T) steps in each game and update the shared network once.

        Raises FloatingPointError if logits or losses are not finite; the shared network is as it was before.
        """
        config, progress = self.config, self.progress
        seed = np.array([self.seeds[0], self.steps], np.int32)
        entropy_beta = np.float32(config.entropy_beta_at(progress.agent_steps))
        try:
            self.history, self.state, gradients, losses = self.rollout(self.history, self.state, seed, entropy_beta)
        except tf.errors.OpError:
            if self.failure:
                raise self.failure from None  # the original, not TensorFlow's wrapper
            raise
        losses = Losses(*map(float, losses.numpy()))
        if not np.all(np.isfinite(losses)):
            raise FloatingPointError(f"iteration {progress.iteration}: not finite: {losses}")
        with progress.lock:
            if not config.is_finished(progress):
                learning_rate = np.float32(config.learning_rate_at(progress.agent_steps))
                self.update(gradients, learning_rate, np.float32(config.average_rate_at(progress.agent_steps)))
                progress.iteration += 1
                progress.agent_steps += config.steps_per_update
                self.on_update(losses)

    def _rollout(self, history, state, seed, entropy_beta):
        """Play T steps in each game; return the new history and state, the gradients and the losses of these steps.

        All of it is one graph: Python is called only to step the games. TensorFlow reads this code once, at the start,
        and what Python values are then, fields of the config too, they remain. What changes while training must be an
        argument, as `entropy_beta` is (see `iterate` and `__init__`); `if` cannot ask for a tensor: use `tf.where`.
        The first state comes from the rollout before, and no gradient goes back into that.
        """
        config, network = self.config, self.network
        logits, values, actions, rewards, ends = [], [], [], [], []  # T items of B games each

        # Act. The copy does not change during the rollout, so these very passes are differentiated below.
        with tf.GradientTape() as tape:
            for step in range(config.unroll_step):
                logit, value, state = network(history, state)
                action = draw_action(logit, tf.add(seed, [0, step]))
                state = network.remember(state, action)
                screen, reward, done, return_ends = self._step_in_graph(action)
                history = push_frame(history, preprocess(screen), done)
                state = tf.where(done[:, None], 0.0, state)  # where a game ended, the next frame is another's first
                if config.reward_clip is not None:
                    reward = tf.clip_by_value(reward, -config.reward_clip, config.reward_clip)
                logits.append(logit)
                values.append(value)
                actions.append(action)
                rewards.append(reward)
                ends.append(return_ends)

            # Returns and loss.
            with tape.stop_recording():
                _, bootstrap, _ = network(history, state)  # the next rollout begins with the same frame and state
                returns = n_step_returns(rewards, ends, values, bootstrap, config.discount_factor, config.gae_lambda)
            loss, terms = a3c_loss(logits, values, actions, returns, entropy_beta, config.value_weight)

        # Gradients, clipped.
        gradients = tape.gradient(loss, network.trainable_variables)
        gradients, gradient_norm = clip_gradients(gradients, config.grad_clip, config.global_clip)
        return history, state, gradients, tf.stack([*terms, gradient_norm])

    def _update(self, gradients, learning_rate, average_rate):
        """Update the shared network, then take its weights."""
        self.shared.apply_gradients(gradients, learning_rate)
        self.shared.update_averages(average_rate)
        self.network.copy_from(self.shared)

    def _step_in_graph(self, action):
        """Let the graph call `step`: screen [B, H, W] uint8, reward [B] float32, done and return_ends [B] bool."""
        agent = weakref.proxy(self)  # TensorFlow keeps `step` as long as the process lives

        def step(action):
            try:
                return agent.step(action)
            except BaseException as error:
                agent.failure = error  # TensorFlow wraps it in an error of its own
                raise

        with tf.device("/CPU:0"):
            outputs = tf.numpy_function(step, [action], [tf.uint8, tf.float32, tf.bool, tf.bool])
        num_envs = self.config.agents_per_thread
        shapes = [[num_envs, *self.size], [num_envs], [num_envs], [num_envs]]
        return [tf.ensure_shape(output, shape) for output, shape in zip(outputs, shapes, strict=True)]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take one step in each game and keep the scores.

        Returns the screens [B, H, W] uint8, the raw rewards [B] float32, whether the games are over [B] bool, and
        whether returns end here [B] bool: with a game, or with a life. Raises FloatingPointError if an action is out of
        range, because the logits it was drawn from are not finite.
        """
        if action.min() < 0 or action.max() >= self.shared.num_actions:  # would hang the native environments
            raise FloatingPointError(f"iteration {self.progress.iteration}: the policy's logits are not finite")
        screen, reward, terminated, truncated, info = self.envs.step(action)
        done = terminated | truncated
        self.steps += 1
        self.alive_at = time.monotonic()

        self.episode_score += reward
        if done.any():
            with self.progress.games_lock:
                self.progress.scores[self.index, done] = self.episode_score[done]
                self.progress.episodes += int(done.sum())
            self.episode_score[done] = 0.0
        return_ends = done
        if self.config.life_loss_ends_return:  # the game, its frames, its score and an LSTM's state go on
            return_ends = done | (info["lives"] < self.lives)
            self.lives = info["lives"].copy()

        return screen[:, -1], np.asarray(reward, np.float32), done, return_ends
