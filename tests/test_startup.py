"""What every command does first: packages, cores, the device and what it computes in."""

import os
import platform
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

import network
import startup
from startup import UserError, tf


def run_python(code, **options):
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, **options)
    return done.stdout


def test_every_line_of_requirements_txt_is_checked_and_those_installed_are_enough():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [f"{package}>={oldest}" for package, oldest in startup.REQUIRED.items()] == [n.split()[0] for n in lines]
    startup.check_packages()


def test_ctrl_c_while_tensorflow_is_imported_ends_the_program_without_a_traceback(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise KeyboardInterrupt")
    words = [sys.executable, "a3c.py"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_groups_that_wait_for_their_games_leave_threads_to_those_that_compute():
    """A group's graph occupies an inter-op thread while it waits."""
    code = (
        "import startup; from startup import tf; threads = tf.config.threading; startup.available_cores = lambda: 9\n"
    )
    code += "startup.choose_device('cpu', 4)\n"
    code += "print(threads.get_inter_op_parallelism_threads(), threads.get_intra_op_parallelism_threads())"
    assert run_python(code).split() == ["13", "2"]


def test_writer_drops_what_a_sleeping_output_has_no_room_for():
    taken, awake = [], threading.Event()
    writer = startup.BackgroundWriter(take=lambda item: awake.wait(60) and taken.append(item))
    for number in range(20_000):
        writer.write(number)
    awake.set()
    writer.close(60)
    assert 10_000 <= len(taken) <= 10_001
    assert taken[:10_000] == list(range(10_000))


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError("no\nroom"), "no"),
        (MemoryError(), "MemoryError"),
        (tf.errors.ResourceExhaustedError(None, None, "{{node a/b}} f.v2; No space\n\tflush"), "f.v2; No space"),
    ],
)
def test_reason_is_one_line_without_what_only_tensorflow_needs(error, said):
    assert startup.reason(error) == said


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
    monkeypatch.setattr(network, "Path", {"/proc/cpuinfo": info}.get)
    assert network.choose_dtype("auto", device) == chosen
    assert network.choose_dtype("bfloat16", device) == "bfloat16"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its library of kernels is for x86")
def test_convolutions_use_onednn_on_any_x86_unless_the_user_says_otherwise():
    others = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    others |= {"ONEDNN_VERBOSE": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = "import network as n; net = n.ActorCritic(4); net(n.tf.zeros([2, 84, 84], n.tf.uint32), n.tf.zeros([2, 0]))"
    assert "exec,cpu,convolution" in run_python(code, env=others)
    code = "import os, startup; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    assert run_python(code, env={**others, "TF_ENABLE_ONEDNN_OPTS": "0"}) == "0\n"


@pytest.mark.row(n=35)
@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ("0::/not/seen/from/inside", {"cpu.max": "70000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 64),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/b/cpu.cfs_quota_us": "99999"}, 1),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/b/cpu.cfs_quota_us": "-1"}, 64),
        ("3:cpuset:/\n2:cpu,cpuacct:/a/b\n0::/", {"cpu/a/cpu.cfs_quota_us": "100001"}, 2),
        ("3:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "100001"}, 64),
    ],
)
def test_quota_of_a_control_group_limits_the_cores(monkeypatch, tmp_path, groups, files, cores):
    """Version 2 and version 1 of control groups, as the kernel shows them; the paths are moved below a folder."""
    periods = {name.replace("quota", "period"): "100000" for name in files if "quota" in name}
    files = {f"sys/fs/cgroup/{name}": text for name, text in {**files, **periods}.items()}
    for name, text in {**files, "proc/self/cgroup": groups}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    real = startup.Path
    monkeypatch.setattr(startup, "Path", lambda first, *rest: real(f"{tmp_path}{first}", *rest))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert startup.available_cores() == cores


@pytest.mark.row(n=17)
@pytest.mark.parametrize("device", ["gpu:x", "gpu:-1", "tpu", "cpu:1", ""])
def test_device_that_is_none_raises_naming_it(device):
    with pytest.raises(UserError, match=f"^device = '{device}': must be auto, cpu, gpu or gpu:N$"):
        startup.choose_device(device)


@pytest.fixture
def three_gpus(monkeypatch):
    """Return a function that lets TensorFlow see three GPUs, and at work already or not: what is done with them."""

    def make(at_work):
        gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{n}", "GPU") for n in range(3)]
        visible, grown = list(gpus), []

        def set_visible(wanted, kind):
            assert kind == "GPU"
            if at_work and wanted != visible:
                raise RuntimeError("Visible devices cannot be modified after being initialized")
            visible[:] = wanted

        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
        monkeypatch.setattr(tf.config, "set_visible_devices", set_visible)
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: grown.append(gpu))
        return gpus, visible, grown

    return make


@pytest.mark.row(n=35)
@pytest.mark.parametrize(
    "device, chosen, name",
    [("cpu", [], "/CPU:0"), ("gpu", [0], "/GPU:0"), ("auto", [0], "/GPU:0"), ("gpu:2", [2], "/GPU:0")],
)
def test_no_other_gpu_is_opened_than_the_one_asked_for(three_gpus, device, chosen, name):
    """Simulated."""
    gpus, visible, grown = three_gpus(at_work=False)
    assert startup.choose_device(device) == name
    assert visible == grown == [gpus[n] for n in chosen]


@pytest.mark.row(n=35)
@pytest.mark.row(n=34)
def test_gpu_keeps_its_number_where_tensorflow_is_at_work_already(three_gpus, capsys):
    _, visible, _ = three_gpus(at_work=True)
    assert startup.choose_device("gpu:1") == "/GPU:1"
    assert "TensorFlow was already at work" in capsys.readouterr().out
    del visible[1]
    with pytest.raises(UserError, match="Use a new process"):
        startup.choose_device("gpu:1")
