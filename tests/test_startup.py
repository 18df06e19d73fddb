"""What every command checks first: packages and device."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys

import pytest

import startup


def test_installed_packages_are_enough():
    startup.check_packages()


def test_bounds_are_those_of_requirements_txt():
    with open("requirements.txt") as file:
        bounds = dict(re.findall(r"^([a-z-]+)>=([\d.]+)", file.read(), re.MULTILINE))
    assert bounds == startup.REQUIRED


@pytest.mark.parametrize(
    "found, said",
    [(None, "tensorboard is not installed: tensorboard>=2.21 is needed"), ("2.9.1", "tensorboard 2.9.1 is too old")],
)
def test_missing_or_old_package_ends_the_program_with_one_line_that_names_it(monkeypatch, found, said):
    real = importlib.metadata.version

    def version(package):
        if package != "tensorboard":
            return real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as ended:
        startup.check_packages()
    assert str(ended.value).startswith(said)
    assert "\n" not in str(ended.value)
    assert "pip install -r requirements.txt" in str(ended.value)


@pytest.mark.parametrize(
    "flags, device, chosen",
    [
        ("avx2 amx_bf16 amx_tile", "/CPU:0", "bfloat16"),
        ("avx512f avx512_bf16", "/CPU:0", "bfloat16"),
        ("avx512f avx512_vnni", "/CPU:0", "float32"),
        ("amx_bf16", "/GPU:0", "float32"),
        (None, "/CPU:0", "float32"),
    ],
)
def test_auto_computes_in_bfloat16_where_the_cpu_multiplies_it(monkeypatch, tmp_path, flags, device, chosen):
    info = tmp_path / "cpuinfo"
    if flags:
        info.write_text(f"model name : a\nflags : {flags}\n")
    monkeypatch.setattr("builtins.open", lambda path, *_, real=open: real(info if path == "/proc/cpuinfo" else path))
    assert startup.choose_dtype("auto", device) == chosen
    assert startup.choose_dtype("bfloat16", device) == "bfloat16"


@pytest.mark.parametrize("device", ["gpu:x", "tpu", "cpu:1", ""])
def test_device_that_is_none_raises_naming_it(device):
    with pytest.raises(ValueError, match=f"device = '{device}': must be auto, cpu, gpu or gpu:N"):
        startup.choose_device(device, num_groups=1)


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError("no\nroom"), "no"),
        (MemoryError(), "MemoryError"),
        (
            startup.tf.errors.ResourceExhaustedError(None, None, "{{node a/b}} f.v2; No space\n\tflush"),
            "f.v2; No space",
        ),
    ],
)
def test_reason_is_one_line_without_what_only_tensorflow_needs(error, said):
    assert startup.reason(error) == said


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its library of kernels is for x86")
@pytest.mark.parametrize(("wish", "used"), [({}, True), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, False)])
def test_convolutions_use_onednn_on_any_x86_unless_the_user_says_otherwise(wish, used):
    program = "import network as n; net = n.ActorCritic(4); net(n.tf.zeros([2, 84, 84], n.tf.uint32))"
    others = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    environment = {**others, "ONEDNN_VERBOSE": "1", "CUDA_VISIBLE_DEVICES": "", **wish}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, timeout=120, capture_output=True, text=True
    )
    assert ("exec,cpu,convolution" in ran.stdout) == used
