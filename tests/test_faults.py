"""What may go wrong: runs that something ends, disks that are full, and bad input of every kind.

Runs that are stopped (signals, a kill at any moment, a lost launcher) and resumed equal one that nothing has disturbed,
bit for bit. Bad input ends with exit code 2 and one line that names what is wrong, and leaves no run behind; what only
looks wrong (Unicode, spaces, CRLF, an empty class, a class with one image) simply works. Real processes, real files.
A process is found by the folder of its test, which stands in its command line.
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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_stage1
from datasets.image_list import read_image_list, scan_image_list
from datasets.source import DataError
from tests.bad_inputs import (
    CHECKPOINTS,
    COMMANDS,
    DIGITS,
    FILES,
    FLAT_BOMB,
    FOLDER,
    IMAGE_LISTS,
    IMAGENET,
    IMAGES,
    INA,
    JPEG_BOMB,
    TABLE,
    annotations,
    checkpoint,
    folders,
    hostile,
    image,
    list_with,
    listed,
    renamed,
    write,
)
from tests.conftest import ARB, ROOT, assert_same_run, assert_same_tensors, content, failure
from tests.test_several_processes import parent_of, processes_of, rank_of
from utils.config import ConfigError, load_config, read_config

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
SMALL = ["device", "cpu", "image_size", 16, "batch_size", 32, "lr", 0.05, "print_freq", 2, "checkpoint_every_steps", 2]
STEPS = 15  # of an epoch
LONG = 30  # epochs of the runs that are stopped many times: more than all those lives get through on a fast machine
KILLS = 20
FULL = Path("/dev/full")  # every write fails with ENOSPC
STOPPED = re.compile(r"^stopped by (\w+): epoch (\d+), (\d+) of 15 steps, is saved; resume with: (.*)$", re.M)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here as in all processes that are started, or they could not be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def training(folder: Path, *overrides: object) -> list[object]:
    return ["train_stage1.py", "--cfg", ARB, *SMALL, "save_dir", folder / "saved", *overrides]


def seed_of(run: Path) -> list[object]:
    return ["seed", load_config(run / "config.yaml").seed]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def alive(folder: Path, *command: object) -> Iterator[SimpleNamespace]:
    """Python with ``command`` in a session of its own: ``process``, and ``out`` and ``err`` that read what it said.

    At the end of the block all that has ``folder`` in its command line is ended.
    """
    files = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    with files[0].open("w") as out, files[1].open("w") as err:
        options = {"start_new_session": True, "preexec_fn": hear_hangups}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=err, **options)
    try:
        yield SimpleNamespace(process=process, out=files[0].read_text, err=files[1].read_text)
    finally:
        kill_all(folder)
        process.wait(10)


def hear_hangups() -> None:
    """Whoever started the tests may have them ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def kill_all(folder: Path) -> None:
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], run: SimpleNamespace, seconds: float = 120) -> bool:
    """Waits for ``condition``; False where the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        if run.process.poll() is not None:
            return False
        assert time.monotonic() < end, run.err()
        time.sleep(0.001)
    return True


def assert_nothing_left(folder: Path, seconds: float = 0) -> None:
    """Within ``seconds``. DataLoader's workers look for their parent every 5 seconds."""
    end = time.monotonic() + seconds
    while left := processes_of(folder):
        assert time.monotonic() < end, f"still alive: {left}"
        time.sleep(0.05)


def completed(folder: Path, *command: object) -> SimpleNamespace:
    """The same, run to its end: ``code``, ``out`` and ``err``."""
    with alive(folder, *command) as run:
        code = run.process.wait(timeout=240)
        return SimpleNamespace(code=code, out=run.out(), err=run.err())


def printed_command(said: str) -> list[str]:
    """The command that one stopped run printed, in words for ``alive``."""
    (stop,) = STOPPED.findall(said)
    first, *words = shlex.split(stop[-1])
    assert first in ("python", "torchrun")
    return words if first == "python" else ["-m", "torch.distributed.run", *words]


def has_handlers(pid: int) -> bool:
    """Whether the process catches SIGTERM by now."""
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M).group(1)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left


def only_run(folder: Path) -> Path:
    """The folder of the one run; attempts that ended before their first checkpoint left others."""
    (run,) = (path.parents[1] for path in (folder / "saved").glob("*/ckps/current.pth.tar"))
    return run


