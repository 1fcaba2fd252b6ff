"""Several processes, end to end: the same gradients and metrics as one, both launchers, two nodes, and failures."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import train_stage1
from datasets.loaders import EvalLoader
from tests.conftest import ROOT, manager_of
from tests.trees import make_tree
from utils import build, distributed
from utils.config import load_config
from utils.evaluation import evaluate
from utils.precision import new_scaler
from utils.run.folder import new_folder
from utils.run.log import RunLog
from utils.seed import generator
from utils.step import Step

IMAGENET = "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml"
PLACES = "config/places/places_resnet50_arbloss_ugcc_mixup.yaml"
DIGITS = "config/digits/digits_imb005.yaml"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
MISLAS = re.compile(r"\* (?:Acc@1|ECE) .*")

# ---------------------------------------------------------------------------------------------------------------------
# What is started here, and the certainty that nothing of it is left


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def processes_of(folder: Path) -> list[int]:
    """Every process that has ``folder`` in its command line, as all do that are started here."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def started(folder: Path, *command: object, **variables: str) -> Iterator[SimpleNamespace]:
    """Python with ``command``: ``process``, and ``out`` and ``err`` that read what it has said so far.

    At the end of the block all that has ``folder`` in its command line is ended.
    """
    files = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with files[0].open("w") as out, files[1].open("w") as err:
        arguments = [sys.executable, *map(str, command)]
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=out, stderr=err)
    try:
        yield SimpleNamespace(process=process, out=files[0].read_text, err=files[1].read_text)
    finally:
        process.terminate()  # a launcher that is killed leaves its processes alone
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def completed(folder: Path, *command: object, **variables: str) -> SimpleNamespace:
    """The same, run to its end: ``code``, ``out`` and ``err``."""
    with started(folder, *command, **variables) as run:
        code = run.process.wait(timeout=240)
        return SimpleNamespace(code=code, out=run.out(), err=run.err())


def wait_for(condition, run: SimpleNamespace, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, run.err()
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's own loop and evaluation, in groups of 4, 3, 2 and 1 processes

# Arrangements (processes, passes) that give the same gradients: the first is the reference. 35 images in batches of 17
# are shares of 8 and 9, and a last batch of one image, of which one process (or pass) has no share.
PLAIN = [(1, 1), (2, 1), (1, 2), (2, 2)]
SAME = {
    "cross-entropy": ("ce", "global", 0.0, 17, PLAIN),
    "global counts": ("arb", "global", 0.0, 17, PLAIN),
    "synced counts": ("arb", "batch_synced", 0.0, 17, PLAIN),
    "synced counts, two images for three": ("arb", "batch_synced", 0.0, 11, [(1, 1), (3, 1)]),
    "batch counts and mixup in two parts": ("arb", "batch", 1.0, 17, [(1, 2), (2, 1)]),
    "batch counts and mixup in four parts": ("arb", "batch", 1.0, 17, [(1, 4), (2, 2)]),
    "synced counts, three images for four passes": ("arb", "batch_synced", 0.0, 16, PLAIN),
}
IMAGES = 35
EVAL_BATCHES = (37, 200, 500)  # of 400 images: 11 batches, 2 and 1
WORLDS = (4, 3, 2, 1)


class Still(nn.Module):
    """The project's model with batch norm in eval mode whatever the loop asks for: each process would normalise by its
    own share. In float64: sums in another order round otherwise, and in float32 a gradient near 0 would differ by more
    than the tolerance."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double()

    def train(self, mode: bool = True) -> "Still":
        return super().train(False)

    def forward(self, images: Tensor, with_features: bool = False):
        return self.model(images.double(), with_features)


class Gradients(torch.optim.SGD):
    """An optimizer that keeps the gradients of every step, and moves nothing."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), lr=1.0)
        self.kept: list[Tensor] = []

    def step(self, closure=None) -> None:
        self.kept.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))


def main(folder: Path, ports: list[str]) -> None:
    """What each of four processes does: groups of the first ``world_size`` of them, one after another."""
    rank = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every group has a store of its own
    for world_size, port in zip(WORLDS, ports, strict=True):
        os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_PORT": port}
        if rank < world_size:
            work(folder / f"{rank} of {world_size}.pt")


