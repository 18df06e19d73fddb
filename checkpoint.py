"""Save, verify and resume.

A run's folder holds `model.ckpt-N.*` after N updates, the newest few, and `last.ckpt.*`, a copy of the newest.
Each save goes to a new name and is read back before an older one is removed, so at every moment there is a complete
one. TensorFlow's checkpoint format keeps a checksum of every tensor and of its index.
"""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable

import numpy as np

from network import ActorCritic, SharedNetwork
from startup import UserError, reason, refusing, tf

CONFIG, LAST, UNFINISHED = "config.json", "last.ckpt", ".unfinished"
_DATA, _INDEX = ".data-00000-of-00001", ".index"
_KEY = "/.ATTRIBUTES/VARIABLE_VALUE"
_PROGRESS_KEY = "progress/.ATTRIBUTES/py_state"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of something else; the message says which and what to do."""


def read_config(path: str) -> dict:
    """Return what a run's `config.json` says. Raises CheckpointError if it is missing or damaged."""
    try:
        with open(path) as file:
            config = json.load(file)
        config["game"]  # the one key that everything needs
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def write_json(path: str, content: dict) -> None:
    """Write a file such as `config.json`, whole or not at all. Raises UserError where that is impossible."""
    unfinished = os.path.join(os.path.dirname(path), ".unfinished.json")
    with refusing(f"cannot write {path}"):
        with open(unfinished, "w") as file:
            json.dump(content, file, indent=2)
        os.replace(unfinished, path)


def check_path(name: str, path: str) -> None:
    """Raise UserError where TensorFlow takes a path for a pattern, or cannot say it because it is not UTF-8."""
    if any(character in "*?[]\\\0" or "\ud800" <= character <= "\udfff" for character in path):
        raise UserError(f"{name} = {path!r}: must be a path in UTF-8 without any of * ? [ ] \\")


class Saver:
    """Saves a run into its folder and resumes it.

    Args:
      folder, check: of `groups.run_folder`; the check is made before each save.
      shared, progress: the network with its RMSProp state and an `async_agent.Progress`, locked by the caller.
      keep: how many numbered checkpoints stay.
    """

    def __init__(self, folder: str, shared: SharedNetwork, progress, keep: int = 3, check=lambda: None):
        self.folder, self.shared, self.progress, self.keep, self.check = folder, shared, progress, keep, check
        self.newest = None  # path of what this process saved or resumed last
        state = {"weights": shared.weights, "biases": shared.biases, "mean_squares": shared.mean_squares}
        self.checkpoint = tf.train.Checkpoint(**state, progress=progress)

    def save(self) -> str:
        """Write `model.ckpt-N`, read it back, copy it to `last.ckpt`, remove the oldest; return its path.

        Raises, with earlier checkpoints untouched:
          FloatingPointError: a weight is not finite.
          UserError: the disk is full, or the folder cannot be written or was lost, or what was read back is damaged.
        """
        for variable in self.shared.trainable_variables:
            if not np.all(np.isfinite(variable)):
                raise FloatingPointError(f"iteration {self.progress.iteration}: not finite: {variable.name}; not saved")
        path = os.path.join(self.folder, f"model.ckpt-{self.progress.iteration}")
        last, unfinished = os.path.join(self.folder, LAST), os.path.join(self.folder, UNFINISHED, "model")
        if path == self.newest and os.path.exists(path + _INDEX):
            return path
        with refusing(f"cannot save {path}, earlier saves are intact"):
            self.check()
            try:
                os.makedirs(os.path.dirname(unfinished), exist_ok=True)
                self.checkpoint.write(unfinished)
                read(unfinished)
                _move(unfinished, path)
                for suffix in (_DATA, _INDEX):
                    shutil.copyfile(path + suffix, unfinished + suffix)
                _move(unfinished, last)
            finally:
                self.remove_unfinished()
        self.newest = path
        for old in numbered(self.folder)[self.keep :]:
            _remove(old)
        return path

    def resume(self, warn: Callable[[str], None]) -> str | None:
        """Take over the newest complete checkpoint of the folder; return its path, or None where there is none.

        Damaged ones are named to `warn` and passed over; half-written files are removed. Raises CheckpointError if it
        is of another network, or if every one is damaged.
        """
        self.remove_unfinished(warn)
        paths = all_checkpoints(self.folder)
        for path in paths:
            try:
                tensors = read(path)
                saved_iteration(tensors, path)
            except CheckpointError as error:
                warn(f"{error}; falling back to an earlier one")
                continue
            check_fits(tensors, self.shared, path)
            self.checkpoint.read(path).assert_consumed()
            self.newest = path
            return path
        if paths:
            raise CheckpointError(f"no checkpoint in {self.folder} is complete. Move them away to start afresh")
        return None

    def remove_unfinished(self, warn: Callable[[str], None] = lambda text: None) -> None:
        """Remove what a killed or failed save left behind; a data file without its index is named to `warn`."""
        shutil.rmtree(os.path.join(self.folder, UNFINISHED), ignore_errors=True)
        for name in glob.glob(os.path.join(glob.escape(self.folder), f"*.ckpt*{_DATA}")):
            if not os.path.exists(name.removesuffix(_DATA) + _INDEX):
                warn(f"{name} has no {_INDEX} file, so it is not a checkpoint: removed")
                os.remove(name)


