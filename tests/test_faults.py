"""What may go wrong: runs that something ends, disks that are full, and bad input of every kind.

Runs that are stopped (signals, a kill at any moment, a lost launcher) and resumed equal one that nothing has disturbed,
bit for bit. Bad input ends with exit code 2 and one line that names what is wrong, and leaves no run behind; what only
looks wrong (Unicode, spaces, CRLF, an empty class, a class with one image) simply works. Real processes, real files.
"""

import contextlib
import ctypes
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
import train_stage1
from datasets.image_list import read_image_list, scan_image_list
from datasets.source import DataError
from tests.bad_inputs import (
    CHECKPOINTS,
    DIGITS,
    FLAT_BOMB,
    FOLDER,
    IMAGENET,
    INA,
    JPEG_BOMB,
    TABLE,
    annotations,
    checkpoint,
    folders,
    hostile,
    image,
    listed,
    write,
)
from tests.conftest import ARB, ROOT, SHORT, assert_same_run, assert_same_tensors, content, current, failure, log_of
from tests.scripts import (
    VARIABLES,
    Scripts,
    assert_nothing_left,
    catches_sigterm,
    closed_pipe,
    completed,
    ended,
    forked_scripts,  # noqa: F401
    kill_all,
    processes_of,
    ranks_of,
    script_of,
    started,
    until,
)

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
SMALL = ["device", "cpu", *SHORT, "batch_size", 32, "lr", 0.05, "print_freq", 2, "checkpoint_every_steps", 2]
STEPS = 15  # of an epoch
LONG = 200  # epochs of the runs that are stopped: more than all those lives get through on a fast machine
MANY = 30  # of those that are stopped many times and then end
KILLS = 20
FULL = Path("/dev/full")  # every write fails with ENOSPC
STOPPED = re.compile(r"^stopped by (\w+): epoch (\d+), (\d+) of 15 steps, .*?: (\S+ .*train_stage1\.py .*)$", re.M)
MEANWHILE = "Epoch: [0][ 2/15]"  # a line of a run that has trained, and has a long way to go

needs_full = pytest.mark.skipif(not FULL.exists(), reason="the disk that is full is /dev/full")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here as in all processes that are started, or they could not be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def training(folder: Path, *overrides: object) -> list[object]:
    return ["train_stage1.py", "--cfg", ARB, *SMALL, "save_dir", folder / "saved", *overrides]


def train_here(words: Sequence[object]) -> None:
    train_stage1.main([str(word) for word in words[1:]])


def printed_command(said: str) -> list[str]:
    """The command that one stopped run printed, in words that follow "python"."""
    (stop,) = STOPPED.findall(said)
    first, *words = shlex.split(stop[-1])
    assert first in ("python", "torchrun")
    return words if first == "python" else ["-m", "torch.distributed.run", *words]


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left


def only_run(folder: Path) -> Path:
    """The folder of the one run; attempts that ended before their first checkpoint left others."""
    (run,) = (path.parents[1] for path in (folder / "saved").glob("*/ckps/current.pth.tar"))
    return run