def work(path: Path) -> None:
    """One member's part in one group: its gradients, evaluations and buffers."""
    cfg = load_config(DIGITS, ["image_size", "8", "backbone", "resnet20", "val_per_class", "2"])
    with distributed.processes("cpu") as device:
        data = build.load_data(cfg, cfg.class_map, device)
        found = {"gradients": {}, "train": {}, "turn": turn(path.parent)}
        for name, (loss, counts, alpha, batch_size, arrangements) in SAME.items():
            for accumulate in (k for world_size, k in arrangements if world_size == distributed.world_size()):
                case = {"loss": loss, "class_counts": counts, "mixup": alpha > 0, "batch_size": batch_size}
                overrides = [str(part) for item in {**case, "accumulate": accumulate}.items() for part in item]
                options = load_config(DIGITS, [*overrides, "backbone", "resnet20"])
                key = (name, distributed.world_size(), accumulate)
                found["train"][key], found["gradients"][key] = gradients(options, data, device, path.parent)
        found |= evaluations(cfg, data, device)
        torch.save(found, path)


def turn(folder: Path) -> tuple[int, int]:
    """When this process went through :func:`distributed.main_first`: four processes on two nodes."""
    local_rank = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(distributed.rank() % 2)
    with distributed.main_first():
        entered = time.monotonic_ns()
        time.sleep(0.05)
        left = time.monotonic_ns()
    os.environ["LOCAL_RANK"] = local_rank
    return entered, left


def gradients(cfg, data, device: torch.device, folder: Path) -> tuple[dict, Tensor]:
    """An epoch by the trainer's own loop over a few images: its row, and the gradients [steps, parameters]."""
    few = torch.linspace(0, len(data.train.targets) - 1, IMAGES).long()
    data = dataclasses.replace(data, train=type(data.train)(data.train.images[few], data.train.targets[few]))
    rank, world_size = distributed.rank(), distributed.world_size()
    loader = data.train_loader(cfg.batch_size, cfg.seed, device, rank, world_size, cfg.accumulate)
    model = Still(build.new_model(cfg, data))
    optimizer = Gradients(model)
    with RunLog(new_folder(str(folder / "saved"), "run"), "run") as run:
        parallel, method = distributed.parallel(model, device), build.new_method(cfg, data)
        step = Step(parallel, method, optimizer, new_scaler(cfg.precision, device), device)
        row = train_stage1.train_epoch(step, loader, run, manager_of(run, loader, step), 0, cfg.seed, print_freq=1000)
    kept = torch.stack(optimizer.kept)
    everyones = distributed.gather_rows(kept[None])
    assert torch.equal(everyones, kept.expand_as(everyones)), "the processes step in different directions"
    return row["train"], kept


def evaluations(cfg, data, device: torch.device) -> dict:
    """Reports and predictions by batch size, and the buffers; every process begins with statistics of its own."""
    shares = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    model = build.new_model(cfg, data)
    for module in model.modules():
        module.momentum = 1.0  # of batch norm: one batch makes the statistics
    model(next(data.train_loader(200, 0, device).epoch(0)).images)
    for buffer in model.buffers():
        buffer += distributed.rank()
    pixels, held_out = data.test_loader(device).pixels, data.val_loader(device, **shares)
    groups = build.class_groups(cfg, data)
    found = {"report": {}, "predictions": {}, "targets": data.test.targets}
    for size in EVAL_BATCHES:
        test = EvalLoader(pixels, data.test.targets, size, device, **shares)
        evaluation = evaluate(model, test, held_out, data.class_counts, groups, cfg.precision)
        found["report"][size] = json.dumps(evaluation.entries)
        found["predictions"][size] = tuple(evaluation.predictions)
    return {**found, "buffers": dict(model.named_buffers())}


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> dict[int, list[dict]]:
    """World size -> what each of its members found."""
    folder = tmp_path_factory.mktemp("groups")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4]
    run = completed(folder, *launcher, "-m", "tests.test_several_processes", folder, *(free_port() for _ in WORLDS))
    assert run.code == 0, run.err
    return {size: [torch.load(folder / f"{r} of {size}.pt") for r in range(size)] for size in WORLDS}


@pytest.mark.parametrize("name", SAME)
def test_gradients_are_those_of_the_global_batch_however_it_is_divided(groups, name):
    *_, batch_size, arrangements = SAME[name]
    found = {(w, k): groups[w][0]["gradients"][name, w, k] for w, k in arrangements}
    reference = found[arrangements[0]]
    assert len(reference) == -(-IMAGES // batch_size)
    assert all(step.norm() > 1e-3 for step in reference[:-1])
    for gradient in found.values():
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["cross-entropy", "global counts", "synced counts, two images for three"])
def test_a_last_batch_with_fewer_images_than_processes_has_a_gradient(groups, name):
    """Of one image with the batch's counts there is none: its class is the only one."""
    assert groups[1][0]["gradients"][name, 1, 1][-1].norm() > 1e-3


