"""Save, verify and resume.

A run's folder holds `model.ckpt-N` after N updates, the newest three, and `last.ckpt`, a copy of the newest. Each is a
pair of files in TensorFlow's format, with a checksum of every tensor and of the index. A save goes to a new name and is
read back before an older one is removed, so at every moment there is a complete one.
"""

import contextlib
import glob
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence

import numpy as np

import original
from network import CONVOLUTIONS, ActorCritic, SharedNetwork, first_shapes
from progress import Progress
from settings import CONFIG, check_path, read_config
from startup import UserError, as_user_error, reason, tf

KEEP = 3  # numbered checkpoints that stay in a folder
LAST, NUMBERED, DAMAGED = "last.ckpt", "model.ckpt-", "damaged-"
DATA, INDEX = ".data-00000-of-00001", ".index"  # the two files of a checkpoint


class Saver:
    """Saves a run into its folder, with `progress.lock` held, and resumes it. `check` refuses a lost folder."""

    def __init__(self, folder: str, shared: SharedNetwork, progress: Progress, check: Callable = lambda: None):
        self.folder, self.shared, self.progress, self.check = folder, shared, progress, check
        self.unfinished = os.path.join(folder, ".unfinished")
        self.state = {"weights": shared.weights, "biases": shared.biases, **shared.slots, "progress": progress}

    def save(self) -> str:
        """Write `model.ckpt-N`, read it back, copy it to `last.ckpt`, remove the oldest; return its path.

        Raises FloatingPointError if a weight is not finite; UserError if the disk is full, the folder was lost or
        cannot be written, or what was read back is damaged. Earlier checkpoints stay.
        """
        for variable in self.shared.trainable_variables:
            if not np.all(np.isfinite(variable)):
                raise FloatingPointError(f"iteration {self.progress.iteration}: not finite: {variable.name}; not saved")
        path = os.path.join(self.folder, f"{NUMBERED}{self.progress.iteration}")
        unfinished = os.path.join(self.unfinished, "model")
        with as_user_error(f"cannot save {path}, earlier saves are intact"):
            self.check()
            try:
                os.makedirs(self.unfinished, exist_ok=True)
                tf.train.Checkpoint(**self.state).write(unfinished)
                read(unfinished)
                _move(unfinished, path)
                for suffix in (DATA, INDEX):
                    shutil.copyfile(path + suffix, unfinished + suffix)
                _move(unfinished, os.path.join(self.folder, LAST))
            finally:
                shutil.rmtree(self.unfinished, ignore_errors=True)
        for old in numbered(self.folder)[KEEP:]:
            if old != path:  # which is not the newest by its number where others have been renamed
                _remove(old)
        return path

    def resume(self, warn: Callable[[str], None]) -> str | None:
        """Take over the newest complete checkpoint of the folder; return its path, or None where there is none.

        Removes half-written files; names damaged checkpoints to `warn`, passes over them and renames them, so that
        they count no more. What the newest was saved without begins anew: the average, or in an agent that was made
        small the optimizer too. Raises UserError if all are damaged, or if the newest is of another network.
        """
        shutil.rmtree(self.unfinished, ignore_errors=True)
        for name in glob.glob(f"*.ckpt*{DATA}", root_dir=self.folder):
            path = os.path.join(self.folder, name).removesuffix(DATA)
            if not os.path.exists(path + INDEX):
                warn(f"{path}{DATA} has no {INDEX} file, so it is not a checkpoint: removed")
                os.remove(path + DATA)
        paths, damaged = all_checkpoints(self.folder), []
        for path in paths:
            try:
                tensors, _ = read(path)
            except UserError as error:
                warn(f"{error}; falling back to an earlier one")
                damaged.append(path)
            else:
                check_fits(tensors, self.shared, path, advice=", or another --log_dir for a new run")
                there = {name.split("/")[0] for name in tensors}
                was = "adam" if "updates" in there else "rmsprop"
                if "mean_squares" in there and was != self.shared.optimizer:
                    change = "Keep that, or give its weights to a new run by --initial_model"
                    raise UserError(f"optimizer = {self.shared.optimizer!r}: {path} was trained with {was!r}. {change}")
                state = {name: part for name, part in self.state.items() if name in there}  # all else begins anew
                tf.train.Checkpoint(**state).read(path).assert_existing_objects_matched()
                if "averages" not in there:
                    self.shared.update_averages(1.0)  # they begin here
                for old in damaged:
                    _set_aside(old)
                return path
        if paths:
            raise UserError(f"no checkpoint in {self.folder} is complete. Move them away to start afresh")
        _set_aside_remains(self.folder, warn)
        return None


