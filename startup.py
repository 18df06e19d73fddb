"""What every command does first: check the packages, import TensorFlow quietly, choose the device."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time

STARTED = time.monotonic()  # of the command

# Package -> the oldest version that works; the same bounds as in requirements.txt.
REQUIRED = {
    "numpy": "1.26",
    "tensorflow": "2.21",
    "tensorboard": "2.20",
    "gymnasium": "1.2",
    "ale-py": "0.12",
    "pillow": "10.0",
    "tqdm": "4.66",
    "matplotlib": "3.8",
    "av": "13.0",
}


def check_packages(required: dict[str, str] = REQUIRED) -> None:
    """Exit with one line that names the first package that is missing or too old."""
    for package, oldest in required.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or _major_minor(found) < _major_minor(oldest):
            state = "is not installed" if found is None else f"{found} is too old"
            sys.exit(f"{package} {state}: {package}>={oldest} is needed. Run: pip install -r requirements.txt")


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])  # of 2.21.0, 2.21rc1, 3


@contextlib.contextmanager
def _quiet_stderr():
    """Hold back what C++ writes to stderr inside the block; show it all the same if the block fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(kept, held_back.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


check_packages()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # else off where the CPU lacks AVX512-VNNI: a third slower
with _quiet_stderr():  # the import prints a dozen lines before any log level applies
    import tensorflow as tf
tf.get_logger().setLevel("ERROR")  # it takes a trace for each thread's copy of the network for a mistake


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(device: str, num_groups: int) -> str:
    """Turn `auto`, `cpu`, `gpu` or `gpu:N` into a TensorFlow device name; set TensorFlow up for it and for the groups.

    Call it once, before anything is computed: thread counts cannot change afterwards.

    Raises:
      ValueError: `device` is not one of those names, or there is no such GPU.
    """
    kind, _, number = device.lower().partition(":")
    if kind not in ("auto", "cpu", "gpu") or (number and (kind != "gpu" or not number.isdecimal())):
        raise ValueError(f"device = {device!r}: must be auto, cpu, gpu or gpu:N")
    with _quiet_stderr():  # without a driver it prints an error on its way to "no GPU"
        gpus = tf.config.list_physical_devices("GPU")
    if kind == "gpu" and len(gpus) <= int(number or 0):
        raise ValueError(
            f"device = {device!r}: TensorFlow sees {len(gpus)} GPUs here. Use --device cpu, or --device auto to take "
            "a GPU only if there is one; on Linux with an NVIDIA driver, pip install 'tensorflow[and-cuda]'"
        )
    # The groups compute at once: one operation takes no more than its group's share of the cores. And a group that
    # waits for its games inside the graph occupies a thread, beside those that compute.
    tf.config.threading.set_intra_op_parallelism_threads(max(1, available_cores() // num_groups))
    tf.config.threading.set_inter_op_parallelism_threads(available_cores() + num_groups)
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return f"/GPU:{number or 0}" if gpus and kind != "cpu" else "/CPU:0"


def choose_dtype(compute_dtype: str, device: str) -> str:
    """Turn `auto` into bfloat16 where `device` is a CPU that multiplies it (AMX or AVX512-BF16), else into float32."""
    if compute_dtype != "auto":
        return compute_dtype
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        if "CPU" in device and re.search(r"\b(amx_bf16|avx512_bf16)\b", cpuinfo.read()):
            return "bfloat16"
    return "float32"


def reason(error: Exception) -> str:
    """Return in one line why the system or TensorFlow refused something."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    return re.sub(r"^\{\{.*?\}\} *", "", (text or type(error).__name__).splitlines()[0])  # {{node of its graph}}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ("tensorflow", "gymnasium", "ale-py", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
