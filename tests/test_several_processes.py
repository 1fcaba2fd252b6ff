"""Several processes, end to end: the same gradients and metrics as one, both launchers, two nodes, and failures."""

import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import train_stage1
from datasets import Data
from datasets.loaders import EvalLoader
from tests.conftest import ARB, ROOT, SHORT, manager_of
from tests.scripts import (
    assert_nothing_left,
    completed,
    ended,
    forked_scripts,  # noqa: F401
    free_port,
    ranks_of,
    script_of,
    started,
    wait_for,
)
from tests.scripts import processes_of as processes_of  # for other test files
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
# The trainer's own loop and evaluation, in groups of 4, 3, 2 and 1 processes

# Arrangements (processes, passes) that give the same gradients: the first is the reference. 35 images in batches of 17
# are shares of 8 and 9, and a last batch of one image, of which one process (or pass) has no share.
PLAIN = [(1, 1), (2, 1), (1, 2), (2, 2)]
CMO = {"mix": "cmo", "cmo_idle": 0, "mix_prob": 0.9, "augment": "autoaugment", "cutout": 4}
MIXUP = {"mixup": True}
MOVING = {"nc_rows": 1.0, "nc_means": 1.0, "nc_dual": 1.0, "spa": "proj"}
SAME = {
    "cross-entropy": ("ce", "global", {}, 17, PLAIN),
    "global counts": ("arb", "global", {}, 17, PLAIN),
    "synced counts": ("arb", "batch_synced", {}, 17, PLAIN),
    "synced counts, two images for three": ("arb", "batch_synced", {}, 11, [(1, 1), (3, 1)]),
    "batch counts and mixup in two parts": ("arb", "batch", MIXUP, 17, [(1, 2), (2, 1)]),
    "batch counts and mixup in four parts": ("arb", "batch", MIXUP, 17, [(1, 4), (2, 2)]),
    "synced counts, three images for four passes": ("arb", "batch_synced", {}, 16, PLAIN),
    "CMO, global counts": ("arb", "global", CMO, 17, PLAIN),
    "sharpness-aware": ("arb", "global", {"sam": 0.5}, 17, [(1, 1), (2, 1), (3, 1)]),
    "CMO, batch counts in two parts": ("arb", "batch", CMO, 17, [(1, 2), (2, 1)]),
    "moving class means": ("ce", "global", MOVING, 17, [(1, 1), (2, 1)]),
    "moving class means and CMO, two images for three": ("ce", "global", CMO | MOVING, 11, [(1, 1), (3, 1)]),
}
IMAGES = 35
EVAL_BATCHES = (37, 200, 500)  # of 400 images: 11 batches, 2 and 1
WORLDS = (4, 3, 2, 1)
CFG = load_config(str(ROOT / DIGITS), ["image_size", "8", "backbone", "resnet8", "val_per_class", "2"])


class Still(nn.Module):
    """The project's model with batch norm in eval mode whatever the loop asks for: each process would normalise by its
    own share. In float64: sums in another order round otherwise, and in float32 a gradient near 0 would differ by more
    than the tolerance."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double()

    @property
    def classifier(self) -> nn.Module:
        return self.model.classifier

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
    for world_size, port in zip(WORLDS, ports, strict=True):
        os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_PORT": port}
        if rank < world_size:
            work(folder / f"{rank} of {world_size}.pt")


def work(path: Path) -> None:
    """One member's part in one group: its gradients, evaluations and buffers."""
    with distributed.processes("cpu") as device:
        data = digits(device)
        found = {"gradients": {}, "train": {}, "turn": turn(path.parent)}
        for name, (loss, counts, images, batch_size, arrangements) in SAME.items():
            for accumulate in (k for world_size, k in arrangements if world_size == distributed.world_size()):
                case = {"loss": loss, "class_counts": counts, "batch_size": batch_size, **images}
                overrides = [str(part) for item in {**case, "accumulate": accumulate}.items() for part in item]
                options = load_config(DIGITS, [*overrides, "backbone", "resnet8"])
                key = (name, distributed.world_size(), accumulate)
                found["train"][key], found["gradients"][key] = gradients(options, data, device, path.parent)
        found |= evaluations(CFG, data, device)
        torch.save(found, path)