def log_of(run: Path) -> str:
    (path,) = (run / "logs").iterdir()
    return path.read_text()


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
def undisturbed(tmp_path_factory) -> Callable[[int], Path]:
    """Processes -> the folder of a run that nothing disturbs; tests do not write into it."""
    kept = {}

    def run(processes: int) -> Path:
        if processes not in kept:
            folder = tmp_path_factory.mktemp("undisturbed")
            launcher = TWO if processes == 2 else []
            done = completed(folder, *launcher, *training(folder, "num_epochs", LONG))
            assert done.code == 0, done.err
            kept[processes] = only_run(folder)
        return kept[processes]

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Moments: by what the run has done, so that a life gets somewhere on a slow machine too, and then at random


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


def ranks(folder: Path, launcher: int) -> dict[str, int]:
    """Rank -> process."""
    return {rank_of(pid): pid for pid in processes_of(folder) if parent_of(pid) == launcher}


def kill(victim: str, folder: Path, run: SimpleNamespace) -> None:
    """SIGKILL to "all", to the "launcher" alone or to one "rank"; the others have to end by themselves."""
    if victim == "all":
        run.process.kill()  # first, or it would say that its processes have ended
        kill_all(folder)
    elif victim == "launcher":
        run.process.kill()
    else:
        os.kill(ranks(folder, run.process.pid)[victim], signal.SIGKILL)
    run.process.wait(60)
    assert_nothing_left(folder, 0 if victim == "all" else 60)


def killed_life(
    chance: random.Random, folder: Path, command: Sequence[object], kind: str, victim: str, start_up: float
) -> SimpleNamespace:
    """One life that ends with SIGKILL: whether its log had begun and whether a checkpoint was being written."""
    with alive(folder, *command) as run:
        assert sometime(chance, folder, run, kind, start_up), f"ended too soon: {run.out()} {run.err()}"
        kill(victim, folder, run)
        if victim in ("all", "launcher"):
            assert run.process.returncode == -signal.SIGKILL  # it had not ended by itself
        return SimpleNamespace(
            began="Epoch: [" in run.out(),
            went_on=re.search(r"resuming after \d+ epochs and \d+ steps", run.out()) is not None,
            writing=any((folder / "saved").glob("*/ckps/.*.part")),
        )


def killed_often(folder: Path, launcher: list[object], victims: Sequence[str], seed: int) -> Path:
    """A run that is killed :data:`KILLS` times and then ends; returns its folder."""
    chance, lives = random.Random(seed), []
    command = [*launcher, *training(folder, "num_epochs", LONG, "resume", "auto")]
    for number in range(KILLS):
        kind = ("start-up", "training", "writing", "training", "training")[number % 5]
        victim = "all" if kind == "start-up" else victims[number % len(victims)]
        lives.append(killed_life(chance, folder, command, kind, victim, 8 if launcher else 4))
    done = completed(folder, *command)
    assert done.code == 0, done.err
    assert len(lives) == KILLS
    assert sum(life.began for life in lives) >= KILLS // 2
    assert sum(life.went_on for life in lives) >= KILLS // 3
    assert any(life.writing for life in lives)
    assert_nothing_left(folder)
    return only_run(folder)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_equals_one_that_never_was(undisturbed, tmp_path):
    run = killed_often(tmp_path, [], ["all"], seed=1)
    assert_as_if_nothing_had_happened(run, undisturbed(1))


@pytest.mark.slow
def test_two_processes_that_are_killed_together_or_in_part_equal_two_that_never_were(undisturbed, tmp_path):
    """All, only the launcher, only one rank: the others end by themselves within a minute."""
    run = killed_often(tmp_path, TWO, ["all", "launcher", "0", "1"], seed=2)
    assert_as_if_nothing_had_happened(run, undisturbed(2))


@pytest.mark.slow
def test_the_readers_of_a_killed_run_end_by_themselves(tmp_path):
    with alive(tmp_path, *training(tmp_path, "num_epochs", LONG, "data_on_device", False, "workers", 2)) as run:
        assert until(lambda: "Epoch: [0][ 2/15]" in run.out(), run)
        assert len(processes_of(tmp_path)) == 3
        run.process.kill()
        run.process.wait(10)
        assert_nothing_left(tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "handlers"])