def _move(path: str, new: str) -> None:
    """Rename a checkpoint. A kill on the way leaves none of the new name, never a damaged one."""
    _remove(new)
    for suffix in (DATA, INDEX):
        os.replace(path + suffix, new + suffix)


def _set_aside(path: str) -> None:
    """Rename a damaged checkpoint: as the newest it would be played, and kept in place of a sound one."""
    for suffix in (INDEX, DATA):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + suffix, os.path.join(os.path.dirname(path), DAMAGED + os.path.basename(path) + suffix))


def _set_aside_remains(folder: str, warn: Callable[[str], None]) -> None:
    """Rename the tables and the settings of a run whose checkpoints are gone, before a new run writes its own."""
    paths = [os.path.join(folder, name) for name in ("progress.csv", CONFIG, "evaluation.csv", "evaluation")]
    with contextlib.suppress(OSError), open(paths[0], "rb") as table:
        if len(table.readlines()) > 1:
            number = next(n for n in itertools.count(1) if not any(os.path.exists(f"{path}.{n}") for path in paths))
            for path in filter(os.path.exists, paths):
                os.replace(path, f"{path}.{number}")
                warn(f"{path} is of a run whose checkpoints are gone: renamed to {path}.{number}")


def _remove(path: str) -> None:
    for suffix in (INDEX, DATA):  # in this order, because without its index the rest is no checkpoint
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + suffix)


def read(path: str, or_original: bool = False) -> tuple[dict[str, np.ndarray], int]:
    """Return a checkpoint's tensors and the number of its updates. Raises UserError if it is damaged or foreign.

    With `or_original` one of the original is not foreign: its weights get the names that they have here.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        keys = reader.get_variable_to_shape_map()  # such as weights/conv1/.ATTRIBUTES/VARIABLE_VALUE
        tensors = {key.split("/.")[0]: reader.get_tensor(key) for key in keys}
        if or_original and (weights := original.translate(tensors)):
            number = path.rpartition("-")[2]  # nothing else tells the updates
            return weights, int(number) if number.isdecimal() else 0
        return tensors, int(json.loads(tensors["progress"])["iteration"])
    except (tf.errors.OpError, LookupError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of this program ({reason(error)})") from error


def kinds_in(path: str) -> set[str]:
    """Return what a checkpoint holds, such as weights and averages; one of the original, `master`."""
    with as_user_error(f"cannot read {path}"):  # a run that goes on may have replaced it
        return {name.partition("/")[0] for name, _ in tf.train.list_variables(path)}


def layers_of(tensors: dict[str, np.ndarray], network: str) -> dict:
    """Return the arguments of `ActorCritic` that a checkpoint's weights tell of its network.

    Of its convolutions they tell the shapes. It is `network` if that has these, or if no other has them.
    """
    filters = tensors.get("weights/conv1", np.zeros(1)).shape[-1]  # a network without conv1 does not fit
    first = [name for name in tensors if name == "weights/hidden" or name.startswith("weights/conv")]
    shapes = {name.removeprefix("weights/"): [*tensors[name].shape] for name in first}
    alike = [name for name in CONVOLUTIONS if first_shapes(name, filters) == shapes]
    return {
        "network": network if network in alike or not alike else alike[0],
        "filters": filters,
        "input_scale": "unit" if "weights/input" in tensors else "raw",
        "lstm": tensors.get("weights/lstm", np.zeros(0)).shape[-1] // 4,
        "last_action": "weights/action" in tensors,
        "background": -int(tensors.get("biases/input", 0)),
    }


def check_fits(
    tensors: dict[str, np.ndarray], network: ActorCritic, path: str, but: Sequence[str] = (), advice: str = ""
) -> None:
    """Raise UserError where a checkpoint's weights, but for some, are not those of a network, by name and shape.

    It says which settings the network would need, or else what the first difference is, and the advice.
    """
    kinds = {"weights": network.weights, "biases": network.biases}
    here = {f"{kind}/{layer}": v.numpy() for kind, layers in kinds.items() for layer, v in layers.items()}
    shapes = {name: [*x.shape] for name, x in here.items()}
    was = {name: [*x.shape] for name, x in tensors.items() if name.split("/")[0] in kinds}
    different = [name for name in {**shapes, **was} if was.get(name) != shapes.get(name) and name not in but]
    if not different:
        return
    has = layers_of(here, network.kind)
    needed = {name: value for name, value in layers_of(tensors, network.kind).items() if value != has[name]}
    if "background" in needed:
        needed["subtract_background"] = needed.pop("background") > 0
    actions, now = was.get("weights/policy", [0])[-1], network.num_actions
    if actions not in (0, now) and not needed:
        raise UserError(f"{path} is of a game with {actions} actions; this one has {now}")
    name = different[0]
    why = " ".join(["It needs", *(f"--{name} {value}" for name, value in needed.items())])
    why = why if needed else f"{name} has shape {was.get(name)} there and {shapes.get(name)} here"
    raise UserError(f"{path} is of another network. {why}{advice}")


def load_network(path: str, num_actions: int, newest: bool = False) -> tuple[ActorCritic, int]:
    """Return a checkpoint's network and the number of its updates. Raises UserError if it is damaged or misfits.

    Where the run has kept an average of the weights it is that, or else the `newest`. Of networks with weights of the
    same shapes, it is the one that the config.json beside it names.
    """
    tensors, iteration = read(path, or_original=True)
    config = os.path.join(os.path.dirname(path), CONFIG)
    name = read_config(config).get("network") if os.path.exists(config) else None
    network = ActorCritic(num_actions, **layers_of(tensors, name if name in CONVOLUTIONS else "original"))
    _assign(tensors, network, path, newest)
    return network, iteration


def load_weights(path: str, network: ActorCritic, newest: bool = False) -> int:
    """Give a network a checkpoint's weights; return the number of its updates. As `load_network`."""
    tensors, iteration = read(path, or_original=True)
    _assign(tensors, network, path, newest)
    return iteration