@functools.cache
def digits(device: torch.device) -> Data:
    """Read once by every process, in the first group."""
    return build.load_data(CFG, CFG.class_map, device)


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
    loader = build.train_loader(cfg, data, device, rank=rank, world_size=world_size)
    model = Still(build.new_model(cfg, data))
    optimizer = Gradients(model)
    with RunLog(new_folder(str(folder / "saved"), "run"), "run") as run:
        parallel, method = distributed.parallel(model, device), build.new_method(cfg, data, model.model)
        step = Step(parallel, method, optimizer, new_scaler(cfg.precision, device), device, sam=cfg.sam)
        row = train_stage1.train_epoch(step, loader, run, manager_of(run, loader, step), 0, cfg.seed, print_freq=1000)
    for buffer in method.buffers():  # moving class means
        assert torch.equal(distributed.gather_rows(buffer[None]), buffer.expand(world_size, *buffer.shape))
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
    model(next(data.train_loader(200, 0, device).epoch(0)).augment())
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
def groups(scripts, tmp_path_factory) -> dict[int, list[dict]]:
    """World size -> what each of its members found."""
    folder = tmp_path_factory.mktemp("groups")
    with scripts.group(4, folder, __file__, folder, *(free_port() for _ in WORLDS)) as ranks:
        done = [ended(rank) for rank in ranks]
    assert [rank.code for rank in done] == [0] * 4, [rank.err for rank in done]
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
    found = [member["train"][name, w, k] for w, k in SAME[name][-1] for member in groups[w]]
    assert all(row == pytest.approx(found[0], rel=1e-9) for row in found)


def test_mixup_within_shares_is_not_mixup_of_the_whole(groups):
    """What the comparison above would miss if nothing were mixed."""
    two = groups[2][0]["gradients"]["batch counts and mixup in two parts", 2, 1]
    four = groups[2][0]["gradients"]["batch counts and mixup in four parts", 2, 2]
    assert (two - four).norm() > 0.01 * two.norm()


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


def training(tree: Path, save_dir: Path, *overrides: object) -> list[object]:
    """Of ImageNet-LT, by processes that decode images."""
    command = ["./train_stage1.py", "--cfg", f"./{IMAGENET}", "device", "cpu", "workers", 1, "image_size", 64]
    short = ["backbone", "resnet10", "batch_size", 16, "num_epochs", 1, "print_freq", 2]
    return [*command, *short, "data_path", tree, "save_dir", save_dir, *overrides]


def of_digits(save_dir: Path, *overrides: object) -> list[object]:
    """Four steps an epoch."""
    short = [*SHORT, "batch_size", 128, "print_freq", 2, "num_epochs", 1]
    return ["./train_stage1.py", "--cfg", f"./{ARB}", "device", "cpu", *short, "save_dir", save_dir, *overrides]


def only_run(save_dir: Path) -> SimpleNamespace:
    """The one folder in ``save_dir``, its rows without times, and the last two lines that scripts of the field read."""
    (folder,) = save_dir.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (log,) = (folder / "logs").iterdir()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    rows = [{key: value for key, value in row.items() if key != "timing"} for row in rows]
    return SimpleNamespace(folder=folder, rows=rows, log=log.read_text(), lines=MISLAS.findall(log.read_text())[-2:])


@pytest.fixture(scope="module")
def launched(scripts, tmp_path_factory) -> SimpleNamespace:
    """A run of two processes with the argument that torch.distributed.launch appends; the environment decides."""
    folder = tmp_path_factory.mktemp("launched")
    script, *words = of_digits(folder / "saved")
    with scripts.group(2, folder, script, "--local-rank=1", *words) as ranks:
        done = [ended(rank) for rank in ranks]
    assert [rank.code for rank in done] == [0, 0], [rank.err for rank in done]
    return SimpleNamespace(**vars(only_run(folder / "saved")), out="".join(rank.out for rank in done))


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


def test_two_processes_train_one_run(launched):
    assert_one_run_of_two_processes(launched, launched.out)