def test_ranks_whose_launcher_is_killed_before_they_meet_end_within_a_minute(tmp_path, moment):
    with alive(tmp_path, *TWO, *training(tmp_path, "num_epochs", LONG)) as run:
        launcher = run.process.pid
        assert until(lambda: {"0", "1"} <= ranks(tmp_path, launcher).keys(), run)
        first = ranks(tmp_path, launcher)["0"]
        assert until(lambda: moment == "imports" or has_handlers(first), run)
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
    assert_nothing_left(folder, 1)


def stopped_often(folder: Path, launcher: list[object], seed: int) -> Path:
    """A run that gets five SIGTERMs, each life by the command that the one before printed; returns its folder.

    With a launcher the signal goes to it or to one of its processes, in turn.
    """
    chance, within = random.Random(seed), 0
    command = [*launcher, *training(folder, "num_epochs", LONG)]
    for number in range(5):
        with alive(folder, *command) as run:
            assert sometime(chance, folder, run, ("training", "training", "writing")[number % 3], 0)
            pid = ranks(folder, run.process.pid)[str(number % 4 // 2)] if launcher and number % 2 else run.process.pid
            stop(folder, run, pid, signal.SIGTERM)
            assert run.process.returncode == (1 if launcher else 143)
            assert len(STOPPED.findall(run.err())) == 1
            if not launcher:
                assert STOPPED.fullmatch(run.err().strip())
            if pid != run.process.pid:
                assert re.search(r"exitcode\s*: 143\b", run.err())
            command = printed_command(run.err())
        kept = content(only_run(folder))
        within += kept["step"] not in (0, STEPS)
    assert within
    done = completed(folder, *command)
    assert done.code == 0, done.err
    return only_run(folder)


@pytest.mark.slow
def test_a_run_that_is_stopped_five_times_equals_one_that_never_was(undisturbed, tmp_path):
    run = stopped_often(tmp_path, [], seed=3)
    assert_as_if_nothing_had_happened(run, undisturbed(1))


@pytest.mark.slow
def test_two_processes_that_are_stopped_five_times_equal_two_that_never_were(undisturbed, tmp_path):
    run = stopped_often(tmp_path, TWO, seed=4)
    assert_as_if_nothing_had_happened(run, undisturbed(2))


def test_signals_to_the_whole_group_end_it_with_its_workers_and_the_printed_command_goes_on(two_epochs, tmp_path):
    """As launchers and terminals send them, again and again until it has ended."""
    streamed = training(tmp_path, "num_epochs", 2, *seed_of(two_epochs), "data_on_device", False, "workers", 2)
    with alive(tmp_path, *streamed) as run:
        assert until(lambda: "Epoch: [0][ 2/15]" in run.out(), run)
        assert len(processes_of(tmp_path)) == 3
        began = time.monotonic()
        while run.process.poll() is None and time.monotonic() - began < 20:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGTERM)
            time.sleep(0.02)
        assert run.process.wait(10) == 143
        assert time.monotonic() - began < 20
        assert_nothing_left(tmp_path, 1)
        name, epoch, step, _ = STOPPED.fullmatch(run.err().strip()).groups()
    kept = content(only_run(tmp_path))
    assert (name, int(epoch), int(step)) == ("SIGTERM", kept["epoch"], kept["step"])
    assert kept["step"] in range(3, STEPS)
    train_stage1.main(printed_command(run.err())[1:])
    assert_as_if_nothing_had_happened(only_run(tmp_path), two_epochs)


def test_sigint_in_an_evaluation_keeps_the_epochs_steps(tmp_path):
    """The evaluation has begun when its two workers are there beside the training's."""
    overrides = ["num_epochs", 1, "data_on_device", False, "workers", 2, "image_size", 32]
    with alive(tmp_path, *training(tmp_path, *overrides)) as run:
        assert until(lambda: len(processes_of(tmp_path)) > 3, run)
        stop(tmp_path, run, run.process.pid, signal.SIGINT)
        assert run.process.returncode == 130
        assert STOPPED.fullmatch(run.err().strip()).groups()[:3] == ("SIGINT", "0", str(STEPS))
        assert "* Acc@1" not in run.out()
    assert content(only_run(tmp_path))["step"] == STEPS


def test_a_run_that_sigusr1_stopped_goes_on_with_more_threads_and_says_what_that_means(tmp_path):
    with alive(tmp_path, *training(tmp_path, "num_epochs", 1)) as run:
        assert until(lambda: "Epoch: [0][ 2/15]" in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGUSR1)
        assert run.process.returncode == 138
        assert STOPPED.fullmatch(run.err().strip()).group(1) == "SIGUSR1"
    torch.set_num_threads(2)
    try:
        train_stage1.main(printed_command(run.err())[1:])
    finally:
        torch.set_num_threads(1)
    assert re.search(r"CPU threads: 1 before, 2 now; .* no longer bit-identical", log_of(only_run(tmp_path)))


@pytest.mark.parametrize(("number", "wait"), [(signal.SIGHUP, 0), (signal.SIGTERM, 0.3)])
def test_a_signal_before_training_ends_a_run_in_one_line(tmp_path, number, wait):
    """As soon as it is caught, and while data are read; before that, in the imports, it ends Python itself."""
    with alive(tmp_path, *training(tmp_path, "num_epochs", LONG)) as run:
        assert until(lambda: has_handlers(run.process.pid), run)
        time.sleep(wait)
        run.process.send_signal(number)
        assert run.process.wait(20) == 128 + number
        assert run.err() == f"stopped by {number.name}\n"
        assert "Epoch" not in run.out()


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """SIGUSR1, which torchrun has to be asked to hand on; then the number of processes is another one."""
    launcher = [*TWO, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    with alive(tmp_path, *launcher, *training(tmp_path, "num_epochs", 1)) as run:
        assert until(lambda: "Epoch: [0][ 2/15]" in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGUSR1)
        assert run.process.returncode == 1
        (stopped,) = STOPPED.findall(run.err())
        assert stopped[0] == "SIGUSR1"
        assert stopped[-1].startswith("torchrun --standalone --nproc_per_node 2 train_stage1.py ")
    assert content(only_run(tmp_path))["step"] == int(stopped[2]) in range(3, STEPS)
    train_stage1.main(printed_command(run.err())[4 + 2 :])
    assert re.search(r"processes: 2 before, 1 now; .* no longer bit-identical", log_of(only_run(tmp_path)))
    assert (only_run(tmp_path) / "summary.json").is_file()


@pytest.mark.slow
def test_nodes_that_do_not_share_save_dir_are_refused_at_the_second_start(tmp_path):
    """Only the first one finds a checkpoint: both end, instead of waiting for each other."""
    wrapper = tmp_path / "node.py"
    wrapper.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train_stage1\nfrom utils.command_line import exit_code\n"
        "words = [*sys.argv[1:], 'save_dir', f'{sys.argv[0]}.{os.environ[\"RANK\"]}']\n"
        "sys.exit(exit_code(lambda: train_stage1.main(words)))\n"
    )
    words = [*TWO, wrapper, "--cfg", ARB, *SMALL, "num_epochs", 1, "resume", "auto"]
    for start in range(2):
        with alive(tmp_path, *words) as run:
            code = run.process.wait(90)
        assert (code == 0) == (start == 0)
    assert "resume: auto is not the same file for every process; all nodes need one save_dir" in run.err()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    with alive(tmp_path, *training(tmp_path, "num_epochs", 1)) as run:
        assert until(lambda: "Epoch: [0][ 2/15]" in run.out(), run)
        stop(tmp_path, run, run.process.pid, signal.SIGTERM)
    done = completed(tmp_path, *TWO, *printed_command(run.err()))
    assert done.code == 0, done.err
    assert re.search(r"processes: 1 before, 2 now; .* no longer bit-identical", log_of(only_run(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# Writes that fail


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """The folder of a run of two epochs, made in this process; the second is better than the first.

    With the first seed for which it is: last bits, and so accuracies, depend on the processor.
    """
    os.chdir(ROOT)
    for seed in range(10):
        folder = tmp_path_factory.mktemp("two")
        train_stage1.main(list(map(str, training(folder, "num_epochs", 2, "seed", seed)[1:])))
        if content(only_run(folder), "model_best")["epoch"] == 2:
            return only_run(folder)
    pytest.fail("ten runs of two epochs were all best after the first")


@pytest.fixture(scope="module")
def one_epoch(two_epochs, tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch, made in this process: the first epoch of the run of two."""
    folder = tmp_path_factory.mktemp("one")
    train_stage1.main(list(map(str, training(folder, "num_epochs", 1, *seed_of(two_epochs))[1:])))
    return only_run(folder)


@pytest.fixture
def half(one_epoch, tmp_path) -> Path:
    """A copy of the run of one epoch, to be gone on with; what is only written once is not there yet."""
    run = shutil.copytree(one_epoch, tmp_path / "saved" / one_epoch.name)
    (run / "predictions" / "targets.npz").unlink()
    return run


def going_on(run: Path) -> list[str]:
    return ["--cfg", str(run / "config.yaml"), "resume", str(run / "ckps" / "current.pth.tar"), "num_epochs", "2"]


def in_a_later_second(arguments: list[str]) -> None:
    """TensorBoard orders files by the second in their names, then by a number that counts as text: 10 before 9."""
    time.sleep(1)
    train_stage1.main(arguments)


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


@pytest.mark.skipif(not FULL.exists(), reason="the disk that is full is /dev/full")
@pytest.mark.parametrize("name", OBSTACLES)
def test_a_write_that_fails_is_said_in_one_line_and_the_run_goes_on_later(half, two_epochs, capsys, name):
    undo = OBSTACLES[name](half)
    failed = failure(capsys, train_stage1.main, *going_on(half))
    assert failed.code == 2
    (line,) = failed.lines
    reason = "No space left on device" if name in ATOMIC or name == LOG else r"(File exists|Not a directory)"
    last = re.escape(str(half / "ckps" / "current.pth.tar"))
    assert re.fullmatch(
        rf"error: {re.escape(str(half / name))}\S*: .*{reason}; the last good checkpoint is {last}", line
    )
    undo()
    in_a_later_second(going_on(half))
    assert_as_if_nothing_had_happened(half, two_epochs)


def test_a_limit_on_the_size_of_files_is_said_in_one_line(half, two_epochs, capsys):
    """The soft limit of this very process: a checkpoint is larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        failed = failure(capsys, train_stage1.main, *going_on(half))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.code == 2
    (line,) = failed.lines
    path = re.escape(str(half / "ckps" / "current.pth.tar"))
    assert re.fullmatch(rf"error: {path}: .*File too large; the last good checkpoint is {path}", line)
    in_a_later_second(going_on(half))
    assert_as_if_nothing_had_happened(half, two_epochs)


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


@pytest.mark.parametrize("name", ["", "ckps", "predictions", "tensorboard"])
def test_a_folder_that_must_not_be_written_is_said_in_one_line(half, two_epochs, capsys, name):
    (half / name).chmod(0o555)
    with bound_by_permissions():
        failed = failure(capsys, train_stage1.main, *going_on(half))
    (half / name).chmod(0o755)
    assert failed.code == 2
    (line,) = failed.lines
    last = re.escape(str(half / "ckps" / "current.pth.tar"))
    where = re.escape(str(half / name))
    assert re.fullmatch(rf"error: {where}\S*: .*Permission denied; the last good checkpoint is {last}", line)
    in_a_later_second(going_on(half))
    assert_as_if_nothing_had_happened(half, two_epochs)


def test_a_run_whose_folder_is_deleted_says_so_in_one_line(tmp_path):
    with alive(tmp_path, *training(tmp_path, "num_epochs", LONG)) as run:
        assert until(lambda: "Epoch: [0][ 4/15]" in run.out(), run)
        (folder,) = (tmp_path / "saved").iterdir()
        shutil.rmtree(folder)
        assert run.process.wait(60) == 2
        (line,) = run.err().splitlines()
    assert re.fullmatch(rf"error: {folder}\S*: .*No such file or directory; {folder} is gone, checkpoints too", line)


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="the disk that is full is /dev/full")
def test_a_full_disk_under_tensorboard_is_said_in_one_line_and_the_run_goes_on_later(two_epochs, tmp_path):
    command = training(tmp_path, "num_epochs", 2, *seed_of(two_epochs), "resume", "auto")
    with alive(tmp_path, *command) as run:
        assert until(lambda: "Epoch: [0][ 4/15]" in run.out(), run)
        (events,) = (tmp_path / "saved").glob("*/tensorboard/*")
        undo = instead(events, lambda path: path.symlink_to(FULL))
        assert run.process.wait(60) == 2
        (line,) = run.err().splitlines()
    where = re.escape(str(events.parent))
    assert re.fullmatch(rf"error: {where}\S*: .*No space left on device; the last good checkpoint is \S+", line)
    undo()
    done = completed(tmp_path, *command)
    assert done.code == 0, done.err
    assert_as_if_nothing_had_happened(only_run(tmp_path), two_epochs)


def test_a_run_whose_reader_has_gone_trains_to_its_end(tmp_path):
    """``| head -1``."""
    words = [sys.executable, *map(str, training(tmp_path, "num_epochs", 1))]
    pipeline = f"{shlex.join(words)} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", pipeline], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    run = only_run(tmp_path)
    assert len(repeated_lines(run)) == 8 + 2
    assert (run / "summary.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Commands: starting Python and torch takes seconds, so one process has loaded them and forks for every command.

SERVER = """
import atexit, json, os, runpy, sys, traceback
import eval, train_stage1
import sklearn.datasets

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate([os.devnull, job["out"], job["err"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, code = job["words"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")  # with its last line: sys.exit(exit_code(main))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # tidying up torch would take a second
"""
# Downloads fail at once, with or without a network.
ENVIRONMENT = {
    **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
    **dict.fromkeys(["no_proxy", "NO_PROXY"], ""),
}


class Scripts:
    """Runs ``python script ...`` in the repository, as a process of its own."""

    def __init__(self, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, **ENVIRONMENT}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, **pipes)

    def run(self, *words: object) -> SimpleNamespace:
        """``code``, and the text on standard output ``out`` and error ``err``."""
        job = {"words": [str(word) for word in words], "out": str(self.out), "err": str(self.err)}
        self.server.stdin.write(f"{json.dumps(job)}\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return SimpleNamespace(code=code, out=self.out.read_text(), err=self.err.read_text())

    def end(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Iterator[Scripts]:
    running = Scripts(tmp_path_factory.mktemp("scripts"))
    yield running
    running.end()


@pytest.mark.parametrize(
    "words",
    [
        ["train_stage1.py", "--cfg", DIGITS, "lr", "0"],
        ["eval.py", "--cfg", DIGITS],
    ],
    ids=" ".join,
)
def test_a_forked_script_ends_as_one_from_the_shell(scripts, words):
    forked = scripts.run(*words)
    shell = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (forked.code, forked.out, forked.err) == (shell.returncode, shell.stdout, shell.stderr)
    assert forked.code == 2


def test_a_forked_script_shows_a_traceback_and_its_code(scripts, tmp_path):
    """Otherwise this file could not find any."""
    (tmp_path / "script.py").write_text("import sys\nprint('said')\nif len(sys.argv) > 1:\n    sys.exit(7)\n1 / 0\n")
    crash, left = scripts.run(tmp_path / "script.py"), scripts.run(tmp_path / "script.py", "x")
    assert (crash.code, crash.out, left.code, left.err) == (1, "said\n", 7, "")
    assert crash.err.startswith("Traceback") and crash.err.endswith("ZeroDivisionError: division by zero\n")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def assert_one_line(result: SimpleNamespace, expected: str, tmp: Path) -> None:
    """``expected``: the line without "error: "; "..." stands for anything."""
    whole = re.escape(f"error: {expected.format(tmp=tmp)}\n").replace(re.escape("..."), ".*")
    assert re.fullmatch(whole, result.err), result.err
    assert result.code == 2
    assert not (tmp / "made").exists()


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_ends_in_code_2_one_line_and_no_run(scripts, tmp_path, name):
    prepare, words, expected = TABLE[name]
    prepare(tmp_path)
    words = shlex.split(words.format(tmp=tmp_path))
    saved = [] if "save_dir" in words or "--cfg" not in words[:-1] else ["save_dir", tmp_path / "saved"]
    result = scripts.run("train_stage1.py", *words[:2], *saved, *words[2:])
    assert_one_line(result, expected, tmp_path)
    assert result.out == ""
    assert not (tmp_path / "saved").exists()


def test_the_table_is_whole():
    assert len(TABLE) == sum(map(len, (COMMANDS, FILES, IMAGES, IMAGE_LISTS, CHECKPOINTS))) >= 60


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_evaluation_refuses_a_checkpoint_as_training_does(scripts, tmp_path, name):
    prepare, words, expected = CHECKPOINTS[name]
    if "pretrained" in words:
        pytest.skip("a checkpoint takes the place of pretrained weights")
    prepare(tmp_path)
    words = shlex.split(words.format(tmp=tmp_path))
    result = scripts.run("eval.py", *words, "save_dir", tmp_path / "saved")
    assert_one_line(result, expected, tmp_path)
    assert not (tmp_path / "saved").exists()


def test_evaluation_needs_a_checkpoint(scripts, tmp_path):
    result = scripts.run("eval.py", "--cfg", DIGITS)
    assert_one_line(result, "resume: eval.py needs a checkpoint; add: resume ...", tmp_path)


def test_the_hostile_checkpoints_would_have_run(tmp_path):
    """Otherwise the table proves nothing."""
    for prepare, name in ((checkpoint(hostile), "x.pth.tar"), (renamed, "notes.txt")):
        prepare(tmp_path)
        torch.load(tmp_path / name, weights_only=False)["state_dict_model"].close()
        assert (tmp_path / "made").exists()
        (tmp_path / "made").unlink()


# Images of lists are decoded when they are needed: the run has begun, and its folder holds the log.

DAMAGED = {
    "missing": (None, "no such image"),
    "empty": (b"", "is no readable image (none of JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP)"),
    "bomb": (JPEG_BOMB, "is no readable image (Image size (4225000000 pixels) exceeds limit of ...)"),
    "bomb in one row": (FLAT_BOMB, "is no readable image (30000000x1 pixels, too long and thin to be scaled)"),
}


@pytest.mark.parametrize("decoder", ["pil", "fast"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_an_image_of_a_list_that_cannot_be_read_ends_the_run_by_its_name(
    scripts, tmp_path, kind, part, workers, decoder
):
    content, expected = DAMAGED[kind]
    path = sorted((listed(tmp_path / "data") / part).rglob("*.JPEG"))[-1]
    path.unlink() if content is None else path.write_bytes(content)
    words = shlex.split(IMAGENET.format(tmp=tmp_path))
    more = ["num_epochs", 1, "workers", workers, "decoder", decoder, "save_dir", tmp_path / "saved"]
    result = scripts.run("train_stage1.py", *words, *more)
    assert_one_line(result, f"{path}: {expected}...", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What only looks wrong


def trained(scripts: Scripts, words: str, tmp: Path) -> str:
    """The line of the log that says what was trained on."""
    words = shlex.split(words.format(tmp=tmp))
    saved = [] if "save_dir" in words else ["save_dir", tmp / "saved"]
    result = scripts.run("train_stage1.py", *words, *saved, "num_epochs", 1)
    assert (result.code, result.err) == (0, "")
    return next(line for line in result.out.splitlines() if "training images in" in line)


def test_unicode_and_spaces_are_legal_in_every_path(scripts, tmp_path):
    folders(tmp_path / "Meine Bilder ß", ("große Katze", "写真 犬"))
    write(tmp_path / "mein Versuch ü.yaml", f"_BASE_: {ROOT}/config/folder/base.yaml\n")
    words = FOLDER.replace("config/folder/base.yaml", "'{tmp}/mein Versuch ü.yaml'").replace(
        "data ", "'Meine Bilder ß' "
    )
    said = trained(scripts, words + "save_dir '{tmp}/Läufe 1'", tmp_path)
    assert "4 training images in 2 classes" in said
    (run,) = (tmp_path / "Läufe 1").iterdir()
    assert run.name.startswith("mein Versuch ü_")
    words = [*shlex.split(words.format(tmp=tmp_path)), "resume", run / "ckps" / "current.pth.tar"]
    result = scripts.run("eval.py", *words)
    assert (result.code, result.err) == (0, "")
    assert "große Katze" in (run / "eval" / "current" / "per_class.csv").read_text(encoding="utf-8")


LEGAL_TREES = {
    "an empty class": (lambda data: (data / "train/emu").mkdir(), "4 training images in 2 of 3 classes"),
    "one image in a class": (lambda data: (data / "train/cat/0.png").unlink(), "3 training images in 2 classes"),
    "other files": (lambda data: write(data / "train/cat/notes.txt", ""), "4 training images in 2 classes"),
    "a class name in Latin-1": (
        lambda data: [os.rename(data / p / "cat", os.fsencode(data / p) + b"/caf\xe9") for p in ("train", "test")],
        "4 training images in 2 classes",
    ),
    "a linked class": (
        lambda data: (data / "train/emu").symlink_to(data / "train/dog"),
        "6 training images in 3 classes",
    ),
    "a large photograph": (lambda data: image(data / "train/cat/x.png", 900, 4), "5 training images in 2 classes"),
}


@pytest.mark.parametrize("name", LEGAL_TREES)
def test_legal_class_folders_are_trained_on_whole(scripts, tmp_path, name):
    change, expected = LEGAL_TREES[name]
    change(folders(tmp_path / "data"))
    assert expected in trained(scripts, FOLDER.replace("batch_size 4", "batch_size 3"), tmp_path)


LEGAL_LISTS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "a byte order mark": lambda text: "\ufeff" + text,
    "blank lines, no last newline": lambda text: text.replace("\n", "\n\n").rstrip(),
}


@pytest.mark.parametrize("name", LEGAL_LISTS)
def test_legal_lists_are_trained_on_whole(scripts, tmp_path, name):
    list_with(LEGAL_LISTS[name])(tmp_path)
    assert "4 training images in 2 of 1000 classes" in trained(scripts, IMAGENET, tmp_path)


def test_official_annotations_and_linked_folders_are_trained_on(scripts, tmp_path):
    annotations(lambda content: None)(tmp_path)
    (tmp_path / "data/train_val2018").rename(tmp_path / "elsewhere")
    (tmp_path / "data/train_val2018").symlink_to(tmp_path / "elsewhere")
    assert "4 training images in 2 of 8142 classes" in trained(scripts, INA, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Any file at all

PROPERTY = settings(
    max_examples=150,
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
@given(text=TEXTS | st.text())
def test_any_text_is_a_whole_list_or_is_refused(tmp_path, text):
    paths_or_refusal(write(tmp_path / "x.txt", text.encode("utf-8", "surrogatepass")))


@PROPERTY
@given(content=st.binary())
def test_any_bytes_are_a_whole_list_or_are_refused(tmp_path, content):
    paths_or_refusal(write(tmp_path / "x.txt", content))
    paths_or_refusal(write(tmp_path / "x.json", content))


@PROPERTY
@given(content=st.fixed_dictionaries(ROWS) | st.recursive(IDS, lambda inner: st.lists(inner, max_size=3)))
def test_any_json_is_a_whole_list_or_is_refused(tmp_path, content):
    paths_or_refusal(write(tmp_path / "x.json", json.dumps(content)))


@PROPERTY
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=20), crlf=st.booleans())
def test_a_right_list_is_read_line_by_line(tmp_path, labels, crlf):
    lines = [f"a b/{i}.jpg {label}" for i, label in enumerate(labels)]
    paths, found = read_image_list(write(tmp_path / "x.txt", ("\r\n" if crlf else "\n").join(lines)), 3)
    assert [f"{path} {label}" for path, label in zip(paths, found, strict=True)] == lines


YAML_KEYS = st.sampled_from(["lr", "seed", "dataset", "name", "_BASE_", "<<", "lr_steps", "arbloss", "data_path"])
YAML_VALUES = st.sampled_from(
    ["0.1", "x.yaml", "y", "&a [*a]", "!!python/name:os.system", "!!set {a}", "[" * 99, "1e999"]
)
YAML_LINES = st.tuples(YAML_KEYS, st.just(": "), YAML_VALUES | st.text(max_size=6), st.just("\n")).map("".join)


@PROPERTY
@given(
    content=st.lists(YAML_LINES, max_size=5).map(lambda lines: "".join(lines).encode("utf-8", "replace")) | st.binary()
)
def test_any_file_is_a_configuration_or_is_refused_by_its_name(tmp_path, content):
    path = write(tmp_path / "x.yaml", content)
    try:
        cfg, _ = read_config(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert cfg.is_frozen() and cfg.lr > 0
