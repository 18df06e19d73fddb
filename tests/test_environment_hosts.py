# ruff: noqa: E402
"""Games on other machines, through Ray; every machine is this one, on loopback."""

import contextlib
import functools
import os
import pickle
import re
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ENDLESS, Running, ScriptedEnv, has_rows, iterations, last_iteration, refusal

import a3c
import startup
from async_agent import GroupAgent
from environment import find_game, make_training_envs
from progress import Progress

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")
from ray.cluster_utils import Cluster

import environment_hosts
from environment_hosts import HostedAgent, HostLost
from network import SharedNetwork
from startup import UserError

GAME = find_game("Breakout-v0")


def processes(root):
    """Return the ids of all processes below one, with their command lines."""
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = (path / "cmdline").read_text()

    def is_below(pid):
        return pid and (pid == root or is_below(parents.get(pid, 0)))

    return {pid: words for pid, words in found.items() if pid != root and is_below(pid)}


def actors(root=None):
    """Return the ids of the processes in which games are played."""
    return {pid for pid, words in processes(root or os.getpid()).items() if words.startswith("ray::Games")}


def are_gone(pids, seconds=15):
    """Return whether processes end in time; one that nobody has waited for has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = []
        for pid in pids:
            with contextlib.suppress(OSError):
                states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        if set(states) <= {"Z"}:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def private(tmp_path_factory):
    """Let Ray keep its files, and the password that it makes, out of the user's way."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # a short path: sockets are in it
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback
        patch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)
        yield


# One group on a cluster of this machine alone, in this process.


@pytest.fixture(scope="module")
def local(private):
    config = a3c.Config(ray_address="local", num_threads=2, agents_per_thread=2, stall_timeout=60)
    with environment_hosts.connected(config, GAME) as make:
        yield make


@pytest.fixture
def make_hosted(local):
    """Return a function that makes two games; their actors end with the test."""
    made = []

    def make():
        made.append(local())
        return made[-1]

    yield make
    for games in made:
        ray.kill(games.games)


