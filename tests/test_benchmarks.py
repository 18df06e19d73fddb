"""What the benchmarks share, and the comparison of two commits, with programs whose speed is known."""

import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import common, compare, scaling

# Trains at --speed steps per second, thrice as fast without games.
BENCH = """
import contextlib, types
def parse_config(flags):
    return dict(flag[2:].split("=") for flag in flags)
def config_parser(_):
    return types.SimpleNamespace(parse_args=parse_config)
def config_from(_, config):
    return config
a3c = types.SimpleNamespace(FLAGS, game_and_device=lambda config: (None, None))
tf = types.SimpleNamespace(device=contextlib.nullcontext)
class Bench:
    training_agents, network_agents = 1, 3
    def __init__(self, config, *_):
        self.speed = int(config["speed"])
    def measure_updates(self, agents, seconds):
        print("round 1")
        return agents * self.speed
"""
OLD = "config_parser=config_parser, config_from=config_from"


@pytest.mark.parametrize("place, flags", [("benchmarks/bench.py", "parse_config=parse_config"), ("bench.py", OLD)])
def test_checkout_is_timed_by_its_own_bench_which_if_it_fails_shows_why(tmp_path, place, flags):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / place).write_text(BENCH.replace("FLAGS", flags))
    assert common.train(["--speed=20"], 0.1, tmp_path) == 20
    assert common.train(["--speed=20"], 0.1, tmp_path, "network_agents") == 60
    with pytest.raises(RuntimeError, match=r"ended with status 1:\n[^$]*KeyError: 'speed'"):
        common.train([], 0.1, tmp_path)


@pytest.mark.parametrize("flags, kind", [([], "training_agents"), (["--network_alone"], "network_agents")])
def test_two_commits_take_turns_and_who_begins_alternates(monkeypatch, capsys, flags, kind):
    turns = []

    def train(flags, seconds, folder, agents):
        turns.append((flags, seconds, folder == ROOT, agents))
        return 40.0 if flags == ["--base"] else 20.0

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "check_out", lambda *_: None)
    words = ["compare.py", "HEAD", "--rounds=2", "--seconds=3", "--own", "--base_flags=--base", *flags]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    base, own = (["--base"], 3, False, kind), (["--own"], 3, True, kind)
    assert turns == [base, own, own, base]
    assert "round 2 of 2: HEAD 40.0, working tree 20.0 steps/s, ratio 0.500\n" in capsys.readouterr().out


def test_commit_is_unpacked_and_one_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "REPOSITORY", tmp_path)
    (tmp_path / "a3c.py").write_text("committed")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        subprocess.run([*git, *words], check=True, timeout=30)
    (tmp_path / "a3c.py").write_text("changed")
    compare.check_out("HEAD", tmp_path / "base")
    assert (tmp_path / "base" / "a3c.py").read_text() == "committed"
    with pytest.raises(ValueError, match=r"no commit '0123abcd' in .*git fetch --unshallow"):
        compare.check_out("0123abcd", tmp_path / "other")


def test_first_update_is_timed_by_the_csv_and_not_by_the_end(tmp_path):
    write = "open(sys.argv[-1].partition('=')[2] + '/progress.csv', 'w').close()"
    (tmp_path / "a3c.py").write_text(f"import sys, time; time.sleep(0.2); {write}; time.sleep(8)")
    assert 0.2 < common.first_update([], tmp_path) < 8


def test_group_of_the_scaling_model_has_no_more_cores_than_a_host():
    four, many = ([scaling.simulate(groups, hosts, 0.001) for hosts in (1, 4, 16)] for groups in (4, 64))
    assert four[0] < four[1] == four[2]
    assert many[0] < many[1] <= many[2]


@pytest.mark.parametrize("flags", [[], ["--drow=x.png"], ["--draw=x.png", "--num_threads=2"]])
def test_scaling_says_what_it_needs(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    monkeypatch.setattr(scaling, "draw", lambda _: pytest.fail("it drew"))
    with pytest.raises(SystemExit, match="2"):
        scaling.main()
    assert "--draw PNG or --measure is needed" in capsys.readouterr().err


def test_line_that_is_still_being_written_is_no_row(tmp_path):
    path = tmp_path / "progress.csv"
    assert common.read_rows(str(path)) == []
    path.write_bytes(b"agent_steps,seconds\r\n320,1.5\r\n640,3.1")  # of 3.14
    assert common.read_rows(str(path)) == [{"agent_steps": "320", "seconds": "1.5"}]
