"""Rows of `docs/reliability.md` about files, names and settings: resumed, watched and drawn as their user means it."""

import contextlib
import dataclasses
import itertools
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
from conftest import ROOT, ScriptedEnv, last_iteration, rows, use_games
from matplotlib.figure import Figure
from test_checkpoint import DATA, INDEX, Run
from test_watching import watching

import a3c
import checkpoint
import environment
import groups
import plot
from startup import UserError

SHIPPED = ROOT / "models/breakout-v0"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def copy_with(tmp_path, old, new):
    """Return a copy of a3c.py, edited as a user might, that runs with the other files of the project."""
    text = (ROOT / "a3c.py").read_text()
    assert text.count(old) == 1
    (tmp_path / "a3c.py").write_text(text.replace(old, new))
    return tmp_path / "a3c.py"


def run_copy(copy, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, copy, *flags]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


# Row 27: a folder is watched by its newest checkpoint.


@pytest.fixture
def stale_last(tmp_path):
    """Return a folder with `model.ckpt-20` and a `last.ckpt` of ten updates before, as a killed run leaves it."""
    run = Run(tmp_path)
    for iteration in (10, 20):
        run.update(iteration)
        run.saver.save()
    for suffix in (INDEX, DATA):
        (tmp_path / f"last.ckpt{suffix}").unlink(missing_ok=True)
        shutil.copy(tmp_path / f"model.ckpt-10{suffix}", tmp_path / f"last.ckpt{suffix}")
    assert last_iteration(tmp_path) == 10
    return tmp_path


@pytest.mark.row(n=27)
def test_newest_checkpoint_of_a_folder_is_played_not_an_older_last(stale_last):
    assert checkpoint.load_network(checkpoint.resolve(str(stale_last)), 4)[1] == 20
    for name in ("model.ckpt-20", "model.ckpt-10"):
        for suffix in (INDEX, DATA):
            (stale_last / (name + suffix)).unlink()
    assert checkpoint.resolve(str(stale_last)) == f"{stale_last}/last.ckpt"
    (stale_last / f"last.ckpt{DATA}").write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        checkpoint.load_network(checkpoint.resolve(str(stale_last)), 4)


@pytest.mark.row(n=27)
def test_folder_of_a_run_that_saves_all_the_time_can_be_watched_at_any_moment(tmp_path):
    run, over = Run(tmp_path, filters=4), threading.Event()

    def save():
        for iteration in itertools.count(1):
            run.update(iteration)
            run.saver.save()
            if over.wait(0.05):
                return

    thread = threading.Thread(target=save)
    thread.start()
    try:
        wait_for(lambda: checkpoint.numbered(str(tmp_path)))
        seen = [checkpoint.load_network(checkpoint.resolve(str(tmp_path)), 4)[1] for _ in range(30)]
    finally:
        over.set()
        thread.join()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


# Row 28: a run keeps its settings.


@pytest.fixture
def play(tmp_path, main, monkeypatch):
    """Return a function that runs the command line into `tmp_path`, with games that cost no time: what it printed."""

    def call(max_iteration, *flags):
        use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
        flags = "--num_threads=1", "--agents_per_thread=4", f"--max_iteration={max_iteration}", *flags
        status, output, errors = main(f"--log_dir={tmp_path}", *flags)
        assert status == 0, errors
        return output

    return call


@pytest.mark.row(n=28)
def test_resumed_run_keeps_the_settings_that_it_was_started_with(play, tmp_path):
    play(2, "--learning_rate=1e-3", "--grad_clip=none")
    output = play(4)
    assert "learning_rate = 0.001" in output
    assert "changed since the last run: learning_rate" not in output
    assert config_of(tmp_path)["learning_rate"] == 1e-3
    assert config_of(tmp_path)["grad_clip"] is None
    assert float(rows(tmp_path)[1]["learning_rate"]) == pytest.approx(1e-4)  # a tenth, at the end


@pytest.mark.row(n=28)
def test_flag_beats_the_runs_setting_and_is_reported_and_the_old_one_stays_on_record(play, tmp_path):
    play(2, "--learning_rate=1e-3")
    output = play(4, "--learning_rate=2e-3")
    assert "changed since the last run: learning_rate from 0.001 to 0.002" in output
    play(6, "--learning_rate=3e-3", "--decay=0.9")
    config = config_of(tmp_path)
    assert (config["learning_rate"], config["decay"]) == (3e-3, 0.9)
    assert config["history"] == [
        {"iteration": 2, "agent_steps": 40, "was": {"max_iteration": 2, "learning_rate": 1e-3}},
        {"iteration": 4, "agent_steps": 80, "was": {"max_iteration": 4, "learning_rate": 2e-3, "decay": 0.99}},
    ]