def sockets():
    """Return the local addresses, in hexadecimal, that processes of this one listen at."""
    inodes = set()
    for pid in [os.getpid(), *processes(os.getpid())]:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(path))
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_ray_listens_on_loopback_only(local):
    assert sockets() <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_games_use_as_many_threads_as_their_actor_has_reserved(local):
    games = local()
    make = pickle.loads(games.make_envs)
    assert make.args[-1] == games.num_cpus == max(1, startup.available_cores() // 2)


def make_agent(agent_class, make_envs, shared=None, **fields):
    config = a3c.Config(device="cpu", num_threads=1, agents_per_thread=2, **fields)
    shared = shared or SharedNetwork(GAME.num_actions, config.decay, config.random_seed, filters=4)
    agent = agent_class(0, make_envs, shared, Progress(1, 2), config, lambda _: None)
    agent.envs = agent.make_envs()
    agent.reset()
    return agent


@pytest.mark.parametrize("random_frameskip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_updates_are_the_same_as_with_games_in_this_process(make_hosted, random_frameskip):
    game = find_game("Breakout-v0", random_frameskip=random_frameskip)

    def make_here():
        return make_training_envs(game, 2, 1)

    def make_there():
        games = make_hosted()
        games.make_envs = ray.cloudpickle.dumps(functools.partial(make_training_envs, game, 2, 1))
        return games

    weights = []
    for agent in (make_agent(GroupAgent, make_here), make_agent(HostedAgent, make_there)):
        for _ in range(5):
            agent.iterate()
        weights.append([v.numpy() for v in (*agent.shared.trainable_variables, *agent.shared.mean_squares)])
        weights[-1] += [agent.progress.scores, agent.history.numpy()]
    for here, there in zip(*weights, strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.slow
@pytest.mark.row(n=38)
def test_host_that_hangs_while_it_builds_is_named(make_hosted):
    games = make_hosted()
    games.make_envs, games.limit = ray.cloudpickle.dumps(lambda: time.sleep(3600)), 20
    with pytest.raises(TimeoutError, match=r"began its games for 20 s; the last one was \S+/\w{6}$"):
        games.reset(seed=1)


@pytest.mark.slow
@pytest.mark.row(n=38)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_host_that_dies_or_hangs_is_replaced(make_hosted, number, capsys):
    before = actors()
    agent = make_agent(HostedAgent, make_hosted)
    agent.envs.limit = 20
    (actor,) = actors() - before
    os.kill(actor, number)
    agent.iterate()
    assert "is lost" in capsys.readouterr().out
    assert agent.steps <= agent.config.unroll_step  # the unroll was left out
    assert (agent.progress.iteration, agent.progress.episodes) == (0, 0)
    agent.iterate()
    assert agent.progress.iteration == 1
    assert are_gone([actor])


def test_wrong_step_a_host_of_other_versions_and_a_cluster_without_a_place_are_named(make_hosted, monkeypatch):
    games = make_hosted()
    games.reset(seed=1)
    with pytest.raises(AssertionError, match="batch_size=2"):
        games.step(np.zeros(3, np.int32))  # there are two games
    theirs = environment_hosts.versions()
    ray.kill(games.games)
    with monkeypatch.context() as patch:
        patch.setattr(environment_hosts, "versions", lambda: "others")  # only here: the host has got its functions
        with pytest.raises(UserError, match=re.escape(f"has {theirs}, but here is others")):
            games.reset(seed=1)
    games.limit, games.num_cpus, games.host = 2, 1000, "none"
    with pytest.raises(TimeoutError, match="no environment host began its games for 2 s; the last one was none"):
        games.reset(seed=1)


# Without Ray.


class LosesItsHost(ScriptedEnv):
    """Two games whose host is lost at some steps, each game having paid 1 a step."""

    host = "fake"

    def __init__(self, lost_at, ends):
        super().__init__(np.ones([len(ends), 2]), ends)
        self.lost_at, self.calls = lost_at, 0

    def reset(self, **options):
        self.actions.clear()  # the script begins anew
        return super().reset(**options)

    def step(self, actions):
        self.calls += 1
        if self.calls in self.lost_at:
            raise HostLost("fake is lost")
        return super().step(actions)


def test_no_broken_game_is_counted_and_neither_returns_nor_frames_reach_across(capsys):
    ends = np.zeros([7, 2], bool)
    ends[6, 0] = True  # the first game ends with its step 7
    agent = make_agent(HostedAgent, lambda: LosesItsHost([7, 13], ends))
    seeds = agent.seeds.copy()
    for _ in range(2):  # the first unroll is whole, the second is lost at its step 2
        agent.iterate()
    assert (agent.progress.iteration, agent.progress.episodes) == (1, 0)
    assert not agent.episode_score.any()
    assert np.all(agent.seeds[1:] != seeds[1:])
    assert np.all(agent.history.numpy() >> 24 << 24 == agent.history.numpy())  # no frame of the games before
    for _ in range(2):  # from step 8 on: whole; at step 13, its first, the other is lost
        agent.iterate()
    assert (agent.progress.iteration, agent.progress.episodes) == (2, 0)
    for _ in range(2):
        agent.iterate()
    assert (agent.progress.iteration, agent.progress.episodes) == (4, 1)
    assert agent.progress.recent_scores() == [7]
    assert capsys.readouterr().out.count("fake is lost") == 2


@pytest.mark.row(n=38)
def test_address_without_a_cluster_is_refused_in_one_line(tmp_path, main):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        line = refusal(main(f"--log_dir={tmp_path}", "--num_threads=1", f"--ray_address={address}"))
    assert line.startswith(f"ray_address = '{address}'")


# Several machines.


@pytest.fixture
def cluster(private, monkeypatch):
    """Yield a cluster of two machines with a CPU each; the first is that of the program."""
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", lambda _: None)  # pytest has its own
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def kill(cluster, node):
    """Let a machine die."""
    process = node.all_processes["raylet"][0].process
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    cluster.worker_nodes.discard(node)
    node.kill_all_processes(check_alive=False, allow_graceful=False)


def hosts(training):
    return re.findall(r"group \d plays on \S+/(\w+)", training.printed.read_text())


@pytest.mark.row(n=38)
def test_training_goes_on_while_machines_die(cluster, tmp_path):
    folder = tmp_path / "run"
    with Running(folder, f"--ray_address={cluster.address}", "--stall_timeout=60", ENDLESS) as training:
        training.wait_for(lambda: has_rows(tmp_path / "run"), 90)
        assert set(hosts(training)) == {node.node_id[:6] for node in cluster.list_all_nodes()}
        kill(cluster, next(iter(cluster.worker_nodes)))
        training.wait_for(lambda: len(hosts(training)) == 3, 60)
        training.goes_on()
        now, left = iterations(folder)[-1], actors()
        assert len(left) == 2
        status, printed = training.send(signal.SIGINT)
    assert status == 130, printed
    assert last_iteration(folder) >= now
    assert are_gone(left)


@pytest.mark.slow
@pytest.mark.row(n=38)
def test_two_machines_die_in_each_of_twenty_runs_and_no_score_is_wrong(cluster, main, monkeypatch, tmp_path):
    cluster.add_node(num_cpus=1)
    agents, finished = [], {}

    class Recounting(HostedAgent):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            agents.append(self)

        def reset(self):
            super().reset()
            self.recounted = np.zeros(4)

        def step(self, action):
            _, reward, done, _ = result = super().step(action)
            self.recounted += reward
            for game in np.flatnonzero(done):
                finished.setdefault((self.index, game), []).append(self.recounted[game])
            self.recounted[done] = 0
            return result

    def wait_for(condition):
        end = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)

    def wait_until_all_have_learnt():
        goal = [agent.steps + 10 for agent in agents]
        wait_for(lambda: all(agent.steps >= steps for agent, steps in zip(agents, goal, strict=True)))

    def kill_two():
        try:
            wait_for(lambda: len(agents) == 3)
            wait_until_all_have_learnt()
            assert {agent.envs.host[-6:] for agent in agents} == {node.node_id[:6] for node in cluster.list_all_nodes()}
            for node in list(cluster.worker_nodes):
                kill(cluster, node)
                wait_for(lambda: all(agent.envs.host[-6:] != node.node_id[:6] for agent in agents))  # noqa: B023
                wait_until_all_have_learnt()
            killed.set()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(environment_hosts, "HostedAgent", Recounting)
    flags = [f"--log_dir={tmp_path}", "--num_threads=3", "--stall_timeout=90", ENDLESS]
    episodes, updates, losses, began = 0, 0, 0, time.monotonic()
    for _ in range(20):
        killed, thread = threading.Event(), threading.Thread(target=kill_two, daemon=True)
        thread.start()
        status, printed, errors = main(*flags, f"--ray_address={cluster.address}")
        thread.join(10)
        assert status == 130 and killed.is_set(), printed + errors
        assert printed.count("is lost") >= 2
        progress = agents[0].progress
        assert progress.iteration > updates
        assert progress.episodes - episodes == sum(map(len, finished.values()))
        for (group, game), scores in finished.items():
            assert progress.scores[group, game] == scores[-1]
        assert last_iteration(tmp_path) == progress.iteration
        episodes, updates, losses = progress.episodes, progress.iteration, losses + printed.count("is lost")
        agents.clear()
        finished.clear()
        for _ in range(2):
            cluster.add_node(num_cpus=1)
    took = time.monotonic() - began
    print(f"40 machines killed, {losses} losses, {updates:,} updates, {episodes:,} games, {took:.0f} s")


@pytest.mark.slow
@pytest.mark.row(n=38)
@pytest.mark.parametrize(
    "number, whole_group", [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]
)
def test_no_process_of_ray_survives_the_program(private, tmp_path, number, whole_group):
    with Running(tmp_path / "run", "--ray_address=local", ENDLESS) as training:
        training.wait_for(lambda: has_rows(tmp_path / "run"), 90)
        below = processes(training.process.pid)
        assert any("gcs_server" in words for words in below.values())
        began = actors(training.process.pid)
        assert len(began) == 2
        for pid in below if whole_group else ():  # Ctrl-C
            os.kill(pid, number)
        assert training.send(number)[0] == (-number if number == signal.SIGKILL else 128 + number)
    assert are_gone(began)
    assert are_gone(below, 15 if number != signal.SIGKILL else 120)  # two agents of Ray look for it for a minute


@pytest.mark.slow
@pytest.mark.row(n=38)
def test_killed_program_leaves_no_actor_on_a_cluster(cluster, tmp_path):
    with Running(tmp_path / "run", f"--ray_address={cluster.address}", ENDLESS) as training:
        training.wait_for(lambda: has_rows(tmp_path / "run"), 90)
        began = actors()
        assert len(began) == 2
        training.process.kill()
        assert are_gone(began, 30)


@pytest.mark.slow
@pytest.mark.row(n=38)
def test_run_without_any_place_is_saved_and_names_the_host(cluster, tmp_path):
    with Running(tmp_path / "run", f"--ray_address={cluster.address}", "--stall_timeout=15", ENDLESS) as training:
        training.wait_for(lambda: has_rows(tmp_path / "run"), 90)
        for node in cluster.list_all_nodes():
            for pid in actors(node.all_processes["raylet"][0].process.pid):
                os.kill(pid, signal.SIGSTOP)
        for node in list(cluster.worker_nodes):
            kill(cluster, node)
        head = cluster.head_node.all_processes["raylet"][0].process.pid
        os.kill(head, signal.SIGSTOP)  # it places nothing
        assert training.process.wait(60) == 1
        os.kill(head, signal.SIGCONT)
    printed = training.printed.read_text()
    assert "no environment host began its games" in printed
    assert re.search(r"the last one was \S+/\w{6}", printed)
    assert last_iteration(tmp_path / "run") >= iterations(tmp_path / "run")[-1]