def repeated_lines(run: Path) -> list[str]:
    """The lines that an epoch writes, without times; a finished run that is resumed says the last two again."""
    lines = re.findall(r"^\S+ \S+ ((?:Epoch: \[|\* Acc@1|\* ECE).*)$", log_of(run), re.M)
    lines = [re.sub(r"\tTime +[\d.]+", "", line) for line in lines]
    return lines[:-2] if lines[-4:-2] == lines[-2:] else lines


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value), ...] as TensorBoard shows it."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_as_if_nothing_had_happened(run: Path, undisturbed: Path) -> None:
    """Weights, momentum, rows, predictions, log, TensorBoard, the best checkpoint and the table."""
    assert_same_run(undisturbed, run)
    best, wanted = content(run, "model_best"), content(undisturbed, "model_best")
    assert best["epoch"] == wanted["epoch"]
    assert_same_tensors(best["state_dict_model"], wanted["state_dict_model"])
    assert repeated_lines(run) == repeated_lines(undisturbed)
    shown, wanted = curves(run), curves(undisturbed)
    assert shown == wanted
    epochs = list(range(len((undisturbed / "metrics.jsonl").read_text().splitlines())))
    assert [step for step, _ in shown["top1/test"]] == epochs
    tables = [json.loads((folder / "summary.json").read_text()) for folder in (run, undisturbed)]
    assert tables[0] == tables[1]
    assert not [path for path in run.rglob(".*") if path.suffix == ".part"]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """The folder of a run of two epochs, made in this process; tests do not write into it."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("two")
    train_here(training(folder, "num_epochs", 2))
    return only_run(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Moments: by what the run has done, so that a life gets somewhere on a slow machine too, and then at random


def alive(scripts: Scripts, folder: Path, command: Sequence[object]) -> contextlib.AbstractContextManager:
    """The command with a launcher as from the shell, any other forked."""
    return started(folder, *command) if command[0] == "-m" else scripts.alive(folder, *command)


@pytest.fixture(scope="module", params=[[], TWO], ids=["one process", "two processes"])
def undisturbed(request, scripts, tmp_path_factory) -> SimpleNamespace:
    """A long run that nothing disturbs, and its launcher; tests do not write into its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with alive(scripts, folder, [*request.param, *training(folder, "num_epochs", MANY)]) as run:
        done = ended(run)
    assert done.code == 0, done.err
    return SimpleNamespace(run=only_run(folder), launcher=request.param)


def newest(folder: Path) -> tuple[int, int] | None:
    """Which checkpoint the newest is that lies there."""
    kept = [path.stat() for path in (folder / "saved").glob("*/ckps/current.pth.tar")]
    return max(((file.st_mtime_ns, file.st_ino) for file in kept), default=None)


def sometime(chance: random.Random, folder: Path, run: SimpleNamespace, kind: str, start_up: float) -> bool:
    """Sleeps until a random moment of that kind; False where the run ends first.

    "start-up": within ``start_up`` seconds; "training": up to 0.4 seconds (steps, evaluation, writing) after one to
    three checkpoints; "writing": while a checkpoint is written.
    """
    if kind == "start-up":
        time.sleep(chance.uniform(0, start_up))
        return run.process.poll() is None
    for _ in range(chance.randint(1, 3)):
        before = newest(folder)
        if not until(lambda before=before: newest(folder) not in (None, before), run):
            return False
    if kind == "writing":
        parts = (folder / "saved").glob
        return until(lambda: any(parts("*/ckps/.current.pth.tar.part")), run)
    time.sleep(chance.uniform(0, 0.4))
    return run.process.poll() is None


def kill(victim: str, folder: Path, run: SimpleNamespace) -> None:
    """SIGKILL to "all", to the "launcher" alone or to one "rank"; the others have to end by themselves."""
    if victim == "all":
        run.process.kill()  # first, or it would say that its processes have ended
        kill_all(folder)
    elif victim == "launcher":
        run.process.kill()
    else:
        os.kill(ranks_of(folder, run.process.pid)[victim], signal.SIGKILL)
    run.process.wait(60)
    assert_nothing_left(folder, 5 if victim == "all" else 60)


def test_a_killed_run_equals_one_that_never_was(scripts, two_epochs, tmp_path):
    """In the middle of an epoch, after a checkpoint within it."""
    command = training(tmp_path, "num_epochs", 2, "resume", "auto")
    with scripts.alive(tmp_path, *command) as run:
        assert until(lambda: "Epoch: [0][ 4/15]" in run.out(), run)
        run.process.kill()
        assert run.process.wait() == -signal.SIGKILL
    assert content(only_run(tmp_path))["epoch"] < 2
    in_a_later_second(command[1:])
    assert_as_if_nothing_had_happened(only_run(tmp_path), two_epochs)