@pytest.mark.slow
@pytest.mark.row(n=28)
def test_preset_need_not_be_given_again_and_does_not_undo_a_flag(play, tmp_path):
    play(2, "--preset=fast", "--learning_rate=1e-4")
    play(4)
    play(6, "--preset=fast")
    config = config_of(tmp_path)
    assert (config["filters"], config["learning_rate"], config["life_loss_ends_return"]) == (16, 1e-4, True)


@pytest.mark.row(n=28)
@pytest.mark.row(n=20)
def test_preset_of_another_network_is_refused(play, tmp_path, main):
    play(2)
    before = config_of(tmp_path)
    status, _, errors = main(f"--log_dir={tmp_path}", "--num_threads=1", "--preset=fast")
    assert status == 1
    assert "is not of this network" in errors
    assert config_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.row(n=28)
def test_default_that_the_user_edits_counts_for_a_resumed_run(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    copy = copy_with(tmp_path, "learning_rate: float = 2.5e-4", "learning_rate: float = 5e-4")
    process = run_copy(copy, f"--log_dir={folder}", "--max_iteration=8")
    assert process.returncode == 0, process.stderr
    assert "changed since the last run: learning_rate from 0.00025 to 0.0005" in process.stdout
    config = config_of(folder)
    assert (config["learning_rate"], config["num_threads"], config["agents_per_thread"]) == (5e-4, 2, 4)


@pytest.mark.row(n=28)
def test_program_that_resumes_a_run_gives_the_whole_config(play, tmp_path, monkeypatch, capsys):
    play(2, "--learning_rate=1e-3")
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    flags = {"log_dir": str(tmp_path), "device": "cpu", "num_threads": 1, "agents_per_thread": 4}
    assert a3c.train(a3c.Config(**flags, summary_period=2, save_period=3, max_iteration=4)) == 0
    assert "changed since the last run: learning_rate from 0.001 to 0.00025" in capsys.readouterr().out
    assert config_of(tmp_path)["history"][0]["was"]["learning_rate"] == 1e-3


@pytest.mark.row(n=28)
def test_run_of_an_older_version_keeps_its_settings(tmp_path):
    """The shipped agents' `config.json` does not say which of its settings were given."""
    given, saved = a3c.given_to_run(str(SHIPPED)), config_of(SHIPPED)
    assert {"learning_rate": 1e-4, "annealing": 250_000, "filters": 16, "random_seed": 1}.items() <= given.items()
    assert "log_dir" not in given
    config = dataclasses.asdict(a3c.Config(**given))
    assert all(config[name] == saved[name] for name in config if name in saved and name != "log_dir")


@pytest.mark.row(n=28)
def test_folder_without_a_checkpoint_gives_no_settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"game": "Pong-v0", "given": ["game"]}))
    assert a3c.given_to_run(str(tmp_path)) == {}


# Row 32: names and paths.

