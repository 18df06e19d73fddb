"""What the threads have done so far, together: the counts and the recent scores, and the lock that guards them."""

import json
import threading
import time

import numpy as np

from startup import tf


class Progress(tf.train.experimental.PythonState):
    """What training has done so far, over all resumes. Part of every checkpoint.

    `lock` guards the shared network and this object together: whoever holds it sees whole updates. `games_lock` guards
    what is counted while games are stepped, inside a graph: to wait for `lock` there would keep a thread of TensorFlow
    from the update whose group has it, and where all threads wait like that, all groups hang.
    """

    def __init__(self, num_groups: int, num_envs: int):
        self.lock, self.games_lock = threading.Lock(), threading.Lock()
        self.iteration = 0  # updates of the shared network
        self.agent_steps = 0
        self.episodes = 0  # whole games played to their end
        self.seconds = 0.0  # of training, before this run
        self.started = time.monotonic()
        self.build_lock = threading.Lock()  # one group at a time: loading ROMs holds Python's global lock
        self.begun = 0  # groups whose games have begun, in this run; not saved
        self.scores = np.full([num_groups, num_envs], np.nan)  # raw score of the last whole game of each environment

    def total_seconds(self) -> float:
        """Return the seconds of training over all resumes, start-up included."""
        return self.seconds + time.monotonic() - self.started

    def recent_scores(self) -> np.ndarray:
        """Return the last score of each environment that has ended a game, [at most groups * B]."""
        return self.scores[~np.isnan(self.scores)]

    def serialize(self) -> str:
        """Return the state as JSON, for the checkpoint."""
        counts = {"iteration": self.iteration, "agent_steps": self.agent_steps, "episodes": self.episodes}
        return json.dumps({**counts, "seconds": self.total_seconds(), "scores": self.recent_scores().tolist()})

    def deserialize(self, string_value: str | bytes) -> None:
        """Take over a saved state; the number of environments may have changed since."""
        state = json.loads(string_value)
        self.iteration, self.agent_steps = state["iteration"], state["agent_steps"]
        self.episodes, self.seconds = state["episodes"], state["seconds"]
        self.started = time.monotonic()
        kept = state["scores"][: self.scores.size]
        self.scores.flat[: len(kept)] = kept
