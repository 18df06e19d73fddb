"""Rows of `docs/reliability.md` about files, names and settings: resumed, watched and drawn as their user means it."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import types

import av
import numpy as np
import pytest
from conftest import OLD, ROOT, SHIPPED, Resumable, ScriptedEnv, config_of, ended, refusal, use_games, watching

import a3c
import checkpoint
import environment
import groups
from startup import UserError


@pytest.mark.row(n=28)
def test_resumed_run_keeps_its_settings_and_a_flag_beats_them_and_the_old_ones_stay_on_record(play, tmp_path):
    play("--max_iteration=2", "--learning_rate=1e-3", "--grad_clip=None")
    _, output, _ = play("--max_iteration=4")
    assert "learning_rate = 0.001" in output
    assert "changed since the last run: learning_rate" not in output
    _, output, _ = play("--max_iteration=6", "--learning_rate=2e-3", "--decay=0.9")
    assert "changed since the last run: learning_rate from 0.001 to 0.002" in output
    config = config_of(tmp_path / "run")
    assert (config["learning_rate"], config["grad_clip"], config["decay"]) == (2e-3, None, 0.9)
    assert config["history"] == [
        {"iteration": 2, "agent_steps": 40, "was": {"max_iteration": 2}},
        {"iteration": 4, "agent_steps": 80, "was": {"max_iteration": 4, "learning_rate": 1e-3, "decay": 0.99}},
    ]


@pytest.mark.row(n=28)
@pytest.mark.row(n=36)
def test_default_that_the_user_edits_counts_for_a_resumed_run_as_does_a_new_field(trained_copy, tmp_path):
    text = (ROOT / "a3c.py").read_text().replace(" = 2.5e-4", " = 5e-4")
    (tmp_path / "a3c.py").write_text(text.replace("    summary_period", "    my_own: float = 1.5\n    summary_period"))
    words = [sys.executable, tmp_path / "a3c.py", f"--log_dir={trained_copy}", "--max_iteration=8", "--my_own=2.5"]
    status, output, errors = ended(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert status == 0, errors
    assert "changed since the last run: learning_rate from 0.00025 to 0.0005" in output
    wanted = {"learning_rate": 5e-4, "my_own": 2.5, "num_threads": 2, "agents_per_thread": 4}
    assert wanted.items() <= config_of(trained_copy).items()


@pytest.mark.row(n=28)
def test_program_that_resumes_a_run_gives_the_whole_config(play, tmp_path, monkeypatch, capsys):
    play("--max_iteration=2", "--learning_rate=1e-3")
    use_games(monkeypatch, ScriptedEnv(np.zeros([5, 4])))
    small = {"device": "cpu", "num_threads": 1, "agents_per_thread": 4, "filters": 4}
    config = a3c.Config(log_dir=f"{tmp_path}/run", max_iteration=4, **small)
    assert a3c.train(config) == 0
    assert "changed since the last run: learning_rate from 0.001 to 0.00025" in capsys.readouterr().out
    assert config_of(tmp_path / "run")["history"][0]["was"]["learning_rate"] == 1e-3


@pytest.mark.row(n=28)
def test_run_of_an_older_version_keeps_its_settings_and_a_folder_without_a_checkpoint_gives_none(tmp_path):
    """Old ones count their schedules in updates, and do not say which of their settings were given."""
    old = {**config_of(OLD), "annealing": 250_000, "save_period": 20_000}
    del old["annealing_steps"], old["save_steps"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert a3c.given_to_run(str(tmp_path)) is None
    Resumable(tmp_path, filters=1).save(3)
    given = a3c.given_to_run(str(tmp_path))
    wanted = {"annealing_steps": 40_000_000, "save_steps": 3_200_000, "learning_rate": 1e-4, "filters": 16}
    assert wanted.items() <= given.items()
    assert "log_dir" not in given
    (tmp_path / "config.json").write_text(json.dumps({**config_of(OLD), "given": []}))
    assert a3c.given_to_run(str(tmp_path)) == {}  # an edited default counts
    old |= {"given": ["annealing", "filters"], "annealing": None, "max_agent_steps": None, "max_iteration": 1000}
    (tmp_path / "config.json").write_text(json.dumps(old))
    given = a3c.given_to_run(str(tmp_path))
    assert (given["max_agent_steps"], given["filters"], "learning_rate" in given) == (160_000, 16, False)
    assert a3c.Config(**given).learning_rate_at(80_000) == pytest.approx(2.5e-5)


@pytest.mark.row(n=28)
@pytest.mark.parametrize(
    "annealing_steps, falls, expected", [(1000, True, 1000), (None, True, 4000), (1000, False, None)]
)
def test_run_whose_entropy_fell_along_with_the_learning_rate_keeps_its_schedule(
    tmp_path, annealing_steps, falls, expected
):
    Resumable(tmp_path, filters=1).save(3)
    old = {**config_of(OLD), "max_agent_steps": 8000, "annealing_steps": annealing_steps, "anneal_entropy": falls}
    old.pop("given", None)
    for given in {}, {"given": ["anneal_entropy"]}:
        (tmp_path / "config.json").write_text(json.dumps(old | given))
        assert a3c.given_to_run(str(tmp_path)).get("entropy_annealing_steps") == expected


@pytest.mark.row(n=28)
def test_run_of_another_game_is_resumed_in_the_folder_that_was_asked_for(main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    games = []
    monkeypatch.setattr(groups.Groups, "run", lambda self, game, _: (games.append(game.id), self.saver.save(), 0)[-1])
    assert main("--game=Pong-v0", "--log_dir=log/Breakout-v0")[0] == 0
    assert main()[0] == 0
    assert games == ["Pong-v0", "Pong-v0"]
    assert os.listdir("log") == ["Breakout-v0"]


@pytest.mark.row(n=28)
def test_flag_with_which_a_run_cannot_go_on_does_not_stay_with_it(trained_copy, main, monkeypatch):
    before = config_of(trained_copy)

    def too_many(*_):
        raise MemoryError

    monkeypatch.setattr(groups, "make_training_envs", too_many)
    assert main(f"--log_dir={trained_copy}", "--agents_per_thread=4000", "--max_iteration=9")[0] == 1
    assert config_of(trained_copy) == before


@pytest.mark.row(n=33)
def test_new_run_does_not_write_over_the_table_and_the_settings_of_one_whose_checkpoints_are_gone(trained_copy, play):
    before = {name: (trained_copy / name).read_text() for name in ("progress.csv", "config.json")}
    for path in trained_copy.glob("*.ckpt*"):
        path.unlink()
    (trained_copy / "config.json.1").touch()
    (trained_copy / "evaluation.csv").write_text("of games that its saves have played")
    status, output, _ = play("--max_iteration=2")
    assert status == 0
    for name, text in before.items():
        assert (trained_copy / f"{name}.2").read_text() == text
        assert f"{trained_copy}/{name} is of a run whose checkpoints are gone: renamed to" in output
    assert not (trained_copy / "evaluation.csv").exists()
    assert config_of(trained_copy)["history"] == []
    assert "renamed" not in play("--max_iteration=3")[1]


@pytest.mark.row(n=33)
@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[" * 10_000,
        '{"game": 5}',
        '{"game": "a", "given": 5}',
        '{"game": "a", "given": [["a"]]}',
        '{"game": "a", "history": {}}',
    ],
)
def test_settings_that_something_else_has_changed_are_named(trained_copy, main, no_training, content):
    (trained_copy / "config.json").write_text(content)
    line = refusal(main(f"--log_dir={trained_copy}"))
    assert line.startswith(f"cannot read {trained_copy}/config.json: ")
    assert line.endswith(". Move it away to go on without what it says")
    (trained_copy / "config.json").unlink()
    _, output, _ = main(f"--log_dir={trained_copy}", "--max_iteration=1", "--agents_per_thread=4")
    assert f"there is no {trained_copy}/config.json: what the run was given is not known" in output


def shown(figure):
    legends = [*figure.legends, *filter(None, [figure.axes[0].get_legend()])]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.row(n=32)
@pytest.mark.parametrize(
    "files, expected",
    [
        (["a/Breakout-v0", "b/Breakout-v0"], ["a/Breakout-v0", "b/Breakout-v0"]),
        (["a/x/1", "b/x/1", "b/x/2"], ["a/x/1", "b/x/1", "b/x/2"]),
        (["a", "a/before.csv"], ["a", "a/before.csv"]),
        (["_x", "y"], [" _x", "y"]),
        (["a$b", "c$d"], [r"a\$b", r"c\$d"]),
        (["latin-\udce9", "grün"], ["latin-?", "grün"]),
    ],
)
def test_every_run_has_its_curve_and_its_label(tmp_path, draw, figures, files, expected):
    for path in files:
        path = tmp_path / path / ("" if path.endswith(".csv") else "progress.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIPPED / "progress.csv", path)
    draw(*(tmp_path / path for path in files), "--out", tmp_path)
    assert [shown(figure) for figure in figures] == [expected, expected]
    assert [len(figure.axes[0].lines) for figure in figures] == [2 * len(files), len(files)]


@pytest.mark.row(n=32)
def test_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch, draw):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert a3c.Config(log_dir="~/x").folder == f"{tmp_path}/x"
    shutil.copytree(SHIPPED, tmp_path / "run")
    assert checkpoint.resolve("~/run/last.ckpt") == checkpoint.resolve("~/run") == f"{tmp_path}/run/last.ckpt"
    draw("~/run", "--out=~/pictures")
    assert (tmp_path / "pictures/scores.png").exists()


NAMES = ["run:1", "a[b]", "_x", "$x$", "grün", "a b", "per%cent", "-x", "back\\slash", "star*", "latin-\udce9"]


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
    """Return a function that runs a3c-test.py in tmp_path and in this process, with games of three screens."""

    def play_game(env, seed, policy, epsilon, film=None):
        yield env.reset(seed=seed)[0], True, 0
        for _ in range(3):
            film and film(types.SimpleNamespace(screen=env.unwrapped.ale.getScreenRGB()))
        return 2.0, []

    def call(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["a3c-test.py", f"--model={SHIPPED}", "--device=cpu", "--iter=1", *flags])
        return watching.main()

    monkeypatch.setattr(watching, "play_game", play_game)
    return call


@pytest.mark.row(n=32)
@pytest.mark.parametrize("name", ["run:1", "a[b]", "-x", "latin-\udce9"])
def test_results_and_video_go_into_a_folder_of_any_name(watch, tmp_path, name):
    sys.stdout.reconfigure(errors="backslashreplace")  # as the command does
    assert watch(f"--out={name}") == 0
    assert json.loads((tmp_path / name / "results.json").read_text())["scores"] == [2.0]
    with open(tmp_path / name / "play.mp4", "rb") as file, av.open(file) as video:
        assert len(list(video.decode(video=0))) == 3


@pytest.mark.row(n=33)
def test_environment_of_a_failed_make_is_made_anew(tmp_path):
    """A Python without ensurepip leaves a folder without pip, and an error."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "a3c.py").write_text("print('it trains')")
    lacking = tmp_path / "python-without-ensurepip"
    lacking.write_text(f'#!/bin/sh\n"{sys.executable}" -m venv --without-pip .venv\nexit 1\n')
    lacking.chmod(0o755)
    for python, expected in ((lacking, 2), (sys.executable, 0)):
        words = ["make", f"PYTHON={python}", "CUDA=", "train"]
        status, output, errors = ended(words, cwd=tmp_path, env={**os.environ, "PATH": "/usr/bin:/bin"})
        assert status == expected, errors
    assert "it trains" in output