NAMES = ["run:1", "a[b]", "_x", "$x$", "grün", "a b", "per%cent", "-x", "back\\slash", "star*", "latin-\udce9"]


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that plot.py makes from now on."""
    made, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *words, **more: (made.append(self), save(self, *words, **more)))
    return made


def draw(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
    plot.main()


def shown(figure):
    return [
        text.get_text()
        for legend in (*figure.legends, *filter(None, [figure.axes[0].get_legend()]))
        for text in legend.get_texts()
    ]


@pytest.mark.row(n=32)
@pytest.mark.parametrize(
    "folders, expected",
    [
        (["a/Breakout-v0", "b/Breakout-v0"], ["a/Breakout-v0", "b/Breakout-v0"]),
        (["a/x/1", "b/x/1", "b/x/2"], ["a/x/1", "b/x/1", "b/x/2"]),
        (["_x", "y"], [" _x", "y"]),
        (["a$b", "c$d"], [r"a\$b", r"c\$d"]),
        (["latin-\udce9", "grün"], ["latin-?", "grün"]),
    ],
)
def test_every_run_has_its_curve_and_its_label(tmp_path, monkeypatch, figures, folders, expected):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(SHIPPED / "progress.csv", tmp_path / folder)
    draw(monkeypatch, *(tmp_path / folder for folder in folders), "--out", tmp_path)
    assert [shown(figure) for figure in figures] == [expected, expected]
    assert [len(figure.axes[0].lines) for figure in figures] == [2 * len(folders), len(folders)]


@pytest.mark.row(n=32)
def test_two_files_of_one_folder_and_two_references_of_one_name_are_all_drawn(tmp_path, monkeypatch, figures):
    for name in ("progress.csv", "before.csv"):
        shutil.copy(SHIPPED / "progress.csv", tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "points.csv").write_text("agent_steps,average_score\n1e6,100\n2e6,200\n")
    references = [tmp_path / "a/points.csv", tmp_path / "b/points.csv"]
    draw(monkeypatch, tmp_path / "progress.csv", tmp_path / "before.csv", "--reference", *references)
    assert shown(figures[0]) == [tmp_path.name, "before.csv", "points.csv", "points.csv"]


@pytest.mark.row(n=32)
def test_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch, figures):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert a3c.Config(log_dir="~/x").folder == f"{tmp_path}/x"
    shutil.copytree(SHIPPED, tmp_path / "run")
    assert checkpoint.resolve("~/run/last.ckpt") == checkpoint.resolve("~/run") == f"{tmp_path}/run/last.ckpt"
    draw(monkeypatch, "~/run", "--out=~/pictures")
    assert (tmp_path / "pictures/scores.png").exists()


@pytest.mark.row(n=32)
@pytest.mark.parametrize("name", NAMES)
def test_sound_checkpoint_is_read_from_any_folder_or_refused_for_its_name(tmp_path, name):
    shutil.copytree(SHIPPED, tmp_path / name)
    for path in (tmp_path / name, tmp_path / name / "last.ckpt"):
        if any(character in name for character in "*[]\\\udce9"):
            with pytest.raises(UserError, match=r"^model = .*: must be a path in UTF-8 without any of"):
                checkpoint.resolve(str(path))
            with pytest.raises(UserError, match=r"^log_dir = .*: must be a path in UTF-8 without any of"):
                a3c.Config(log_dir=str(path))
        else:
            assert checkpoint.load_network(checkpoint.resolve(str(path)), 4)[1] > 0
            assert a3c.Config(log_dir=str(path)).folder == str(path)


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Return a function that runs a3c-test.py in this process, with games of three screens."""

    def play_game(env, network, seed, policy, epsilon, film):
        env.reset(seed=seed)
        for _ in range(3):
            film and film(env.unwrapped.ale.getScreenRGB())
        return 2.0, []

    monkeypatch.setattr(watching, "play_game", play_game)

    def call(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["a3c-test.py", f"--model={SHIPPED}", "--device=cpu", "--iter=1", *flags])
        return watching.main()

    return call


@pytest.mark.row(n=32)
@pytest.mark.parametrize("name", ["run:1", "a[b]", "-x", "latin-\udce9"])
def test_results_and_video_go_into_a_folder_of_any_name(watch, tmp_path, name):
    sys.stdout.reconfigure(errors="backslashreplace")  # as the command does
    assert watch(f"--out={name}") == 0
    assert json.loads((tmp_path / name / "results.json").read_text())["scores"] == [2.0]
    with open(tmp_path / name / "play.mp4", "rb") as file, av.open(file) as video:
        assert len(list(video.decode(video=0))) == 3


@pytest.mark.row(n=32)
def test_folder_follows_a_game_that_is_changed_afterwards(tmp_path, monkeypatch):
    config = a3c.Config(device="cpu", num_threads=1, agents_per_thread=4, max_iteration=2)
    config.game = "Breakout-v4"
    monkeypatch.chdir(tmp_path)
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    assert a3c.train(config) == 0
    assert config_of(tmp_path / "log/Breakout-v4")["game"] == "Breakout-v4"
    assert not (tmp_path / "log/Breakout-v0").exists()


# Row 33: half-made things.


