"""The scripts' command line and their exit codes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import eval as eval_script
import train_stage1
from utils.command_line import exit_code, parse
from utils.errors import DivergenceError, InputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "words",
    [["--local-rank=1"], ["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]],
    ids=" ".join,
)
def test_both_spellings_of_the_launcher_s_argument_are_accepted(words):
    args = parse("", [*words, "--cfg", "a.yaml", "lr", "0.1"])
    assert (args.local_rank, args.cfg, args.overrides) == (1, "a.yaml", ["lr", "0.1"])


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ([], []),
        (["lr", "0.1", "seed", "1"], ["lr", "0.1", "seed", "1"]),
        (["lr", "-1"], ["lr", "-1"]),
        (["lr_steps", "[3, 5]"], ["lr_steps", "[3, 5]"]),
        (["lr"], ["lr"]),
    ],
)
def test_everything_after_the_file_is_an_override(words, overrides):
    args = parse("", ["--cfg", "a.yaml", *words])
    assert args.overrides == overrides
    assert args.local_rank == 0


@pytest.mark.parametrize("words", [[], ["lr", "0.1"], ["--cfg"], ["--unknown", "1", "--cfg", "a.yaml"]])
def test_a_command_line_without_a_file_ends_with_code_2_and_one_line(words, capsys):
    assert exit_code(lambda: parse("", words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: command line: ")
    assert "--cfg FILE [key value ...], such as lr 0.05" in line


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


def run_in_a_process(statement):
    script = (
        "import sys\n"
        "from utils.command_line import exit_code\n"
        "from utils.errors import DivergenceError, InputError, Interrupted\n"
        f"def main():\n    {statement}\n"
        "sys.exit(exit_code(main))\n"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("raise InputError('lr: must be\\n  a number')", "error: lr: must be a number\n"),
        ("raise DivergenceError('epoch 3, step 4')", "error: epoch 3, step 4\n"),
    ],
)
def test_bad_input_and_bad_numbers_end_with_code_2_and_one_line(statement, line):
    done = run_in_a_process(statement)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("raise Interrupted(15, 'epoch 3\\n is kept')", 143, "stopped by SIGTERM: epoch 3 is kept\n"),
        ("raise Interrupted(10)", 138, "stopped by SIGUSR1\n"),
        ("raise KeyboardInterrupt", 130, "stopped by SIGINT\n"),
    ],
)
def test_signals_end_with_128_and_their_number(statement, code, line):
    done = run_in_a_process(statement)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


@pytest.mark.parametrize("error", ["InputError('x')", "Interrupted(15)"])
def test_the_exit_code_stays_where_nobody_hears_the_line(error):
    body = f"def main():\n    raise {error}\nsys.exit(exit_code(main))"
    script = f"import sys\nfrom utils.command_line import exit_code\nfrom utils.errors import *\n{body}"
    with socket.socketpair()[0].makefile("wb") as nobody:  # the other end is closed at once
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=nobody, timeout=60)
    assert done.returncode == (2 if "Input" in error else 143)


def test_further_signals_do_not_change_the_exit_code():
    script = (
        "import atexit, os, sys, time\nfrom utils.command_line import exit_code\nfrom utils.errors import Interrupted\n"
        "def main():\n    raise Interrupted(10)\n"
        "atexit.register(lambda: [os.kill(os.getpid(), 15), time.sleep(0.1)])\nsys.exit(exit_code(main))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60).returncode == 138


def test_success_ends_with_code_0_and_a_fault_of_the_program_with_its_traceback():
    done = run_in_a_process("print('done')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    done = run_in_a_process("raise ValueError('a fault')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("error", [InputError, DivergenceError])
def test_errors_derived_from_ours_are_caught_too(error, capsys):
    def main():
        raise type("Derived", (error,), {})("what is wrong")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: what is wrong\n"


@pytest.mark.parametrize("script", [train_stage1, eval_script], ids=["train_stage1", "eval"])
@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--cfg", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--cfg", "config/digits/base.yaml", "lr"], "'lr' stands alone"),
        (["--cfg", "config/digits/base.yaml", "lrr", "1"], "unknown key 'lrr'"),
        (["--cfg", "config/digits/base.yaml", "lr", "-1"], "lr: -1 must be a number > 0"),
        (["--cfg", "config/digits/base.yaml", "dataset", "digit"], "digits"),
        (["--cfg", "config/digits/base.yaml", "backbone", "resnet33"], "resnet32"),
        (["--cfg", "config/digits/base.yaml", "loss", "arbb"], "focal_arb"),
        (["--cfg", "config/digits/base.yaml", "class_counts", "none"], "global"),
        (["--cfg", "config/digits/base.yaml", "resume", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_the_scripts_refuse_bad_input_in_one_line_and_make_no_folder(
    script, words, fragment, capsys, monkeypatch, tmp_path
):
    words[1] = str(ROOT / words[1])
    monkeypatch.chdir(tmp_path)
    assert exit_code(lambda: script.main(words)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_run_as_a_script_ends_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train_stage1.py"), "--local-rank=0", "--cfg", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.yaml: ")
    assert done.stderr.count("\n") == 1