@pytest.mark.row(n=33)
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), pytest.param(9, -9, marks=pytest.mark.slow)])
def test_games_go_on_where_the_reader_leaves_and_those_played_until_a_kill_are_in_the_results(tmp_path, number, status):
    """`a3c-test.py | head -2`, ended later."""

    def played():
        return json.loads((tmp_path / "results.json").read_text())["games"]

    flags = [f"--model={SHIPPED}", f"--out={tmp_path}", "--iter=100000", "--epsilon=1", "--frameskip=12"]
    words, errors = [sys.executable, "a3c-test.py", "--device=cpu", *flags], tmp_path / "errors"
    with (
        open(errors, "w") as file,
        subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=file) as process,
    ):
        try:
            for expected in ("Breakout-v0, ", "game "):
                assert select.select([process.stdout], [], [], 60)[0]
                assert process.stdout.readline().startswith(expected)
            process.stdout.close()
            before = played()
            end = time.monotonic() + 60
            while played() == before:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(timeout=10) == status
        finally:
            process.kill()
    assert "Traceback" not in errors.read_text() and "Exception" not in errors.read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["scores"]) == len(results["seeds"]) == results["games"] > before >= 1


@pytest.mark.row(n=33)
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), None),
        (lambda text: (text + ",,,\n" + text.splitlines()[-1][:20]).encode(), None),  # and a row on its way
        (lambda text: text.replace(",", ";").replace(".", ",").encode(), "column agent_steps is missing"),
        (lambda text: text.replace(",", "\t").encode("utf-8-sig"), "column agent_steps is missing"),
        (lambda text: text.replace("agent_steps", "steps", 1).encode(), "column agent_steps is missing"),
        (lambda text: text.replace(",0.44,", ",0.44 points,").encode(), "column average_score is "),
        (lambda text: text.encode("utf-16"), "cannot read"),
        (lambda text: b"", "has no rows yet"),
        (lambda text: b"\x00" * 100, "progress.csv"),
    ],
)
def test_curve_that_a_spreadsheet_saved_is_drawn_as_before_or_named(tmp_path, draw, figures, change, said):
    (tmp_path / "progress.csv").write_bytes(change((OLD / "progress.csv").read_text()))
    if said:
        with pytest.raises(SystemExit) as ended:
            draw(tmp_path)
        (line,) = str(ended.value).splitlines()
        assert line.startswith("plot.py: error: ")
        assert said in line
        assert str(tmp_path) in line
    else:
        draw(OLD, tmp_path, "--out", tmp_path)
        one, other = (line.get_xydata() for line in figures[0].axes[0].lines[::2])
        np.testing.assert_array_equal(one, other)