@pytest.mark.row(n=33)
def test_environment_of_a_failed_make_is_made_anew(tmp_path):
    """A Python without ensurepip leaves a folder without pip, and an error."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "a3c.py").write_text("print('it trains')")
    lacking = tmp_path / "python-without-ensurepip"
    lacking.write_text(f'#!/bin/sh\n"{sys.executable}" -m venv --without-pip .venv\nexit 1\n')
    lacking.chmod(0o755)
    nothing = {**os.environ, "PATH": "/usr/bin:/bin"}
    for python, expected in ((lacking, 2), (sys.executable, 0)):
        words = ["make", f"PYTHON={python}", "CUDA=", "train"]
        made = subprocess.run(
            words, cwd=tmp_path, env=nothing, capture_output=True, text=True, timeout=120, check=False
        )
        assert made.returncode == expected, made.stderr
    assert "it trains" in made.stdout


@contextlib.contextmanager
def watching_process(out, **options):
    """Run a3c-test.py for more games than it will end, and kill it at last."""
    flags = [f"--model={SHIPPED}", f"--out={out}", "--iter=100000", "--epsilon=1", "--device=cpu"]
    process = subprocess.Popen([sys.executable, "a3c-test.py", *flags], cwd=ROOT, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.row(n=33)
def test_games_played_until_a_kill_are_in_the_results_which_are_never_empty(tmp_path):
    with watching_process(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (tmp_path / "play.mp4").exists())
        assert not (tmp_path / "results.json").exists() or (tmp_path / "results.json").stat().st_size
        wait_for(lambda: (tmp_path / "results.json").exists())
        process.kill()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["scores"]) == len(results["seeds"]) == results["games"] >= 1


@pytest.mark.row(n=33)
def test_games_are_shown_at_once_and_go_on_where_the_reader_leaves(tmp_path):
    """`a3c-test.py | head -2`."""
    errors = tmp_path / "errors"
    with open(errors, "w") as file, watching_process(tmp_path, stdout=subprocess.PIPE, stderr=file) as process:
        for expected in ("Breakout-v0, ", "game 1: "):
            assert select.select([process.stdout], [], [], 60)[0]
            assert process.stdout.readline().startswith(expected)
        process.stdout.close()
        played = json.loads((tmp_path / "results.json").read_text())["games"]
        wait_for(lambda: json.loads((tmp_path / "results.json").read_text())["games"] > played)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    assert "Traceback" not in errors.read_text()
    assert "Exception" not in errors.read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["scores"]) == results["games"] > played


@pytest.mark.row(n=33)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda text: text.replace(",", ";").replace(".", ",").encode(),
        lambda text: text.replace(",", "\t").encode("utf-8-sig"),
        lambda text: (text + ",,,\n" + text.splitlines()[-1][:20]).encode(),  # and a row on its way
    ],
    ids=["marked", "semicolons", "tabs", "empty and unfinished rows"],
)
def test_curve_that_a_spreadsheet_saved_is_drawn_as_before(tmp_path, monkeypatch, figures, change):
    text = (SHIPPED / "progress.csv").read_text()
    (tmp_path / "progress.csv").write_bytes(change(text))
    draw(monkeypatch, SHIPPED, tmp_path, "--out", tmp_path)
    one, other = (line.get_xydata() for line in figures[0].axes[0].lines[::2])
    np.testing.assert_array_equal(one, other)


@pytest.mark.row(n=33)
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.encode("utf-16"), "cannot read"),
        (lambda text: text.replace("agent_steps", "steps", 1).encode(), "column agent_steps is missing"),
        (lambda text: text.replace(",0.44,", ",0.44 points,").encode(), "column average_score is not all numbers"),
        (lambda text: b"", "has no rows yet"),
        (lambda text: b"\x00" * 100, "progress.csv"),
    ],
)
def test_file_that_is_no_curve_is_named_in_one_line(tmp_path, monkeypatch, change, said):
    (tmp_path / "progress.csv").write_bytes(change((SHIPPED / "progress.csv").read_text()))
    with pytest.raises(SystemExit) as ended:
        draw(monkeypatch, tmp_path)
    (line,) = str(ended.value).splitlines()
    assert line.startswith("plot.py: error: ")
    assert said in line
    assert str(tmp_path) in line


# Row 34: the picture needs neither TensorFlow nor the backend that a notebook names.


@pytest.mark.row(n=34)
def test_pictures_need_neither_tensorflow_nor_the_backend_of_a_notebook(tmp_path):
    program = "import sys, plot; plot.main(); assert 'tensorflow' not in sys.modules"
    backend = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    words = [sys.executable, "-c", program, SHIPPED, "--out", tmp_path]
    subprocess.run(words, cwd=ROOT, env=backend, check=True, timeout=60)
    assert (tmp_path / "scores.png").exists()


# Row 37: what flickers, and how a game begins.


@pytest.mark.row(n=37)
def test_watching_does_with_frames_and_starts_as_the_run_did(watch, tmp_path, monkeypatch):
    shutil.copytree(SHIPPED, tmp_path / "run")
    asked = {"max_pool": True, "noop_max": 30, "fire_reset": True}
    (tmp_path / "run/config.json").write_text(json.dumps({**config_of(SHIPPED), **asked}))
    games, play_game = [], watching.play_game
    monkeypatch.setattr(watching, "play_game", lambda env, *others: (games.append(env), play_game(env, *others))[1])
    assert watch(f"--model={tmp_path}/run", "--out=out") == 0
    assert isinstance(games[0], environment.FrameByFrame)
    assert asked.items() <= games[0].game._asdict().items()
    assert asked.items() <= json.loads((tmp_path / "out/results.json").read_text()).items()
    assert watch("--out=out") == 0
    assert not isinstance(games[1], environment.FrameByFrame)


@pytest.mark.row(n=37)
def test_training_passes_on_what_a_frame_is_and_how_a_game_begins(tmp_path, main, monkeypatch):
    games = []
    monkeypatch.setattr(
        groups, "make_training_envs", lambda game, *_: (games.append(game), ScriptedEnv(np.zeros([5, 4])))[1]
    )
    flags = "--num_threads=1", "--max_iteration=1", "--max_pool=true", "--noop_max=30", "--fire_reset=true"
    status, output, errors = main(f"--log_dir={tmp_path}", *flags)
    assert status == 0, errors
    assert (games[0].max_pool, games[0].noop_max, games[0].fire_reset) == (True, 30, True)
    assert "maximum of two frames, up to 30 no-ops, FIRE at the start" in output


@pytest.mark.row(n=37)
@pytest.mark.parametrize("flag", ["--random_frameskip=true", "--frameskip=1"])
def test_maximum_of_two_frames_where_training_takes_single_ones_is_refused(tmp_path, main, no_training, flag):
    status, _, errors = main(f"--log_dir={tmp_path}", "--max_pool=true", "--num_threads=1", flag)
    assert status == 1
    assert errors.startswith("a3c.py: error: max_pool = True: ")
    assert len(errors.splitlines()) == 1


# Row 36: a user's own mistake.


@pytest.mark.row(n=36)
@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, KeyError])
@pytest.mark.parametrize("place", ["make_network", "Report"])
def test_exception_in_a_users_own_code_shows_its_traceback(tmp_path, main, monkeypatch, place, kind):
    def my_edit(*_):
        raise kind("my mistake")

    monkeypatch.setattr(a3c, place, my_edit)
    status, _, errors = main(f"--log_dir={tmp_path}", "--num_threads=1")
    assert status == 1
    assert errors.startswith("Traceback")
    assert "in my_edit" in errors
    assert kind.__name__ in errors.splitlines()[-1]
    assert "a3c.py: error" not in errors


@pytest.mark.row(n=36)
def test_own_refusal_in_a_thread_is_one_line(tmp_path, main, monkeypatch):
    def refuse(*_):
        raise UserError("no more room")

    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    monkeypatch.setattr(checkpoint.Saver, "save", refuse)
    status, _, errors = main(f"--log_dir={tmp_path}", "--num_threads=1", "--save_period=2")
    assert status == 1
    assert "Traceback" not in errors
    assert "a3c.py: error: no more room" in errors.splitlines()[-1]


@pytest.mark.row(n=36)
def test_exception_while_watching_shows_its_traceback(tmp_path, monkeypatch):
    def my_edit(*_):
        raise ValueError("my mistake")

    monkeypatch.setattr(checkpoint, "load_network", my_edit)
    monkeypatch.setattr(sys, "argv", ["a3c-test.py", f"--model={SHIPPED}", f"--out={tmp_path}", "--device=cpu"])
    with pytest.raises(ValueError, match=r"^my mistake$"):  # and not SystemExit
        runpy.run_path(str(ROOT / "a3c-test.py"), run_name="__main__")


@pytest.mark.row(n=36)
def test_field_without_a_comment_is_a_flag_all_the_same(tmp_path):
    copy = copy_with(tmp_path, "    save_period: int", "    my_own: float = 1.5\n    save_period: int")
    process = run_copy(copy, "--help")
    assert process.returncode == 0, process.stderr
    assert "--my_own" in process.stdout
