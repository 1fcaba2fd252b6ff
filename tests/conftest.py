"""One thread per process, processor time per test, and short runs by the real scripts that tests share."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

# Before torch is loaded, for this process and all that tests start: two workers of one thread each are faster than one
# of two, and far faster beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.multiprocessing

import train_stage1
from datasets.loaders import TrainLoader
from tests import null_gpu
from tests.trees import PATTERNS, make_tree
from utils.checkpoint import TrainState
from utils.command_line import exit_code
from utils.run.checkpoint_manager import CheckpointManager
from utils.run.log import RunLog
from utils.signals import NAMES, Signals
from utils.step import Step

ROOT = Path(__file__).parent.parent
ARB = "config/digits/digits_imb005_arbloss_mixup.yaml"
CE = "config/digits/digits_imb005.yaml"
SHORT = ["backbone", "resnet8", "image_size", "8", "batch_size", "64", "print_freq", "4"]  # 8 steps an epoch
INTERRUPT = signal.getsignal(signal.SIGINT)
SPENT = pytest.StashKey[dict[str, float]]()  # processor seconds by test


def pytest_configure(config: pytest.Config) -> None:
    """The workers of ``-m nullgpu`` see null GPUs: a library that has to be there before Python is."""
    if config.option.markexpr == "nullgpu":
        os.environ |= null_gpu.environment()


def processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note a test's processor time, with fixtures and children: a busy machine changes it less than its duration."""
    before = processor_seconds()
    try:
        return (yield)
    finally:
        item.config.stash.setdefault(SPENT, {})[item.nodeid] = processor_seconds() - before


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its times to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["processor_seconds"] = session.config.stash.get(SPENT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(SPENT, {}).update(output.get("processor_seconds", {}))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    spent = config.stash.get(SPENT, {})
    dearest = sorted(spent.items(), key=lambda pair: -pair[1])[:25]
    terminalreporter.section(f"{sum(spent.values()):.0f} s of processor time in {len(spent)} tests; the dearest")
    for name, seconds in dearest if len(spent) > 25 else []:
        terminalreporter.write_line(f"{seconds:8.2f} s  {name}")


@pytest.fixture(scope="session", autouse=True)
def in_the_repository() -> None:
    """Configuration files are named as the README names them."""
    os.chdir(ROOT)


@pytest.fixture(autouse=True)
def signals_as_usual():
    """A script that a signal has ended ignores further ones, and so would all that its process starts later.

    Before a test, too: a module's fixture may have run such a script, and all of this may itself have been started so.
    """
    handle_signals_as_usual()
    yield
    handle_signals_as_usual()


def handle_signals_as_usual() -> None:
    for number in {getattr(signal, name) for name in NAMES}:
        signal.signal(number, INTERRUPT if number == signal.SIGINT else signal.SIG_DFL)


def train(save_dir: Path, *overrides: object, cfg: str = ARB) -> Path:
    """Trains in this process and returns the run's folder."""
    before = set(save_dir.glob("*"))
    train_stage1.main(["--cfg", cfg, *SHORT, *map(str, overrides), "save_dir", str(save_dir)])
    new = set(save_dir.glob("*")) - before
    assert len(new) <= 1
    return new.pop() if new else save_dir


def manager_of(run: RunLog, loader: TrainLoader, step: Step) -> CheckpointManager:
    """For ``train_epoch`` alone: nothing is saved and no signal heard."""
    return CheckpointManager(run, Signals(), TrainState(), loader, step.meter, 0, {"model": step.model})


def failure(capsys, main, *arguments: object) -> SimpleNamespace:
    """Exit code and what was said on standard error by a script that is given bad input."""
    capsys.readouterr()
    code = exit_code(lambda: main([str(a) for a in arguments]))
    said = capsys.readouterr().err
    return SimpleNamespace(code=code, said=said, lines=said.strip().splitlines())


def stop_before(monkeypatch: pytest.MonkeyPatch, calls: int, kind: type = Step) -> None:
    """Send this process a SIGTERM before the run's micro-batch number ``calls``, from 0 on; ``kind``: of its step."""
    taken = itertools.count()

    def step(self, batch, draw, own=kind.__call__):
        if next(taken) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        own(self, batch, draw)

    monkeypatch.setattr(kind, "__call__", step)


def in_ranks(folder: Path, work: Callable[..., None], *arguments: object, world_size: int = 2) -> list[str]:
    """Call ``work(rank, *arguments)`` in processes with a launcher's environment; return what each wrote to stdout.

    ``work`` must be defined at a module's top level. The processes are forks of this one, which has imported torch
    already; CUDA cannot be forked, so beside it they are started anew.
    """
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    method = "spawn" if torch.cuda.is_available() else "fork"
    ranks = torch.multiprocessing.start_processes(
        _rank, (world_size, port, folder, work, arguments), nprocs=world_size, join=False, start_method=method
    )
    deadline = time.monotonic() + 120
    while not ranks.join(timeout=5):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail("a rank has not ended within two minutes")
    return [(folder / f"{rank}.out").read_text() for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: Path, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    torch.multiprocessing.set_start_method("fork", force=True)  # as in a launcher's processes, for workers that read
    sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **sizes}.items()}
    with (folder / f"{rank}.out").open("w") as out, contextlib.redirect_stdout(out):
        work(rank, *arguments)


