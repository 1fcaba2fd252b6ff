"""Whole runs on a CUDA device whose kernels do nothing, see null_gpu/README.md."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train_stage1
from methods.method import LOSSES
from tests import null_gpu
from tests.conftest import ARB, SHORT, content, current, failure, history, log_of, stop_before, train
from tests.null_gpu import Operation
from tests.null_gpu.unjudged import unjudged
from tests.test_fast import IMAGENET, evaluated, last_lines
from utils.bench import __main__ as bench
from utils.cuda_graph import GraphedStep
from utils.errors import Interrupted

pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.skipif(bool(null_gpu.unavailable()), reason=null_gpu.unavailable()),
]

STEPS = 8  # of an epoch, the last with fewer images
CAPTURED = "the step captured as a CUDA graph"


@pytest.fixture(autouse=True, scope="module")
def without_judgement() -> Iterator[None]:
    with unjudged():
        yield


def captures(operations: list[Operation]) -> int:
    return sum(operation.kind == "capture" for operation in operations)


def trained(folder: Path, *overrides: object, **options: str) -> tuple[Path, list[Operation]]:
    """A new run's folder, and what was asked of the device."""
    null_gpu.take()
    run = train(folder, *overrides, "device", "cuda", **options)
    return run, null_gpu.take()


def resumed(run: Path, *overrides: object, origin: object = None) -> list[Operation]:
    return trained(run.parent, *overrides, "resume", origin or current(run))[1]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs: what can be captured is, once


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_step_of_any_precision_is_captured_once_and_replayed(tmp_path, precision):
    run, operations = trained(tmp_path, "num_epochs", 2, "precision", precision, "max_grad_norm", 1)
    kinds = Counter(operation.kind for operation in operations)
    assert (kinds["capture"], kinds["graph"]) == (1, 2 * (STEPS - 1))
    assert CAPTURED in log_of(run)
    assert bool(content(run)["scaler"]) == (precision == "fp16")


NEEDED = {"ldam": ["cosine"], "dot_regression": ["simplex"]}
PAIRS = [(loss, classifier) for loss in LOSSES for classifier in NEEDED.get(loss, ["linear", "cosine", "simplex"])]


@pytest.mark.parametrize(("loss", "classifier"), PAIRS)
def test_every_loss_on_every_classifier_is_captured(tmp_path, loss, classifier):
    smoothing = ["smooth_head", 0.1, "smooth_tail", 0.0] if loss == "las" else []
    _, operations = trained(tmp_path, "num_epochs", 1, "loss", loss, "classifier", classifier, *smoothing)
    assert captures(operations) == 1


@pytest.mark.parametrize("counts", ["global", "batch_synced", "global_masked", "batch_unmasked"])
@pytest.mark.parametrize("mixup", [False, True])
def test_every_kind_of_class_counts_is_captured(tmp_path, counts, mixup):
    _, operations = trained(tmp_path, "num_epochs", 1, "class_counts", counts, "mixup", mixup)
    assert captures(operations) == 1


@pytest.mark.parametrize("augment", ["autoaugment", "randaugment", "trivialaugment"])
def test_augmentation_is_captured(tmp_path, augment):
    options = ["augment", augment, "cutout", 4, "random_erasing", 0.5]
    _, operations = trained(tmp_path, "num_epochs", 1, *options)
    assert captures(operations) == 1


@pytest.mark.parametrize("counts", ["global", "batch"])
def test_cmo_is_captured_where_it_begins_and_ends(tmp_path, counts):
    options = ["mixup", False, "mix", "cmo", "cmo_idle", 1, "class_counts", counts]
    _, operations = trained(tmp_path, "num_epochs", 4, *options)
    assert captures(operations) == 3


def test_a_method_that_changes_is_captured_again(tmp_path):
    """At the start, with the regularizers, and with the weights."""
    late = ["drw_epoch", 2, "nc_within", 0.01, "nc_between", 0.1, "nc_start_epoch", 1]
    run, operations = trained(tmp_path, "num_epochs", 4, "loss", "ldam", "classifier", "cosine", *late)
    assert captures(operations) == 3
    assert "regularizer.means" in content(run)["state_dict_method"]


@pytest.mark.parametrize("spa", ["proj", "slerp"])
def test_moving_means_and_space_alignment_are_captured(tmp_path, spa):
    """Once, although slerp's amount changes from epoch to epoch."""
    options = ["nc_rows", 1, "nc_means", 1, "nc_dual", 1, "spa", spa, "precision", "fp16", "max_grad_norm", 1]
    run, operations = trained(tmp_path, "num_epochs", 2, *options)
    assert captures(operations) == 1
    assert "geometry.moving.means" in content(run)["state_dict_method"]


@pytest.mark.parametrize("options", [["accumulate", 2], ["cuda_graph", False]], ids=lambda words: words[0])
def test_other_steps_are_not_captured(tmp_path, options):
    run, operations = trained(tmp_path, "num_epochs", 1, *options)
    assert not {"capture", "graph"} & {operation.kind for operation in operations}
    assert CAPTURED not in log_of(run)


def test_what_looks_inside_runs_beside_a_captured_step(tmp_path):
    run, operations = trained(tmp_path, "num_epochs", 2, "diagnostics", 2, "nc_every", 1, "val_per_class", 2)
    assert captures(operations) == 1
    assert (run / "diagnostics.npz").is_file()
    assert all({"nc", "val"} < row.keys() for row in history(run))


