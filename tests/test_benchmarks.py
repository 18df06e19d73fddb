"""What the benchmarks share, and the comparison of two commits, with programs whose speed is known."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.common import Child, read_rows

# Takes SPEED * --speed agent steps each 20 ms, notes its process id, and never ends by itself.
FAKE = """
import os, sys, time
flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
os.makedirs(flags["log_dir"])
open(os.environ["PIDS"], "a").write(f"{os.getpid()} ")
print("first update 0.1 s after the start, all groups learning after 0.2 s", flush=True)
with open(flags["log_dir"] + "/progress.csv", "w") as file:
    print("agent_steps,seconds", file=file, flush=True)
    steps, start = 0, time.monotonic()
    while True:
        time.sleep(0.02)
        steps += SPEED * int(flags.get("speed", 1))
        print(f"{steps},{time.monotonic() - start:.2f}", file=file, flush=True)
"""


def python(code):
    return [sys.executable, "-c", code]


def state(pid):
    """Return the letter of a process's state: R, S, T (stopped), ...; Z where it is gone."""
    try:
        return re.search(r"State:\t(.)", Path(f"/proc/{pid}/status").read_text())[1]
    except OSError:
        return "Z"


@pytest.fixture
def compare(tmp_path):
    """Return a function that starts `benchmarks.compare` in a repository of its own, which holds the fake a3c.py."""
    repository = tmp_path / "repository"
    (repository / "benchmarks").mkdir(parents=True)
    for name in ("common.py", "compare.py"):
        shutil.copy(ROOT / "benchmarks" / name, repository / "benchmarks")
    (repository / "a3c.py").write_text(FAKE.replace("SPEED", "10"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(repository)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        subprocess.run([*git, *words], check=True, timeout=30)
    (repository / "a3c.py").write_text(FAKE.replace("SPEED", "20"))  # not committed

    def start(*flags):
        command = [sys.executable, "-m", "benchmarks.compare", *flags]
        environment = {**os.environ, "PIDS": str(tmp_path / "pids")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=repository, env=environment, **pipes)

    return start


def pids(folder):
    file = folder / "pids"
    return file.read_text().split() if file.exists() else []


def test_two_commits_take_turns_and_each_is_timed_only_while_it_runs(compare, tmp_path):
    process = compare("HEAD", "--rounds=2", "--seconds=0.5", "--speed=1", "--base_flags=--speed=4")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    rounds = re.findall(r"round \d of 2: HEAD ([\d,.]+), working tree ([\d,.]+) steps/s, ratio ([\d.]+)", output)
    assert len(rounds) == 2
    for base, own, ratio in (map(float, (x.replace(",", "") for x in row)) for row in rounds):
        assert 1000 < base <= 2000  # 10 * 4 every 20 ms; half as many or fewer if the other's turn counted
        assert 500 < own <= 1000
        assert ratio == pytest.approx(own / base, abs=0.001)
    assert re.search(r"ratio +0\.\d+ \(0\.\d+ - 0\.\d+\)", output)
    assert [state(pid) for pid in pids(tmp_path)] == ["Z", "Z"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_other_side_is_stopped_meanwhile_and_a_signal_ends_both(compare, tmp_path, number):
    process = compare("HEAD", "--seconds=60")
    end = time.monotonic() + 30
    while [state(pid) for pid in pids(tmp_path)] != ["S", "T"]:  # the second started while the first was stopped
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert [state(pid) for pid in pids(tmp_path)] == ["Z", "Z"]


def test_commit_that_is_not_there_is_one_line(compare):
    output, errors = compare("0123abcd").communicate(timeout=30)
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("compare.py: error: no commit '0123abcd' in ")
    assert "git fetch --unshallow" in line


def test_side_that_does_not_start_shows_its_own_words(compare):
    _, errors = compare("HEAD", "--speed").communicate(timeout=30)
    assert errors.startswith("compare.py: error: a3c.py")
    assert "dictionary update sequence" in errors


def test_children_end_with_their_block_and_so_does_what_they_started(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True); input()"
    with Child(python(code), stdin=subprocess.PIPE) as child:
        grandchild = int(child.wait_for(lambda: re.findall(r"\d+\n", child.printed()), 20)[0])
        assert state(grandchild) != "Z"
    assert state(child.process.pid) == "Z"
    end = time.monotonic() + 10
    while state(grandchild) != "Z":  # killed, but nobody waits for it
        assert time.monotonic() < end
    assert not child.output.exists()


def test_child_with_grace_gets_to_save_and_its_output_is_added_to(tmp_path):
    output = tmp_path / "output.txt"
    output.write_text("before\n")
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'));"
        "print('ready', flush=True); time.sleep(100)"
    )
    with Child(python(code), str(output), grace=20) as child:
        child.wait_for(lambda: "ready" in child.printed(), 20)
    assert output.read_text() == "before\nready\nsaved\n"
    assert child.process.returncode == 1


def test_waiting_ends_when_the_child_does_and_after_its_time():
    with Child(python("print('rate 7.5'); print('rate 8'); raise SystemExit('my last words')")) as child:
        assert [child.next_rate(20), child.next_rate(20)] == [7.5, 8.0]
        with pytest.raises(RuntimeError, match=r"ended with status 1:\n[^$]*my last words"):
            child.next_rate(20)
    with Child(python("import time; time.sleep(100)")) as child, pytest.raises(TimeoutError, match="nothing for 0 s"):
        child.next_rate(0.2)


def test_line_that_is_still_being_written_is_no_row(tmp_path):
    path = tmp_path / "progress.csv"
    assert read_rows(str(path)) == []
    path.write_bytes(b"agent_steps,seconds\r\n320,1.5\r\n640,3.1")  # of 3.14
    assert read_rows(str(path)) == [{"agent_steps": "320", "seconds": "1.5"}]
