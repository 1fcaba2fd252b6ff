"""Two processes with a CUDA device each; kernels do nothing, but what NCCL carries arrives."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train_stage1
from tests import null_gpu
from tests.conftest import ARB, SHORT, current, failure, history, in_ranks, log_of
from tests.null_gpu import Operation
from tests.null_gpu.unjudged import unjudged
from tests.scripts import free_port
from tests.test_null_gpu import pytestmark
from utils import distributed
from utils.build import Training
from utils.run.checkpoint_manager import CheckpointManager

__all__ = ["pytestmark"]  # for pytest

PLACES = "config/places/places_resnet50_arbloss_ugcc_mixup.yaml"
LISTS = ["image_size", 32, "batch_size", 16, "workers", 1, "num_epochs", 1, "backbone", "resnet50", "pretrained", False]
CASES = {
    "plain": [ARB, *SHORT, "num_epochs", 1, "precision", "fp16", "max_grad_norm", 1],
    "resumed": [ARB, *SHORT, "num_epochs", 2, "nc_every", 1, "diagnostics", 2],
    "synced": [ARB, *SHORT, "num_epochs", 1, "sync_bn", True, "class_counts", "batch_synced"],
    "accumulated": [ARB, *SHORT, "num_epochs", 1, "accumulate", 2, "nc_within", 0.1, "nc_between", 0.1],
    "aligned": [ARB, *SHORT, "num_epochs", 1, "nc_rows", 1, "nc_means", 1, "nc_dual", 1, "spa", "slerp"],
    "frozen": [PLACES, *LISTS],
}


# ---------------------------------------------------------------------------------------------------------------------
# In each process


def train_all(rank: int, folder: Path, lists: Path, ports: list[int]) -> None:
    """Train every case in groups of their own, one after another, and write what this process saw."""
    with unjudged():
        seen = {"contexts at the start": null_gpu.contexts()}
        for (name, words), port in zip(CASES.items(), ports, strict=False):
            os.environ["MASTER_PORT"] = str(port)
            where = {"save_dir": folder / name, "print_freq": 4}
            where |= {"data_path": lists / "places"} if name == "frozen" else {}
            where |= {"resume": current(next((folder / "plain").iterdir()))} if name == "resumed" else {}
            seen[name] = train_one(["--cfg", *words, *(part for item in where.items() for part in item)])
        os.environ["MASTER_PORT"] = str(ports[-1])
        with distributed.processes("cuda") as device:
            seen |= agree(device)
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def train_one(words: list[object]) -> dict:
    null_gpu.take()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainings, steps = watch(patch)
        if "sync_bn" in words:  # torch looks which processes have images at all, except within a capture
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        train_stage1.main(list(map(str, words)))
    operations = [operation for step in steps for operation in step] + null_gpu.take()
    return {
        "contexts": null_gpu.contexts(),
        "devices": sorted({operation.device for operation in operations}),
        "collectives": sorted({operation.name for operation in operations if operation.kind == "collective"}),
        "waits": list(map(waits, steps)),
        "reduced": [reduced(step) for step in steps],
        "warnings": [str(warning.message) for warning in warned],
        "model": model_of(trainings[0]),
    }


def watch(patch: pytest.MonkeyPatch) -> tuple[list[Training], list[list[Operation]]]:
    """What a run trains, and what each of its steps asked of the device."""
    trainings, steps = [], []

    def new_step(cfg, training, components, own=train_stage1.new_step):
        trainings.append(training)
        return own(cfg, training, components)

    def between_steps(self, done, seconds, own=CheckpointManager.between_steps):
        own(self, done, seconds)
        steps.append(null_gpu.take())

    patch.setattr(train_stage1, "new_step", new_step)
    patch.setattr(CheckpointManager, "between_steps", between_steps)
    return trainings, steps


def waits(operations: list[Operation]) -> bool:
    """Whether the host waited for a stream. (For events DistributedDataParallel waits, which times its own steps: the
    first ten and every hundredth.)"""
    return any(operation.kind == "sync" and operation.name != "event" for operation in operations)


def reduced(operations: list[Operation]) -> int:
    return sum(operation.size for operation in operations if operation.name == "ncclAllReduce")


def model_of(training: Training) -> dict:
    model, parallel, groups = training.model, training.parallel, training.optimizer.param_groups
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    return {
        "parallel": isinstance(parallel, nn.parallel.DistributedDataParallel),
        "unused": parallel.find_unused_parameters,
        "device": str(parallel.device),
        "channels last": all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels),
        "norms": sorted({type(module).__name__ for module in parallel.modules() if "Norm" in type(module).__name__}),
        "trained": sum(p.numel() for group in groups for p in group["params"]),
    }


def agree(device: torch.device) -> dict:
    """What the small functions ask of the device, and what they find."""
    rank, found = distributed.rank(), {"backends": dist.get_backend_config()}
    rows = torch.full((rank + 1, 2), float(rank)).to(device)
    null_gpu.take()
    distributed.barrier()
    found["greatest"] = distributed.greatest(rank)
    found["text"] = distributed.broadcast_text(f"of {rank}")
    found["asked"] = null_gpu.take()
    gathered = distributed.gather_rows(rows)
    found["gathering waits"] = waits(null_gpu.take())
    found["gathered"] = list(gathered.shape)
    found["sum"] = distributed.all_reduce_sum(torch.tensor([1.0, rank]).to(device)).tolist()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What they saw


@pytest.fixture(scope="module")
def ranks(lists, tmp_path_factory) -> SimpleNamespace:
    """What two processes saw, and the folders of their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = [free_port() for _ in range(len(CASES) + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NULLGPU_COUNT", "2")
        in_ranks(folder, train_all, folder, lists, ports)
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(
        seen=seen, runs={name: next((folder / name).iterdir()) for name in CASES.keys() - {"resumed"}}
    )


each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_a_process_uses_its_own_device_and_no_other(ranks, name):
    """The device is set before anything is allocated: otherwise each process would have a context on the first."""
    assert [seen["contexts at the start"] for seen in ranks.seen] == [[], []]
    assert [seen[name]["contexts"] for seen in ranks.seen] == [[0], [1]]
    assert [seen[name]["devices"] for seen in ranks.seen] == [[0], [1]]


@each_case
def test_weights_stay_channels_last_and_nothing_warns(ranks, name):
    """DistributedDataParallel would warn of gradients whose strides are not those of its buckets."""
    for rank, seen in enumerate(ranks.seen):
        found = seen[name]["model"]
        assert (found["parallel"], found["unused"], found["device"]) == (True, False, f"cuda:{rank}")
        assert found["channels last"] and not seen[name]["warnings"]


@each_case
def test_every_step_averages_all_gradients_once(ranks, name):
    """With several passes per step, after the last one only; class means are averaged as weights are."""
    for seen in ranks.seen:
        found = seen[name]
        between = [size for size, waits in zip(found["reduced"], found["waits"], strict=True) if not waits]
        sums = 10 * (64 + 1) * (name == "aligned")  # of features, and counts
        assert name == "synced" or set(between[1:]) == {4 * (found["model"]["trained"] + sums)}


@each_case
def test_no_process_waits_for_its_device_between_log_lines(ranks, name):
    """From the third step on: in the second DistributedDataParallel arranges its buckets anew. (Under ``sync_bn`` torch
    looks at every layer which processes have images, but not here.)"""
    for seen in ranks.seen:
        before, *steps = seen[name]["waits"]
        assert before and steps[2:] == [step % 4 == 0 for step in range(2, len(steps))]


def test_batch_norm_over_all_processes_is_converted(ranks):
    for seen in ranks.seen:
        norms = {name: seen[name]["model"]["norms"] for name in CASES}
        assert norms.pop("synced") == ["SyncBatchNorm"]
        assert set(map(tuple, norms.values())) == {("BatchNorm2d",)}


def test_one_process_writes_one_run(ranks):
    for name, run in ranks.runs.items():
        assert len(list(run.parent.iterdir())) == 1
        assert [row["epoch"] for row in history(run)] == ([0, 1] if name == "plain" else [0])
        assert "2 processes" in log_of(run) and "captured" not in log_of(run)


def test_hosts_agree_over_gloo_and_tensors_travel_over_nccl(ranks):
    """Barriers and agreements ask nothing of a device."""
    for rank, seen in enumerate(ranks.seen):
        assert seen["backends"] == "cpu:gloo,cuda:nccl"
        assert (seen["asked"], seen["greatest"], seen["text"]) == ([], 1, "of 0")
        assert (seen["gathered"], seen["gathering waits"]) == ([3, 2], False)
        assert seen["sum"] == [2.0, 1.0], rank


def test_more_processes_than_devices_are_one_line(capsys, monkeypatch, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **place}.items():
        monkeypatch.setenv(name, value)
    bad = failure(capsys, train_stage1.main, "--cfg", ARB, "save_dir", tmp_path)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "at least 2 processes run on this machine, but this one sees 1 CUDA devices; start at most 1" in bad.said