def read(path: str) -> dict[str, np.ndarray]:
    """Read every tensor of a checkpoint, which verifies their checksums; raises CheckpointError if it is damaged."""
    try:
        reader = tf.train.load_checkpoint(path)
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason(error)})") from error


def saved_iteration(tensors: dict[str, np.ndarray], path: str = "this") -> int:
    """Return after how many updates this checkpoint was saved. Raises CheckpointError if it is not one of ours."""
    try:
        return int(json.loads(tensors[_PROGRESS_KEY])["iteration"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program") from error


def check_fits(tensors: dict[str, np.ndarray], network: ActorCritic, path: str) -> None:
    """Raise CheckpointError where a checkpoint's weights are not those of a network, by name and shape."""
    here = {name: variable.shape.as_list() for name, variable in _parameters(network).items()}
    there = {key.removesuffix(_KEY): [*x.shape] for key, x in tensors.items() if key[:7] in ("weights", "biases/")}
    for name in {**here, **there}:
        was, now = there.get(name), here.get(name)
        if was != now and name == "weights/policy" and was and now:
            raise CheckpointError(f"{path} is of a game with {was[-1]} actions; this one has {now[-1]}")
        if was != now:
            why = "Was it trained with another --preset, --filters or --subtract_background?"
            raise CheckpointError(f"{path} is not of this network: {name} has shape {was} there and {now} here. {why}")


def load_network(path: str, num_actions: int) -> tuple[ActorCritic, int]:
    """Return the network of a checkpoint, with its filters and background, and after how many updates it was saved.

    Raises CheckpointError if it is missing, damaged, of another network or of a game with another number of actions.
    """
    tensors = read(path)
    saved = saved_iteration(tensors, path)
    filters = np.shape(tensors.get(f"weights/conv1{_KEY}"))[-1:] or (1,)  # where there is none, it does not fit
    network = ActorCritic(num_actions, filters=filters[0], background=-int(tensors.get(f"biases/input{_KEY}", 0)))
    check_fits(tensors, network, path)
    for name, variable in _parameters(network).items():
        variable.assign(tensors[name + _KEY])
    return network, saved


def _parameters(network: ActorCritic) -> dict[str, tf.Variable]:
    return {f"{kind}/{layer}": v for kind in ("weights", "biases") for layer, v in getattr(network, kind).items()}


def resolve(path: str) -> str:
    """Return the checkpoint that `path` means: itself, that of an `.index` or data file, or the newest of a folder.

    Raises CheckpointError, which lists what is there, if there is none; UserError if TensorFlow cannot read this path.
    """
    path = os.path.expanduser(path)
    check_path("model", path)
    path = path.removesuffix(_INDEX).removesuffix(_DATA)
    if os.path.exists(path + _INDEX):
        return path
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    found = all_checkpoints(folder)
    if found and folder == path:
        return found[0]
    raise CheckpointError(f"no checkpoint {path}. In {folder}: {', '.join(found) or 'no checkpoint there'}")


def all_checkpoints(folder: str) -> list[str]:
    """Return the folder's checkpoints, newest first; `last.ckpt`, which a run replaces, after its equals."""
    last, found = os.path.join(folder, LAST), numbered(folder)
    if os.path.exists(last + _INDEX):
        place = len(found)
        with contextlib.suppress(CheckpointError):
            saved = saved_iteration(read(last))
            place = sum(_number(path) >= saved for path in found)
        found.insert(place, last)
    return found


def numbered(folder: str) -> list[str]:
    """Return the paths of the folder's `model.ckpt-N`, newest first."""
    found = glob.glob(os.path.join(glob.escape(folder), f"model.ckpt-*{_INDEX}"))
    paths = [name.removesuffix(_INDEX) for name in found if name.removesuffix(_INDEX).rpartition("-")[2].isdecimal()]
    return sorted(paths, key=_number, reverse=True)


def _number(path: str) -> int:
    return int(path.rpartition("-")[2])


def _move(path: str, new: str) -> None:
    """Rename a checkpoint; who is killed meanwhile leaves none of the new name rather than a damaged one."""
    _remove(new)
    for suffix in (_DATA, _INDEX):
        os.replace(path + suffix, new + suffix)


def _remove(path: str) -> None:
    for suffix in (_INDEX, _DATA):  # in this order, because without its index the rest is no checkpoint
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + suffix)
