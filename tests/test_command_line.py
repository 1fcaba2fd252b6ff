"""Command lines and exit codes."""

import io
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from tests.scripts import closed_pipe, forked_scripts, script_of  # noqa: F401
from utils.command_line import exit_code, parse, positive, say
from utils.config import OPTIONS
from utils.errors import DivergenceError, InputError, Interrupted, LostProcessError

ROOT = Path(__file__).parents[1]
SCRIPT = """
import atexit, os, sys, time
from utils.command_line import exit_code
from utils.errors import *
def main():
    time.sleep(0.2)  # until the reader has gone
    raise {error}
{more}
sys.exit(exit_code(main))
"""


@pytest.mark.parametrize("words", [["--local-rank=1"], ["--local_rank=1"], ["--local-rank", "1"]], ids=" ".join)
def test_both_spellings_of_the_launcher_s_argument_are_accepted(words):
    args = parse("", [*words, "--cfg", "a.yaml", "lr", "0.1"])
    assert (args.local_rank, args.cfg, args.overrides) == (1, "a.yaml", ["lr", "0.1"])


@pytest.mark.parametrize("words", [[], ["lr", "-1", "lr_steps", "[3, 5]"], ["lr"]])
def test_everything_after_the_file_is_an_override(words):
    args = parse("", ["--cfg", "a.yaml", *words])
    assert args.overrides == words
    assert args.local_rank == 0


@pytest.mark.parametrize("words", [[], ["lr", "0.1"], ["--cfg"], ["--unknown", "1", "--cfg", "a.yaml"]])
def test_a_command_line_without_a_file_ends_with_code_2_and_one_line(words, capsys):
    assert exit_code(lambda: parse("", words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: command line: ")
    assert "--cfg FILE [key value ...]" in line


def test_an_option_may_be_written_as_other_trainers_have_it():
    words = ["--lr", "0.1", "seed=3", "--mixup=True", "data_path", "a=b", "lr_steps", "[1,2]"]
    args = parse("", ["--cfg", "a.yaml", *words, "--images=5"], OPTIONS, images={"type": int})
    assert args.overrides == ["lr", "0.1", "seed", "3", "mixup", "True", "data_path", "a=b", "lr_steps", "[1,2]"]
    assert args.images == 5


def test_an_unknown_option_is_named_with_the_nearest_one(capsys):
    assert exit_code(lambda: parse("", ["--cfg", "a.yaml", "--epochs", "3", "name", "x"], OPTIONS)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: command line: unknown option --epochs; the nearest known one is num_epochs (usage: ")


def test_the_file_may_come_after_the_overrides():
    args = parse("", ["lr", "0.1", "--cfg", "a.yaml", "alpha", "-1"])
    assert (args.cfg, args.overrides) == ("a.yaml", ["lr", "0.1", "alpha", "-1"])


def test_help_names_what_a_person_gives_and_hides_what_the_launcher_gives(capsys):
    with pytest.raises(SystemExit) as error:
        parse("Does a thing.", ["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "--cfg FILE" in text
    assert "key value" in text
    assert "local" not in text


@pytest.mark.parametrize(
    ("kind", "text", "value"), [(int, "3", 3), (float, "3", 3.0), (float, "0.5", 0.5), (int, "all", 99)]
)
def test_positive_numbers_and_words_are_read(kind, text, value):
    number = positive(kind, all=99)(text)
    assert number == value
    assert type(number) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"), [(int, "0"), (int, "-1"), (int, "1.5"), (int, ""), (int, "none"), (float, "0"), (float, "nan")]
)
def test_other_numbers_are_refused(kind, text):
    with pytest.raises(ArgumentTypeError, match=f"must be a .*number above 0, not '{text}'"):
        positive(kind)(text)
    with pytest.raises(ArgumentTypeError, match="must be all or a "):
        positive(kind, all=99)(text)


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("lr: must be\n  a number"), 2, "error: lr: must be a number\n"),
        (DivergenceError("epoch 3, step 4"), 2, "error: epoch 3, step 4\n"),
        (type("Derived", (InputError,), {})("wrong"), 2, "error: wrong\n"),
        (LostProcessError("gone"), 1, "error: gone\n"),
        (Interrupted(15, "epoch 3\n is saved"), 143, "stopped by SIGTERM: epoch 3 is saved\n"),
        (Interrupted(10), 138, "stopped by SIGUSR1\n"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT\n"),
    ],
    ids=repr,
)
def test_expected_errors_and_signals_have_a_code_and_one_line(capsys, error, code, line):
    def main():
        raise error

    assert exit_code(main) == code
    assert capsys.readouterr().err == line


def test_success_has_code_0_or_the_script_s_own_and_a_bug_is_not_caught():
    assert (exit_code(lambda: None), exit_code(lambda: 3)) == (0, 3)
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


@pytest.mark.parametrize(("error", "code"), [("InputError('x')", 2), ("Interrupted(15)", 143)])
def test_the_exit_code_stays_if_standard_error_is_closed(scripts, tmp_path, error, code):
    script = script_of(tmp_path, SCRIPT.format(error=error, more=""))
    with closed_pipe(tmp_path / "pipe") as pipe, scripts.alive(tmp_path, script, err=pipe) as run:
        assert run.process.wait(20) == code


def test_further_signals_do_not_change_the_exit_code(scripts, tmp_path):
    more = "atexit.register(lambda: [os.kill(os.getpid(), 15), time.sleep(0.1)])"
    assert scripts.run(script_of(tmp_path, SCRIPT.format(error="Interrupted(10)", more=more))).code == 138


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_output_takes_any_character(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert exit_code(lambda: say("写真", "plain")) == 0
    assert raw.getvalue() == b"\\u5199\\u771f\nplain\n"


def test_output_that_the_caller_has_closed_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code(lambda: say("a line")) == 0
    assert exit_code(failing) == 2


def failing():
    raise InputError("wrong")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is full is /dev/full")
def test_a_full_standard_output_is_said_once_and_ends_nothing(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(lambda: [say("1"), say("2")].count(0)) == 0
    said = "warning: standard output cannot be written (No space left on device); what follows is discarded\n"
    assert capsys.readouterr().err == said


def test_another_project_s_package_of_the_same_name_is_named(tmp_path):
    foreign = tmp_path / "datasets" / "__init__.py"
    foreign.parent.mkdir()
    foreign.touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "utils.compare", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = f"error: `datasets` is {foreign}, not this project's: run from this project's folder, or put it first in "
    assert (done.returncode, done.stderr, done.stdout) == (2, said + "PYTHONPATH\n", "")


@pytest.mark.parametrize("script", ["train_stage1.py", "eval.py"])
def test_help_and_refusals_come_before_torch_is_imported(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("WORLD_SIZE", None)
    digits = "config/digits/digits_imb005.yaml"
    for words, code, said in (
        (["--help"], 0, "  post_hoc_tau            0.0"),
        (["--cfg", digits, "lr", "much"], 2, "error: command line: lr: 'much' must be a number > 0\n"),
        (["--cfg", "none.yaml"], 2, "error: none.yaml: no such configuration file"),
        (["--cfg", digits], 1, "torch was imported"),
    ):
        done = subprocess.run([sys.executable, ROOT / script, *words], env=environment, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done