@pytest.mark.soak
def test_a_run_that_is_killed_twenty_times_equals_one_that_never_was(scripts, undisturbed, tmp_path):
    """All of it, only the launcher or only one rank: the others end by themselves within a minute."""
    chance, lives = random.Random(1), []
    command = [*undisturbed.launcher, *training(tmp_path, "num_epochs", MANY, "resume", "auto")]
    victims, start_up = (["all", "launcher", "0", "1"], 8) if undisturbed.launcher else (["all"], 1)
    for number in range(KILLS):
        kind = ("start-up", "training", "writing", "training", "training")[number % 5]
        victim = "all" if kind == "start-up" else victims[number % len(victims)]
        with alive(scripts, tmp_path, command) as run:
            assert sometime(chance, tmp_path, run, kind, start_up), f"ended too soon: {run.out()} {run.err()}"
            kill(victim, tmp_path, run)
            if victim in ("all", "launcher"):
                assert run.process.returncode == -signal.SIGKILL  # it had not ended by itself
            resumed = re.search(r"after \d+ epochs and \d+ steps", run.out()) is not None
            writing = any((tmp_path / "saved").glob("*/ckps/.*.part"))
            lives.append(("Epoch: [" in run.out(), resumed, writing))
    with alive(scripts, tmp_path, command) as run:
        done = ended(run)
    assert done.code == 0, done.err
    began, resumed, writing = map(sum, zip(*lives, strict=True))
    assert began >= KILLS // 2 and resumed >= KILLS // 3 and writing
    assert_nothing_left(tmp_path)
    assert_as_if_nothing_had_happened(only_run(tmp_path), undisturbed.run)


def test_the_readers_of_a_killed_run_end_by_themselves(scripts, tmp_path):
    command = training(tmp_path, "num_epochs", LONG, "data_on_device", False, "workers", 2)
    with scripts.alive(tmp_path, *command) as run:
        assert until(lambda: MEANWHILE in run.out(), run)
        assert len(processes_of(tmp_path)) >= 3
        run.process.kill()
        run.process.wait(10)
        assert_nothing_left(tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "handlers"])
def test_ranks_whose_launcher_is_killed_before_they_meet_end_within_a_minute(tmp_path, moment):
    with started(tmp_path, *TWO, *training(tmp_path, "num_epochs", LONG)) as run:
        launcher = run.process.pid
        assert until(lambda: {"0", "1"} <= ranks_of(tmp_path, launcher).keys(), run)
        first = ranks_of(tmp_path, launcher)["0"]
        assert until(lambda: moment == "imports" or catches_sigterm(first), run)
        kill("launcher", tmp_path, run)


# ---------------------------------------------------------------------------------------------------------------------
# Signals that ask a run to end


def stop(folder: Path, run: SimpleNamespace, pid: int, number: int) -> None:
    """Sends the signal and waits for the end: within 20 seconds, with a checkpoint, and nothing left."""
    began = time.monotonic()
    os.kill(pid, number)
    run.process.wait(60)
    assert time.monotonic() - began < 20
    assert newest(folder) is not None
    assert_nothing_left(folder, 5)