@pytest.mark.row(n=34)
def test_pictures_need_neither_tensorflow_nor_the_backend_of_a_notebook(tmp_path):
    program = "import sys, plot; plot.main(); assert 'tensorflow' not in sys.modules"
    backend = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    status, _, errors = ended([sys.executable, "-c", program, SHIPPED, "--out", tmp_path], env=backend)
    assert status == 0, errors
    assert (tmp_path / "scores.png").exists()


ASKED = {"max_pool": True, "noop_max": 30, "fire_reset": True}


@pytest.mark.row(n=37)
def test_watching_does_with_frames_and_starts_as_the_run_did(watch, tmp_path, monkeypatch):
    shutil.copytree(SHIPPED, tmp_path / "run")
    asked = {**ASKED, "frameskip": 5}
    (tmp_path / "run/config.json").write_text(json.dumps({**config_of(SHIPPED), **asked}))
    games, play_game = [], watching.play_game
    monkeypatch.setattr(watching, "play_game", lambda env, *others: (games.append(env), play_game(env, *others))[1])
    assert watch(f"--model={tmp_path}/run", "--out=out") == 0
    assert isinstance(games[0], environment.FrameByFrame)
    assert asked.items() <= games[0].game._asdict().items()
    assert asked.items() <= json.loads((tmp_path / "out/results.json").read_text()).items()
    assert watch("--out=out") == 0
    assert not isinstance(games[1], environment.FrameByFrame)