@pytest.mark.parametrize(("gpus", "captured"), [("1", 2), ("2", 0)])
def test_a_plan_measures_the_step_that_would_be_trained(capsys, gpus, captured):
    """Twice, first to see how long it takes; several processes train without a graph."""
    null_gpu.take()
    assert bench.main(["plan", "--cfg", ARB, *SHORT, "device", "cuda", "--minutes", "0.001", "--gpus", gpus]) == 0
    assert captures(null_gpu.take()) == captured
    assert "times of a step that overlap" in capsys.readouterr().out


def test_a_last_batch_of_one_image_is_tried_before_training(tmp_path):
    """477 images in batches of 28; the other 17 steps of the epoch are replayed."""
    _, operations = trained(tmp_path, "num_epochs", 1, "batch_size", 28)
    kinds = Counter(operation.kind for operation in operations)
    assert (kinds["capture"], kinds["graph"]) == (1, 477 // 28)


def test_a_deterministic_run_is_captured(tmp_path, monkeypatch):
    """Without this variable cuBLAS may choose other algorithms, and torch warns."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    _, operations = trained(tmp_path, "num_epochs", 1, "deterministic", True)
    assert captures(operations) == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_compiled_step_is_captured(tmp_path, monkeypatch):
    """Triton's kernels are compiled for the device, in this process, and launched; nothing is kept for other runs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with torch._inductor.config.patch(compile_threads=1):
        run, operations = trained(tmp_path / "saved", "num_epochs", 1, "precision", "bf16", "compile", True)
    torch.compiler.reset()
    assert f"; compiled; {CAPTURED}" in log_of(run)
    assert captures(operations) == 1
    assert any(operation.name.startswith("triton_") for operation in operations)


def test_two_runs_in_one_process_leave_no_memory_behind(tmp_path):
    left = []
    for name in ("first", "second"):
        _, operations = trained(tmp_path, "num_epochs", 1, "name", name)
        assert captures(operations) == 1
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] <= left[0]


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, resumed, forked, evaluated


@pytest.mark.parametrize("auto", [False, True])
def test_a_run_stopped_within_an_epoch_goes_on_inside_it(tmp_path, monkeypatch, auto):
    options = ["num_epochs", 2, "precision", "fp16", "diagnostics", 2, "device", "cuda"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="epoch 1, 4 of 8 steps, is saved"):
        stop_before(patch, STEPS + 3, GraphedStep)
        train(tmp_path, *options)
    (run,) = tmp_path.iterdir()
    assert content(run)["step"] == 4
    kinds = Counter(operation.kind for operation in resumed(run, *options, origin="auto" if auto else None))
    assert (kinds["capture"], kinds["graph"]) == (1, STEPS - 4 - 1)
    assert [row["epoch"] for row in history(run)] == [0, 1]


def test_a_run_goes_on_after_an_epoch_and_as_a_fork(tmp_path):
    run, _ = trained(tmp_path, "num_epochs", 1, "keep_epochs", "[1]")
    assert captures(resumed(run, "num_epochs", 2)) == 1
    fork, operations = trained(tmp_path, "num_epochs", 2, "fork", run / "ckps/epoch_1.pth.tar")
    assert fork != run and captures(operations) == 1
    assert content(run)["epoch"] == content(fork)["epoch"] == 2


def test_a_run_moves_between_the_cpu_and_the_device(tmp_path):
    run = train(tmp_path, "num_epochs", 1, "device", "cpu")
    assert captures(resumed(run, "num_epochs", 2)) == 1
    train(tmp_path, "num_epochs", 3, "resume", current(run), "device", "cpu")
    assert [row["epoch"] for row in history(run)] == [0, 1, 2]


def test_evaluation_reads_what_was_trained(tmp_path, capsys):
    run, _ = trained(tmp_path, "num_epochs", 1)
    null_gpu.take()
    said = evaluated(capsys, run, "decompose", True, "post_hoc_tau", 1, "device", "cuda")
    assert len(last_lines(said)) == 2 and "other classifiers on the same features" in said
    assert (run / "eval/current/decomposition.json").is_file()
    assert any(operation.kind == "kernel" for operation in null_gpu.take())


# ---------------------------------------------------------------------------------------------------------------------
# What a device cannot do


REFUSALS = {
    "precision bf16": ("is_bf16_supported", False, "this CUDA device cannot compute in bfloat16; use fp16 or fp32"),
    "compile True": ("get_device_capability", (6, 1), "compile: True needs Triton, and a CUDA device of capability"),
    "data_on_device True": ("mem_get_info", (2**16, 2**30), "and cuda:0 has 0.0; use auto or False"),
}


@pytest.mark.parametrize("option", REFUSALS)
def test_what_a_device_cannot_do_is_one_line(tmp_path, capsys, monkeypatch, option):
    function, value, words = REFUSALS[option]
    monkeypatch.setattr(torch.cuda, function, lambda *arguments: value)
    bad = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, *option.split(), "save_dir", tmp_path / "saved")
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert words in bad.said
    assert not (tmp_path / "saved").exists()


def test_images_that_would_take_half_of_the_free_memory_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**18, 2**30))
    run, _ = trained(tmp_path, "num_epochs", 1, "workers", 1)
    assert "images: 8 pixels, read by 1 workers" in log_of(run)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_lists_are_read_into_pinned_memory_and_coloured_on_the_device(lists, tmp_path):
    options = ["data_path", lists / "imagenet", "backbone", "resnet10", "image_size", 32, "batch_size", 16]
    run, operations = trained(tmp_path, *options, "workers", 1, "num_epochs", 1, cfg=IMAGENET)
    images = Operation("copy", "pinned to device", 16 * 32 * 32 * 3, 0)
    assert operations.count(images) == 4  # steps; evaluation has other sizes
    assert captures(operations) == 1
    assert "32 pixels, decoded with PIL by 1 workers" in log_of(run)