@pytest.mark.slow
def test_torch_distributed_launch_trains_the_same_run(launched, tmp_path):
    """As the originals' users start theirs."""
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", 2, "--master_port", free_port()]
    done = completed(tmp_path, *launcher, *of_digits(tmp_path / "saved"))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "saved")
    assert_one_run_of_two_processes(run, done.out)
    assert run.rows == launched.rows


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)])
def evaluated(request, scripts, launched, tmp_path_factory) -> SimpleNamespace:
    """What eval.py says and writes of that run's checkpoint."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = copytree(launched.folder, folder / launched.folder.name)
    words = ["--cfg", ARB, "device", "cpu", *SHORT, "resume", run / "ckps" / "current.pth.tar"]
    with scripts.group(request.param, folder, "eval.py", *words) as ranks:
        done = [ended(rank) for rank in ranks]
    assert {rank.code for rank in done} == {0}, [rank.err for rank in done]
    return SimpleNamespace(out="".join(rank.out for rank in done), report=run / "eval" / "current")


def test_eval_ends_with_the_training_logs_last_lines_whatever_the_number_of_processes(launched, evaluated):
    assert MISLAS.findall(evaluated.out) == launched.lines
    assert evaluated.out.endswith("\n".join(launched.lines) + "\n")


def test_eval_reports_what_the_training_did(launched, evaluated):
    """Another memory layout of the weights may round another way on another CPU, below what is printed."""
    ours, theirs = json.loads((evaluated.report / "metrics.json").read_text()), launched.rows[-1]["test"]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    assert (evaluated.report / "per_class.csv").read_text().count("\n") == 11


def on_two_nodes(folder: Path) -> list[list[object]]:
    """The commands of two launchers that meet on the loopback, one process each."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", folder.name]
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, *meeting]
    return [[*launcher, "--node_rank", rank, *of_digits(folder / "saved")] for rank in (0, 1)]


@pytest.mark.slow
def test_two_nodes_train_the_same_run(launched, tmp_path):
    """What they train is what one node with two processes trains."""
    commands = on_two_nodes(tmp_path)
    with started(tmp_path, *commands[0]) as first, started(tmp_path, *commands[1]) as second:
        for node in (first, second):
            assert node.process.wait(timeout=240) == 0, node.err()
        said = first.out() + second.out()
    run = only_run(tmp_path / "saved")
    assert_one_run_of_two_processes(run, said)
    assert run.rows == launched.rows


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_node_that_cannot_begin_ends_the_other_within_a_minute(tmp_path, wrong):
    """Its configuration lies on one node only; the other would wait for it to join. By ranks: test_distributed.py."""
    commands = on_two_nodes(tmp_path)
    commands[wrong][commands[wrong].index(f"./{ARB}")] = "./config/absent.yaml"
    began = time.monotonic()
    with started(tmp_path, *commands[0]) as first, started(tmp_path, *commands[1]) as second:
        nodes = (first, second)
        assert all(node.process.wait(timeout=60) != 0 for node in nodes)
        assert time.monotonic() - began < 60
        assert re.search(r"error \(rank \d\): config/absent.yaml: ", nodes[wrong].err())
        assert distributed.LOST in nodes[1 - wrong].err()
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Places: what is frozen stays


def assert_only_block_and_classifier_moved(folder: Path, *overrides: object) -> None:
    """The checkpoint against the initial weights, which its own seed gives again."""
    saved = torch.load(folder / "ckps" / "current.pth.tar", weights_only=True)
    cfg = load_config(PLACES, list(map(str, overrides)))
    initial = build.new_model(cfg, SimpleNamespace(num_classes=365, image_size=32))
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


FROZEN = ["pretrained", "False", "image_size", 32]


def test_the_backbone_of_places_does_not_move_in_an_epoch(lists, tmp_path):
    options = [*FROZEN, "batch_size", 32, "num_epochs", 1, "workers", 0, "device", "cpu"]
    paths = ["data_path", lists / "places", "save_dir", tmp_path]
    train_stage1.main(["--cfg", PLACES, *map(str, [*options, *paths])])
    assert_only_block_and_classifier_moved(only_run(tmp_path).folder, *FROZEN)