@pytest.mark.soak
def test_a_run_that_is_stopped_five_times_equals_one_that_never_was(scripts, undisturbed, tmp_path):
    """By SIGTERM; each life by the command that the one before printed.

    With a launcher the signal goes to it or to one of its processes, in turn.
    """
    chance, within, launcher = random.Random(3), 0, undisturbed.launcher
    command = [*launcher, *training(tmp_path, "num_epochs", MANY)]
    for number in range(5):
        with alive(scripts, tmp_path, command) as run:
            assert sometime(chance, tmp_path, run, ("training", "training", "writing")[number % 3], 0)
            ranks = ranks_of(tmp_path, run.process.pid)
            pid = ranks[str(number % 4 // 2)] if launcher and number % 2 else run.process.pid
            stop(tmp_path, run, pid, signal.SIGTERM)
            assert run.process.returncode == (1 if launcher else 143)
            assert len(STOPPED.findall(run.err())) == 1
            if not launcher:
                assert STOPPED.fullmatch(run.err().strip())
            if pid != run.process.pid:
                assert re.search(r"exitcode\s*: 143\b", run.err())
            command = printed_command(run.err())
        within += content(only_run(tmp_path))["step"] not in (0, STEPS)
    assert within
    with alive(scripts, tmp_path, command) as run:
        done = ended(run)
    assert done.code == 0, done.err
    assert_as_if_nothing_had_happened(only_run(tmp_path), undisturbed.run)


def test_signals_to_the_whole_group_end_it_with_its_workers_and_the_printed_command_resumes(
    scripts, two_epochs, tmp_path
):
    """As launchers and terminals send them, again and again until it has ended."""
    streamed = training(tmp_path, "num_epochs", 2, "data_on_device", False, "workers", 2)
    with scripts.alive(tmp_path, *streamed) as run:
        assert until(lambda: MEANWHILE in run.out(), run)
        assert len(processes_of(tmp_path)) >= 3
        began = time.monotonic()
        while run.process.poll() is None and time.monotonic() - began < 20:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGTERM)
            time.sleep(0.02)
        assert run.process.wait(10) == 143
        assert time.monotonic() - began < 20
        assert_nothing_left(tmp_path, 5)
        name, epoch, step, _ = STOPPED.fullmatch(run.err().strip()).groups()
    kept = content(only_run(tmp_path))
    assert (name, int(epoch), int(step)) == ("SIGTERM", kept["epoch"], kept["step"])
    in_a_later_second(printed_command(run.err())[1:])
    assert_as_if_nothing_had_happened(only_run(tmp_path), two_epochs)


def test_sigint_in_an_evaluation_keeps_the_epochs_steps(scripts, tmp_path):
    """The evaluation has begun when its two workers are there beside the training's."""
    overrides = ["num_epochs", 1, "data_on_device", False, "workers", 2, "image_size", 32]
    with scripts.alive(tmp_path, *training(tmp_path, *overrides)) as run:
        assert until(lambda: len(processes_of(tmp_path)) > 3, run)
        stop(tmp_path, run, run.process.pid, signal.SIGINT)
        assert run.process.returncode == 130
        assert STOPPED.fullmatch(run.err().strip()).groups()[:3] == ("SIGINT", "0", str(STEPS))
        assert "* Acc@1" not in run.out()
    assert content(only_run(tmp_path))["step"] == STEPS


def test_a_run_that_sigusr1_stopped_resumes_with_other_threads_and_says_what_that_means(scripts, tmp_path):
    with scripts.alive(tmp_path, *training(tmp_path, "num_epochs", 1)) as run:
        assert until(lambda: MEANWHILE in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGUSR1)
        assert run.process.returncode == 138
        assert STOPPED.fullmatch(run.err().strip()).group(1) == "SIGUSR1"
    saved = content(only_run(tmp_path))  # as if it had had two: more threads than idle processors are very slow
    saved["environment"]["CPU threads"] = 2
    torch.save(saved, current(only_run(tmp_path)))
    train_here(printed_command(run.err()))
    assert re.search(r"CPU threads: 2 .* 1 ", log_of(only_run(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_before_training_ends_a_run_in_one_line(scripts, tmp_path, number):
    """As soon as it is caught, while the data and a large model are made."""
    command = training(tmp_path, "num_epochs", LONG, "backbone", "resnet110", "image_size", 32)
    with scripts.alive(tmp_path, *command) as run:
        assert until(lambda: catches_sigterm(run.process.pid), run)
        run.process.send_signal(number)
        assert run.process.wait(20) == 128 + number
        assert run.err() == f"stopped by {number.name}\n"
        assert "Epoch" not in run.out()


def test_two_processes_stop_together_and_one_resumes(scripts, tmp_path):
    """Then the number of processes is another one."""
    with scripts.group(2, tmp_path, *training(tmp_path, "num_epochs", 1)) as ranks:
        assert until(lambda: MEANWHILE in ranks[0].out(), ranks[0])
        ranks[1].process.send_signal(signal.SIGUSR1)  # to one alone: they agree
        done = [ended(rank, 20) for rank in ranks]
    assert [rank.code for rank in done] == [138, 138]
    assert done[1].err == ""
    (stopped,) = STOPPED.findall(done[0].err)
    assert stopped[0] == "SIGUSR1"
    assert stopped[-1].startswith("torchrun --standalone --nproc_per_node 2 train_stage1.py ")
    assert content(only_run(tmp_path))["step"] == int(stopped[2]) in range(3, STEPS)
    train_here(printed_command(done[0].err)[5:])
    assert re.search(r"processes: 2 .* 1 ", log_of(only_run(tmp_path)))
    assert (only_run(tmp_path) / "summary.json").is_file()


@pytest.mark.slow
def test_torchrun_hands_a_signal_on_and_two_processes_stop_together(tmp_path):
    """SIGUSR1, which torchrun has to be asked to hand on."""
    launcher = [*TWO, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    with started(tmp_path, *launcher, *training(tmp_path, "num_epochs", LONG)) as run:
        assert until(lambda: MEANWHILE in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGUSR1)
        assert run.process.returncode == 1
        (stopped,) = STOPPED.findall(run.err())
        assert stopped[0] == "SIGUSR1"


@pytest.mark.slow
def test_nodes_that_do_not_share_save_dir_are_refused_at_the_second_start(scripts, tmp_path):
    """Only the first one finds a checkpoint: both end, instead of waiting for each other."""
    body = (
        "import os, sys\n"
        "import train_stage1\nfrom utils.command_line import exit_code\n"
        "words = [*sys.argv[1:], 'save_dir', f'{sys.argv[0]}.{os.environ[\"RANK\"]}']\n"
        "sys.exit(exit_code(lambda: train_stage1.main(words)))\n"
    )
    words = [script_of(tmp_path, body), "--cfg", ARB, *SMALL, "num_epochs", 1, "resume", "auto"]
    for start in range(2):
        with scripts.group(2, tmp_path, *words) as ranks:
            done = [ended(rank, 90) for rank in ranks]
        assert [rank.code for rank in done] == [2 * start] * 2, [rank.err for rank in done]
    assert all("resume: auto" in rank.err and "save_dir" in rank.err for rank in done)


@pytest.mark.slow
def test_a_run_of_one_process_resumes_with_two(scripts, tmp_path):
    with scripts.alive(tmp_path, *training(tmp_path, "num_epochs", 1)) as run:
        assert until(lambda: MEANWHILE in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGTERM)
    with scripts.group(2, tmp_path, *printed_command(run.err())) as ranks:
        done = [ended(rank) for rank in ranks]
    assert [rank.code for rank in done] == [0, 0], [rank.err for rank in done]
    assert re.search(r"processes: 1 .* 2 ", log_of(only_run(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# Writes that fail


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch, made in this process: the first epoch of the run of two."""
    folder = tmp_path_factory.mktemp("one")
    train_here(training(folder, "num_epochs", 1))
    return only_run(folder)


@pytest.fixture
def half(one_epoch, tmp_path) -> Path:
    """A copy of the run of one epoch, to be resumed; what is written once only is not there yet."""
    run = shutil.copytree(one_epoch, tmp_path / "saved" / one_epoch.name)
    (run / "predictions" / "targets.npz").unlink()
    return run


def make_next_epoch_the_best(run: Path) -> None:
    saved = content(run)
    torch.save(saved | {"best_acc1": torch.full_like(saved["best_acc1"], -1.0)}, current(run))


def resuming(run: Path) -> list[str]:
    return ["--cfg", str(run / "config.yaml"), "resume", str(run / "ckps" / "current.pth.tar"), "num_epochs", "2"]


def in_a_later_second(arguments: Sequence[object]) -> None:
    """TensorBoard orders files by the second in their names, then by a number that counts as text: 10 before 9."""
    time.sleep(1)
    train_stage1.main([str(argument) for argument in arguments])


def no_space_beside(path: Path) -> Callable[[], None]:
    """Whole files are written beside their place and then moved."""
    beside = path.with_name(f".{path.name}.part")
    beside.symlink_to(FULL)
    return lambda: beside.unlink(missing_ok=True)


def instead(path: Path, make: Callable[[Path], None]) -> Callable[[], None]:
    """Puts what ``make`` makes in the place of ``path``; returns what undoes it."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    make(path)

    def undo() -> None:
        path.unlink()
        aside.rename(path)

    return undo


LOG = "logs/digits_imb005_arbloss_mixup.txt"
ATOMIC = (
    *("config.yaml", "metrics.jsonl", "predictions/1.npz", "predictions/targets.npz"),
    *("ckps/current.pth.tar", "ckps/model_best.pth.tar", "summary.json"),
)
OBSTACLES = {name: lambda run, name=name: no_space_beside(run / name) for name in ATOMIC} | {
    LOG: lambda run: instead(run / LOG, lambda path: path.symlink_to(FULL)),
    "tensorboard": lambda run: instead(run / "tensorboard", lambda path: path.write_text("")),
    "predictions": lambda run: instead(run / "predictions", lambda path: path.write_text("")),
}


def assert_refused(failed: SimpleNamespace, run: Path, name: str, reason: str) -> None:
    """One line: the file, why it cannot be written, and the last good checkpoint."""
    assert failed.code == 2
    (line,) = failed.lines
    last = re.escape(str(run / "ckps" / "current.pth.tar"))
    assert re.fullmatch(rf"error: {re.escape(str(run / name))}\S*: .*{reason}; .*{last}", line)


@needs_full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Python 3.10's ZipFile.__del__
@pytest.mark.parametrize("name", OBSTACLES)
def test_a_write_that_fails_is_said_in_one_line_and_the_run_resumes_later(half, two_epochs, capsys, name):
    if name == "ckps/model_best.pth.tar":
        make_next_epoch_the_best(half)
    undo = OBSTACLES[name](half)
    failed = failure(capsys, train_stage1.main, *resuming(half))
    on_disk = name in ATOMIC or name == LOG
    assert_refused(failed, half, name, "No space left on device" if on_disk else "(File exists|Not a directory)")
    undo()
    if name in ("predictions/1.npz", "ckps/current.pth.tar", LOG, "tensorboard"):
        in_a_later_second(resuming(half))
        assert_as_if_nothing_had_happened(half, two_epochs)


def test_a_limit_on_the_size_of_files_is_said_in_one_line(half, capsys):
    """The soft limit of this very process: a checkpoint is larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        failed = failure(capsys, train_stage1.main, *resuming(half))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(failed, half, "ckps/current.pth.tar", "File too large")


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Root without the right to pass over them (CAP_DAC_OVERRIDE), in this thread and in those that it starts."""
    if os.geteuid():
        yield
        return
    system, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    mine = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    known = system.capget(header, mine) == 0
    fewer = (ctypes.c_uint32 * 6)(mine[0] & ~(1 << 1), *mine[1:])
    if not known or system.capset(header, fewer):
        pytest.skip("root, and its rights cannot be given up")
    try:
        yield
    finally:
        assert system.capset(header, mine) == 0


@pytest.mark.parametrize("name", ["", "ckps", "tensorboard"])
def test_a_folder_that_must_not_be_written_is_said_in_one_line(half, capsys, name):
    (half / name).chmod(0o555)
    with bound_by_permissions():
        failed = failure(capsys, train_stage1.main, *resuming(half))
    (half / name).chmod(0o755)
    assert_refused(failed, half, name, "Permission denied")


def test_a_run_whose_reader_has_gone_trains_to_its_end(scripts, tmp_path):
    """``| head -1``."""
    command = training(tmp_path, "num_epochs", 1)
    with closed_pipe(tmp_path / "pipe") as pipe, scripts.alive(tmp_path, *command, out=pipe) as run:
        assert (run.process.wait(60), run.err()) == (0, "")
    folder = only_run(tmp_path)
    assert len(repeated_lines(folder)) == 8 + 2
    assert (folder / "summary.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The fork server of these tests


@pytest.mark.slow
def test_a_forked_script_ends_as_one_from_the_shell(scripts, tmp_path):
    words = ["train_stage1.py", "--local-rank=0", "--cfg", DIGITS, "lr", "0"]
    forked, shell = scripts.run(*words), completed(tmp_path, *words)
    assert (forked.code, forked.out, forked.err) == (shell.code, shell.out, shell.err)
    assert forked.code == 2
    assert forked.err.startswith("error: command line: lr: ") and forked.err.count("\n") == 1


def test_a_forked_script_shows_a_traceback_and_its_code(scripts, tmp_path):
    """Otherwise this file could not find any."""
    script = script_of(tmp_path, "import sys\nprint('said')\nif len(sys.argv) > 1:\n    sys.exit(7)\n1 / 0\n")
    crash, left = scripts.run(script), scripts.run(script, "x")
    assert (crash.code, crash.out, left.code, left.err) == (1, "said\n", 7, "")
    assert crash.err.startswith("Traceback") and crash.err.endswith("ZeroDivisionError: division by zero\n")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def no_network(monkeypatch):
    for name, value in VARIABLES.items():
        if name.lower().endswith("_proxy"):
            monkeypatch.setenv(name, value)


def assert_one_line(failed: SimpleNamespace, start: str, tmp: Path) -> None:
    """``start``: of the line, without "error: "; "..." stands for anything."""
    start = re.escape(f"error: {start.format(tmp=tmp)}").replace(re.escape("..."), ".*")
    assert failed.code == 2
    (line,) = failed.lines
    assert re.match(start, line), line
    assert not (tmp / "made").exists()
    assert not (tmp / "saved").exists()


def words_of(command: str, tmp: Path) -> list[str]:
    """Where nothing else is said, runs are saved in ``tmp / "saved"``."""
    words = shlex.split(command.format(tmp=tmp))
    saved = [] if "save_dir" in words or "--cfg" not in words[:-1] else ["save_dir", str(tmp / "saved")]
    return [*words[:2], *saved, *words[2:]]


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_ends_in_code_2_one_line_and_no_run(no_network, capsys, tmp_path, name):
    prepare, command, start = TABLE[name]
    prepare(tmp_path)
    assert_one_line(failure(capsys, train_stage1.main, *words_of(command, tmp_path)), start, tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", ["train_stage1.py", "eval.py"])
def test_a_hostile_checkpoint_is_refused_by_a_real_process(scripts, tmp_path, script):
    prepare, command, start = CHECKPOINTS["a checkpoint with code"]
    prepare(tmp_path)
    result = scripts.run(script, *words_of(command, tmp_path))
    assert_one_line(SimpleNamespace(code=result.code, lines=result.err.splitlines()), start, tmp_path)
    assert result.out == ""


@pytest.mark.parametrize("name", ["half a checkpoint", "another shape"])
def test_evaluation_refuses_a_checkpoint_as_training_does(capsys, tmp_path, name):
    prepare, command, start = CHECKPOINTS[name]
    prepare(tmp_path)
    assert_one_line(failure(capsys, eval_script.main, *words_of(command, tmp_path)), start, tmp_path)


def test_evaluation_needs_a_checkpoint(capsys, tmp_path):
    assert_one_line(failure(capsys, eval_script.main, "--cfg", DIGITS), "resume: eval.py needs a checkpoint", tmp_path)


def test_the_hostile_checkpoints_would_have_run(tmp_path):
    """Otherwise the table proves nothing."""
    checkpoint(hostile)(tmp_path)
    torch.load(tmp_path / "x.pth.tar", weights_only=False)["state_dict_model"].close()
    assert (tmp_path / "made").exists()


# Images of lists are decoded when they are needed: the run has begun, and its folder holds the log. Every kind of
# damage with every decoder: tests/test_decoding.py.


@pytest.mark.parametrize(
    ("damage", "part", "workers", "decoder"),
    [
        (None, "train", 1, "pil"),
        (b"", "val", 0, "fast"),
        (JPEG_BOMB, "train", 0, "fast"),
        (FLAT_BOMB, "val", 1, "pil"),
    ],
    ids=["missing", "empty", "bomb", "bomb in one row"],
)
def test_an_image_of_a_list_that_cannot_be_read_ends_the_run_by_its_name(
    capfd, tmp_path, damage, part, workers, decoder
):
    path = sorted((listed(tmp_path / "data") / part).rglob("*.JPEG"))[-1]
    path.unlink() if damage is None else path.write_bytes(damage)
    words = shlex.split(IMAGENET.format(tmp=tmp_path))
    more = ["num_epochs", 1, "workers", workers, "decoder", decoder, "save_dir", tmp_path / "saved"]
    failed = failure(capfd, train_stage1.main, *words, *more)
    assert failed.code == 2
    (line,) = failed.lines
    assert line.startswith(f"error: {path}: ")


# ---------------------------------------------------------------------------------------------------------------------
# What only looks wrong


def trained(capsys, words: str, tmp: Path) -> str:
    """The line of the log that says what was trained on."""
    words = shlex.split(words.format(tmp=tmp))
    saved = [] if "save_dir" in words else ["save_dir", str(tmp / "saved")]
    train_stage1.main([*words, *saved, "num_epochs", "1"])
    return next(line for line in capsys.readouterr().out.splitlines() if "training images in" in line)


def test_unicode_and_spaces_are_legal_in_every_path(capsys, tmp_path):
    folders(tmp_path / "Meine Bilder ß", ("große Katze", "写真 犬"))
    write(tmp_path / "mein Versuch ü.yaml", f"_BASE_: {ROOT}/config/folder/base.yaml\n")
    words = FOLDER.replace("config/folder/base.yaml", "'{tmp}/mein Versuch ü.yaml'").replace(
        "data ", "'Meine Bilder ß' "
    )
    said = trained(capsys, words + "save_dir '{tmp}/Läufe 1'", tmp_path)
    assert "4 training images in 2 classes" in said
    (run,) = (tmp_path / "Läufe 1").iterdir()
    assert run.name.startswith("mein Versuch ü_")
    eval_script.main([*shlex.split(words.format(tmp=tmp_path)), "resume", str(run / "ckps" / "current.pth.tar")])
    assert "große Katze" in (run / "eval" / "current" / "per_class.csv").read_text(encoding="utf-8")


def test_official_annotations_and_linked_folders_are_trained_on(capsys, tmp_path):
    """Every legal form of a list or of class folders: test_image_list.py, test_image_folder.py."""
    annotations(tmp_path)
    (tmp_path / "data/train_val2018").rename(tmp_path / "elsewhere")
    (tmp_path / "data/train_val2018").symlink_to(tmp_path / "elsewhere")
    assert "4 training images in 2 of 8142 classes" in trained(capsys, INA, tmp_path)


def test_class_folders_with_an_empty_class_and_one_image_in_another_are_trained_on(capsys, tmp_path):
    data = folders(tmp_path / "data")
    (data / "train/emu").mkdir()
    (data / "train/cat/0.png").unlink()
    image(data / "train/dog/x.png", 900, 4)
    words = FOLDER.replace("batch_size 4", "batch_size 3")
    assert "4 training images in 2 of 3 classes" in trained(capsys, words, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Any file at all

PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.sampled_from(["a/1.jpg", "a/2.jpg", "b c/3.jpg", "ß/写.jpg", "../x", "/x", "a/../b", ".", ""]) | st.text()
LABELS = st.integers(-2, 4).map(str) | st.sampled_from(["9" * 30, "1_0", "٣", "0x1", "1.0", "+1"]) | st.text(max_size=3)
LINES = st.tuples(NAMES, st.sampled_from([" ", "\t", "  ", ""]), LABELS, st.sampled_from(["\n", "\r\n", "\n\n"]))
TEXTS = st.lists(LINES.map("".join), max_size=6).map("".join)
PATHS = st.sampled_from(["a/1.jpg", "../x", "/x", "a\0b", "\ud800"]) | st.text(max_size=5)
IDS = st.integers(0, 3) | st.none() | st.text(max_size=2) | st.floats() | st.lists(st.integers(), max_size=1)
ROWS = {
    "images": st.lists(st.fixed_dictionaries({"id": IDS, "file_name": PATHS | IDS}), max_size=4),
    "annotations": st.lists(st.fixed_dictionaries({"image_id": IDS, "category_id": IDS}), max_size=4),
}


def paths_or_refusal(path: Path) -> None:
    """Any exception but DataError fails the test; what is read is all that there is, and lies where it should."""
    try:
        rows = scan_image_list(path)
        paths, labels = read_image_list(path, 3)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert rows.paths == paths and not rows.malformed
    assert len(paths) == len(labels) == len(set(paths)) > 0
    assert ((labels >= 0) & (labels < 3)).all()
    root = Path("/data/set")
    assert all(Path(os.path.normpath(root / name)).is_relative_to(root) for name in paths)
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # as files are read: \r ends a line too
        assert len(paths) == sum(not line.isspace() for line in io.StringIO(text, newline=None))


@PROPERTY
@given(content=TEXTS.map(str.encode) | st.text().map(str.encode) | st.binary())
def test_any_file_is_a_whole_list_or_is_refused(tmp_path, content):
    paths_or_refusal(write(tmp_path / "x.txt", content))
    paths_or_refusal(write(tmp_path / "x.json", content))


@PROPERTY
@given(content=st.fixed_dictionaries(ROWS) | st.recursive(IDS, lambda inner: st.lists(inner, max_size=3)))
def test_any_json_is_a_whole_list_or_is_refused(tmp_path, content):
    paths_or_refusal(write(tmp_path / "x.json", json.dumps(content)))