@pytest.mark.parametrize("name", SAME)
def test_training_averages_are_those_of_the_global_batch(groups, name):
    arrangements = SAME[name][-1]
    first, *others = ([member["train"][name, w, k] for member in groups[w]] for w, k in arrangements)
    for members in [first, *others]:
        assert all(member == pytest.approx(first[0], rel=1e-9) for member in members)


def test_mixup_within_shares_is_not_mixup_of_the_whole(groups):
    """What the comparison above would miss if nothing were mixed."""
    two = groups[2][0]["gradients"]["batch counts and mixup in two parts", 2, 1]
    four = groups[2][0]["gradients"]["batch counts and mixup in four parts", 2, 2]
    assert (two - four).norm() > 0.1 * two.norm()


@pytest.mark.parametrize("size", EVAL_BATCHES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_number_of_processes_reports_the_same_to_the_last_digit(groups, world_size, size):
    """Also with more processes than batches."""
    alone = groups[1][0]
    assert len(alone["predictions"][size][0].unique()) > 1
    for member in groups[world_size]:
        assert member["report"][size] == alone["report"][size]
        assert '"val"' in member["report"][size]
        for ours, theirs in zip(member["predictions"][size], alone["predictions"][size], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(member["predictions"][size][-1], member["targets"])  # in the data set's order


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_process_is_evaluated_with_the_first_ones_statistics(groups, world_size):
    alone = groups[1][0]["buffers"]
    for member in groups[world_size]:
        assert member["buffers"].keys() == alone.keys()
        assert all(torch.equal(member["buffers"][name], buffer) for name, buffer in alone.items())


def test_the_first_process_of_all_goes_first_then_the_first_of_the_other_node_then_the_rest(groups):
    entered, left = zip(*(found["turn"] for found in groups[4]), strict=True)
    assert left[0] <= entered[2]
    assert left[2] <= min(entered[1], entered[3])


# ---------------------------------------------------------------------------------------------------------------------
# The scripts under their launchers


def script(name: str, cfg: str, *overrides: object) -> list[object]:
    return [f"./{name}", "--cfg", f"./{cfg}", "device", "cpu", "workers", 1, "image_size", 64, *overrides]


def training(tree: Path, save_dir: Path, *overrides: object) -> list[object]:
    short = ["backbone", "resnet10", "batch_size", 16, "num_epochs", 1, "print_freq", 2]
    return script("train_stage1.py", IMAGENET, *short, "data_path", tree, "save_dir", save_dir, *overrides)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """ImageNet-LT with 64 training images, and with 130 test images, which are two batches."""
    return make_tree(tmp_path_factory.mktemp("tree"), "imagenet", test=130)


def only_run(save_dir: Path) -> SimpleNamespace:
    """The one folder in ``save_dir``, its rows without times, and the last two lines that scripts of the field read."""
    (folder,) = save_dir.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (log,) = (folder / "logs").iterdir()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    rows = [{key: value for key, value in row.items() if key != "timing"} for row in rows]
    return SimpleNamespace(folder=folder, rows=rows, log=log.read_text(), lines=MISLAS.findall(log.read_text())[-2:])


@pytest.fixture(scope="module")
def launched(tree, tmp_path_factory) -> SimpleNamespace:
    """A run by torch.distributed.launch in two processes, as the originals' users start theirs."""
    folder = tmp_path_factory.mktemp("launched")
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", 2, "--master_port", free_port()]
    done = completed(folder, *launcher, *training(tree, folder / "saved"))
    assert done.code == 0, done.err
    return SimpleNamespace(**vars(only_run(folder / "saved")), out=done.out)


def assert_one_run_of_two_processes(run: SimpleNamespace, said: str) -> None:
    """One log with every line once, one row, and the same lines in the terminal."""
    assert [row["epoch"] for row in run.rows] == [0]
    assert len(run.lines) == 2
    steps = ("Epoch: [0][0/4]", "Epoch: [0][2/4]")
    for line in ("2 processes: each has its own mixup pairs", *steps, *run.lines, "last epoch (epoch 0)"):
        assert run.log.count(line) == 1
        assert said.count(line) == 1
    assert (run.folder / "ckps" / "current.pth.tar").is_file()
    assert (run.folder / "summary.json").is_file()


def test_torch_distributed_launch_trains_one_run(launched):
    assert_one_run_of_two_processes(launched, launched.out)


@pytest.fixture(scope="module", params=[1, 3], ids=["one process", "three processes"])
def evaluated(request, launched, tree, tmp_path_factory) -> SimpleNamespace:
    """What eval.py says and writes of that run's checkpoint; the second of two batches is the third process's."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = copytree(launched.folder, folder / launched.folder.name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", request.param]
    command = script("eval.py", IMAGENET, "backbone", "resnet10", "data_path", tree)
    checkpoint = run / "ckps" / "current.pth.tar"
    done = completed(folder, *(launcher if request.param > 1 else []), *command, "resume", checkpoint)
    assert done.code == 0, done.err
    return SimpleNamespace(out=done.out, report=run / "eval" / "current")


def test_eval_ends_with_the_training_logs_last_lines_whatever_the_number_of_processes(launched, evaluated):
    assert MISLAS.findall(evaluated.out) == launched.lines
    assert evaluated.out.endswith("\n".join(launched.lines) + "\n")


def test_eval_reports_what_the_training_did(launched, evaluated):
    """Another memory layout of the weights may round another way on another CPU, below what is printed."""
    ours, theirs = json.loads((evaluated.report / "metrics.json").read_text()), launched.rows[-1]["test"]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    assert (evaluated.report / "per_class.csv").read_text().count("\n") == 1001


@pytest.mark.slow
def test_two_nodes_train_the_same_run(launched, tree, tmp_path):
    """Two launchers that meet on the loopback, one process each; what they train is what one node with two trains."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", tmp_path.name]
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, *meeting]
    commands = [[*launcher, "--node_rank", rank, *training(tree, tmp_path / "saved")] for rank in (0, 1)]
    with started(tmp_path, *commands[0]) as first, started(tmp_path, *commands[1]) as second:
        for node in (first, second):
            assert node.process.wait(timeout=240) == 0, node.err()
        said = first.out() + second.out()
    run = only_run(tmp_path / "saved")
    assert_one_run_of_two_processes(run, said)
    assert run.rows == launched.rows


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_node_that_cannot_begin_ends_the_other_within_a_minute(tree, tmp_path, wrong):
    """Its configuration lies on one node only; the other would wait for it to join."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", tmp_path.name]
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, *meeting]
    commands = [[*launcher, "--node_rank", rank, *training(tree, tmp_path / "saved")] for rank in (0, 1)]
    place = commands[wrong].index(f"./{IMAGENET}")
    commands[wrong][place] = "./config/absent.yaml"
    began = time.monotonic()
    with started(tmp_path, *commands[0]) as first, started(tmp_path, *commands[1]) as second:
        nodes = (first, second)
        assert all(node.process.wait(timeout=60) != 0 for node in nodes)
        assert time.monotonic() - began < 60
        assert re.search(r"error \(rank \d\): config/absent.yaml: no such configuration file", nodes[wrong].err())
        assert "another process of this run has ended" in nodes[1 - wrong].err()
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Places: what is frozen stays


def assert_only_block_and_classifier_moved(folder: Path, *overrides: object) -> None:
    """The checkpoint against the initial weights, which its own seed gives again."""
    saved = torch.load(folder / "ckps" / "current.pth.tar", weights_only=True)
    cfg = load_config(PLACES, list(map(str, overrides)))
    initial = build.new_model(cfg, SimpleNamespace(num_classes=365))
    backbone = initial.backbone.state_dict()
    frozen = {name: value for name, value in saved["state_dict_model"].items() if not name.startswith("fc.")}
    assert {name.removeprefix("module.") for name in frozen} == set(backbone)
    assert any(name.endswith("running_mean") for name in backbone)
    for name, value in frozen.items():
        assert torch.equal(value, backbone[name.removeprefix("module.")]), name
    moved = {"state_dict_block": initial.block, "state_dict_classifier": initial.classifier}
    for key, module in moved.items():
        now = {name.removeprefix("module."): value for name, value in saved[key].items()}
        assert now.keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            assert not torch.equal(value, now[name]), f"{key} {name}"


FROZEN = ["pretrained", "False", "image_size", 64]


def test_the_backbone_of_places_does_not_move_in_an_epoch(lists, tmp_path):
    options = [*FROZEN, "batch_size", 16, "num_epochs", 1, "workers", 0, "device", "cpu"]
    paths = ["data_path", lists / "places", "save_dir", tmp_path]
    train_stage1.main(["--cfg", PLACES, *map(str, [*options, *paths])])
    assert_only_block_and_classifier_moved(only_run(tmp_path).folder, *FROZEN)


def test_torchrun_trains_one_run_of_places_in_two_processes_and_its_backbone_does_not_move(lists, tmp_path):
    options = ["pretrained", "False", "batch_size", 16, "num_epochs", 1, "print_freq", 2]
    paths = ["data_path", lists / "places", "save_dir", tmp_path / "saved"]
    done = completed(tmp_path, *TORCHRUN, *script("train_stage1.py", PLACES, *options, *paths))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "saved")
    assert_one_run_of_two_processes(run, done.out)
    assert_only_block_and_classifier_moved(run.folder, *FROZEN)


# ---------------------------------------------------------------------------------------------------------------------
# A rank that fails ends all


def rank_of(pid: int) -> str | None:
    """The rank that a launcher gave to the process; None for other processes."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((v.decode()[5:] for v in variables if v.startswith(b"RANK=")), None)
    return None


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M).group(1))
    return 0


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@needs_proc
@pytest.mark.parametrize("killed", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_killed_rank_ends_all_within_a_minute(tree, tmp_path, killed):
    command = training(tree, tmp_path / "saved", "num_epochs", 1000, "eval_every", 1000)
    with started(tmp_path, *TORCHRUN, *command) as run:
        wait_for(lambda: "Epoch: [1][0/4]" in run.out(), run)
        launcher = run.process.pid
        ranks = {rank_of(pid): pid for pid in processes_of(tmp_path) if parent_of(pid) == launcher}
        assert {"0", "1"} <= ranks.keys()
        os.kill(ranks[killed], signal.SIGKILL)
        began = time.monotonic()
        assert run.process.wait(timeout=60) != 0
        wait_for(lambda: not processes_of(tmp_path), run, 60)  # with those that decode images
        assert time.monotonic() - began < 60
        assert re.search(r"exitcode\s*: -9\b", run.err())
        assert "Signal 9 (SIGKILL)" in run.err()


@needs_proc
def test_a_missing_image_ends_all_within_a_minute_with_its_name(tree, tmp_path):
    """One that the second process meets in the third step."""
    copy = copytree(tree, tmp_path / "tree")
    listed = (copy / "ImageNet_LT_train.txt").read_text().splitlines()
    order = generator(0, 0, "order").permutation(len(listed))
    missing = copy / listed[order[2 * 16 + 9]].split()[0]
    missing.unlink()
    launcher = [*TORCHRUN, "--redirects", 3, "--log-dir", tmp_path / "logs"]
    with started(tmp_path, *launcher, *training(copy, tmp_path / "saved")) as run:
        wait_for(lambda: any(said(tmp_path, 1)), run)
        began = time.monotonic()
        assert run.process.wait(timeout=60) != 0
        wait_for(lambda: not processes_of(tmp_path), run, 60)
        assert time.monotonic() - began < 60
        assert re.search(r"exitcode\s*: 2\b", run.err())
    (line,) = said(tmp_path, 1)  # and no traceback
    assert re.fullmatch(
        rf"error \(rank 1\): {re.escape(str(missing))}: no such image; this run has no checkpoint yet", line
    )
    for line in said(tmp_path, 0):
        assert re.fullmatch(r"error \(rank 0\): another process of this run has ended; .*", line)


def said(folder: Path, rank: int) -> list[str]:
    """What a rank wrote on standard error, by lines."""
    files = folder.glob(f"logs/*/attempt_0/{rank}/stderr.log")
    return [line for path in files for line in path.read_text().splitlines()]


def test_synced_batch_norm_is_refused_on_a_cpu_in_one_line(tmp_path):
    launcher = [*TORCHRUN, "--redirects", 3, "--log-dir", tmp_path / "logs"]
    command = ["train_stage1.py", "--cfg", DIGITS, "device", "cpu", "sync_bn", "True", "save_dir", tmp_path / "saved"]
    done = completed(tmp_path, *launcher, *command)
    assert done.code != 0
    assert not (tmp_path / "saved").exists()
    assert re.search(r"exitcode\s*: 2\b", done.err)
    lines = [line for rank in (0, 1) for line in said(tmp_path, rank)]
    assert lines
    assert all(re.fullmatch(r"error( \(rank [01]\))?: sync_bn: True needs CUDA; .*", line) for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