@pytest.mark.slow
def test_the_backbone_of_places_does_not_move_in_two_processes(scripts, lists, tmp_path):
    options = [*FROZEN, "batch_size", 16, "num_epochs", 1, "print_freq", 2, "workers", 1, "device", "cpu"]
    paths = ["data_path", lists / "places", "save_dir", tmp_path / "saved"]
    with scripts.group(2, tmp_path, "train_stage1.py", "--cfg", PLACES, *options, *paths) as ranks:
        done = [ended(rank) for rank in ranks]
    assert [rank.code for rank in done] == [0, 0], [rank.err for rank in done]
    run = only_run(tmp_path / "saved")
    assert_one_run_of_two_processes(run, done[0].out)
    assert_only_block_and_classifier_moved(run.folder, *FROZEN)


# ---------------------------------------------------------------------------------------------------------------------
# A rank that fails ends all


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


# The least that has a group: the imports of the trainer, three times, are most of what a real launch costs.
STEPPING = """
import sys, time
import torch
from utils import distributed
from utils.command_line import exit_code
def main():
    with distributed.processes("cpu"):
        for step in range(100_000):
            distributed.all_reduce_sum(torch.ones(1))
            if distributed.is_main() and step == 2:
                print("Epoch: [0][2/4]", flush=True)
            time.sleep(0.02)
sys.exit(exit_code(main))
"""


@needs_proc
@pytest.mark.parametrize(
    ("words", "killed"),
    [
        ((), "1"),
        pytest.param(("num_epochs", 100_000, "eval_every", 100_000), "0", marks=pytest.mark.slow),
        pytest.param(("num_epochs", 100_000, "eval_every", 100_000), "1", marks=pytest.mark.slow),
    ],
    ids=["steps alone", "training, the first", "training, the second"],
)
def test_torchrun_runs_two_processes_and_a_killed_rank_ends_all_within_a_minute(tmp_path, words, killed):
    command = of_digits(tmp_path / "saved", *words) if words else [script_of(tmp_path, STEPPING)]
    with started(tmp_path, *TORCHRUN, *command, PYTHONPATH=str(ROOT)) as run:
        wait_for(lambda: "Epoch: [0][2/4]" in run.out(), run)
        ranks = ranks_of(tmp_path, run.process.pid)
        assert {"0", "1"} <= ranks.keys()
        os.kill(ranks[killed], signal.SIGKILL)
        began = time.monotonic()
        assert run.process.wait(timeout=60) != 0
        assert_nothing_left(tmp_path, 60)
        assert time.monotonic() - began < 60
        assert re.search(r"exitcode\s*: -9\b", run.err())
        assert "Signal 9 (SIGKILL)" in run.err()


@needs_proc
def test_a_missing_image_ends_all_within_a_minute_with_its_name(scripts, tmp_path):
    """One that the second process meets in the third step."""
    tree = make_tree(tmp_path / "tree", "imagenet")
    listed = (tree / "ImageNet_LT_train.txt").read_text().splitlines()
    order = generator(0, 0, "order").permutation(len(listed))
    missing = tree / listed[order[2 * 16 + 9]].split()[0]
    missing.unlink()
    command = training(tree, tmp_path / "saved", "image_size", 8)
    with scripts.group(2, tmp_path, *command) as ranks:
        done = [ended(rank, 60) for rank in ranks]
        assert_nothing_left(tmp_path, 60)
    (line,) = done[1].err.splitlines()  # and no traceback
    assert done[1].code == 2
    assert re.match(rf"error \(rank 1\): {re.escape(str(missing))}: .*; this run has no checkpoint yet$", line)
    assert (done[0].code, done[0].err) == (1, f"error (rank 0): {distributed.LOST}\n")


def test_synced_batch_norm_is_refused_on_a_cpu_in_one_line(scripts, tmp_path):
    command = ["train_stage1.py", "--cfg", DIGITS, "device", "cpu", "sync_bn", "True", "save_dir", tmp_path / "saved"]
    with scripts.group(2, tmp_path, *command) as ranks:
        done = [ended(rank) for rank in ranks]
    assert not (tmp_path / "saved").exists()
    for rank, found in enumerate(done):
        assert found.code == 2
        assert re.fullmatch(rf"error \(rank {rank}\): sync_bn: True needs CUDA; .*\n", found.err)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