def train_in_rank(rank: int, cfg: str, *overrides: object) -> None:
    train_stage1.main(["--cfg", cfg, *SHORT, "device", "cpu", *map(str, overrides)])


# The finished runs that tests share. Nobody writes into them; every one has its state after one of its two epochs.
TWO_EPOCHS = ["num_epochs", 2, "keep_epochs", "[1]"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a run with ARB-Loss and mixup."""
    return train(tmp_path_factory.mktemp("saved"), *TWO_EPOCHS)


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """The same run with diagnostics at every other step and neural collapse after its last epoch."""
    return train(tmp_path_factory.mktemp("saved"), *TWO_EPOCHS, "diagnostics", 2, "nc_every", 2)


@pytest.fixture(scope="session")
def cross_entropy(tmp_path_factory) -> Path:
    """A run with cross-entropy, without mixup."""
    return train(tmp_path_factory.mktemp("saved"), *TWO_EPOCHS, cfg=CE)


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a finished run in ``folder``, to write into."""
    return shutil.copytree(run, folder / run.name)


def stopped(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of a run of two epochs whose checkpoint is that after the first, with ``changes``; None removes a key.

    What the second epoch has written is still there: a resumed run takes it out.
    """
    copied = copy_of(run, folder)
    state = content(run, "epoch_1") | changes
    without = [key for key, value in changes.items() if value is None]
    torch.save({key: value for key, value in state.items() if key not in without}, current(copied))
    return copied


def current(folder: Path) -> Path:
    return folder / "ckps" / "current.pth.tar"


def log_of(folder: Path) -> str:
    (path,) = (folder / "logs").iterdir()
    return path.read_text()


@pytest.fixture(scope="session")
def lists(tmp_path_factory) -> Path:
    """A folder with small ``imagenet``, ``ina2018`` and ``places`` trees; tests do not write into them."""
    root = tmp_path_factory.mktemp("lists")
    for dataset in PATTERNS:
        make_tree(root, dataset)
    return root


def content(folder, name="current"):
    return torch.load(folder / "ckps" / f"{name}.pth.tar", weights_only=True)


def history(folder):
    """The rows of metrics.jsonl without times and rates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def assert_same_run(first, second):
    """Weights, optimizer, metrics, predictions and diagnostics, bit for bit."""
    a, b = content(first), content(second)
    for key in ("state_dict_model", "state_dict_classifier", "state_dict_method"):
        assert_same_tensors(a[key], b[key])
    one, other = (state["optimizer"]["state"] for state in (a, b))
    assert one.keys() == other.keys()
    for index in one:
        assert_same_tensors(one[index], other[index])
    assert torch.equal(a["best_acc1"], b["best_acc1"])
    assert history(first) == history(second)
    files = sorted(path.name for path in (first / "predictions").iterdir())
    assert files == sorted(path.name for path in (second / "predictions").iterdir())
    diagnostics = [path.name for path in first.glob("*.npz")]
    assert diagnostics == [path.name for path in second.glob("*.npz")]
    for name in [*(f"predictions/{name}" for name in files), *diagnostics]:
        one, other = (np.load(folder / name) for folder in (first, second))
        assert one.files == other.files
        assert all(np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f") for key in one.files)