@pytest.mark.row(n=33)
def test_settings_by_which_nothing_can_be_watched_are_named(watch, tmp_path, capsys):
    shutil.copytree(SHIPPED, tmp_path / "run")
    (tmp_path / "run/config.json").write_text(json.dumps({**config_of(SHIPPED), "noop_max": -5}))
    assert watch(f"--model={tmp_path}/run", "--out=out") == 1
    assert "noop_max = -5: must be a whole number from 0" in capsys.readouterr().err


@pytest.mark.row(n=37)
def test_training_does_with_frames_and_starts_as_asked_or_refuses():
    game, _ = a3c.game_and_device(a3c.Config(device="cpu", **ASKED))
    assert ASKED.items() <= game._asdict().items()
    assert "maximum of two frames, up to 30 no-ops, FIRE at the start" in game.describe()
    for single_frames in ({"random_frameskip": True}, {"frameskip": 1}):
        with pytest.raises(UserError, match=r"^max_pool = True: "):
            a3c.game_and_device(a3c.Config(max_pool=True, **single_frames))


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
def test_exception_while_watching_shows_its_traceback(watch, monkeypatch):
    def my_edit(*_):
        raise ValueError("my mistake")

    monkeypatch.setattr(checkpoint, "load_network", my_edit)
    with pytest.raises(ValueError, match=r"^my mistake$"):
        watch()