def _assign(tensors: dict[str, np.ndarray], network: ActorCritic, path: str, newest: bool) -> None:
    check_fits(tensors, network, path, but=["biases/input"])  # the background is not learnt: each game has its own
    for kind, layers in (("weights", network.weights), ("biases", network.biases)):
        for layer, variable in layers.items():
            if variable.trainable:
                variable.assign(tensors[f"{kind}/{layer}"])
    if "averages/0" in tensors and not newest:
        for index, variable in enumerate(network.trainable_variables):
            variable.assign(tensors[f"averages/{index}"])


def resolve(path: str) -> str:
    """Return the checkpoint that a path, one of its two files or a folder means; a UserError lists what is there."""
    path = os.path.expanduser(path).removesuffix(INDEX).removesuffix(DATA)
    check_path("model", path)
    if os.path.exists(path + INDEX):
        return path
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    found = all_checkpoints(folder)
    if found and (folder == path or os.path.basename(path) == LAST):  # which a kill may have left out
        return found[0]
    raise UserError(f"no checkpoint {path}. In {folder}: {', '.join(found) or 'no checkpoint there'}")


def all_checkpoints(folder: str) -> list[str]:
    """Return the folder's checkpoints, newest first; `last.ckpt`, which a run replaces, after its equals."""
    iterations = {path: int(path.rpartition("-")[2]) for path in numbered(folder)}
    last = os.path.join(folder, LAST)
    if os.path.exists(last + INDEX):
        iterations[last] = -1
        with contextlib.suppress(UserError):  # a damaged one is the last to be tried
            _, iterations[last] = read(last)
    return sorted(iterations, key=iterations.get, reverse=True)


def numbered(folder: str) -> list[str]:
    """Return the paths of the folder's `model.ckpt-N`, newest first."""
    numbers = [name[len(NUMBERED) : -len(INDEX)] for name in glob.glob(f"{NUMBERED}*{INDEX}", root_dir=folder)]
    newest_first = sorted(filter(str.isdecimal, numbers), key=int, reverse=True)
    return [os.path.join(folder, NUMBERED + number) for number in newest_first]
