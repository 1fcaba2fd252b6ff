"""Runs with what makes training fast or lets it fit: precisions, compiled steps, images that workers read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train_stage1
from tests.conftest import (
    ARB,
    SHORT,
    TWO_EPOCHS,
    assert_same_run,
    content,
    copy_of,
    current,
    failure,
    history,
    in_ranks,
    log_of,
    stopped,
    train,
    train_in_rank,
)
from tests.test_train_stage1 import write_folders

IMAGENET = "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml"


def evaluated(capsys, folder: Path, *overrides: object) -> str:
    """What eval.py says of a run's last checkpoint with the run's own configuration."""
    capsys.readouterr()
    arguments = ["--cfg", folder / "config.yaml", "resume", current(folder), *overrides]
    eval_script.main(list(map(str, arguments)))
    return capsys.readouterr().out


def last_lines(text: str) -> list[str]:
    """The two that scripts of the field read."""
    return re.findall(r"\* (?:Acc@1|ECE) .*", text)[-2:]


# ---------------------------------------------------------------------------------------------------------------------
# Images that workers read


def test_a_run_goes_on_wherever_its_images_live(finished, tmp_path):
    """The very same run, though a worker reads the images of its second epoch."""
    folder = stopped(finished, tmp_path)
    train(tmp_path, *TWO_EPOCHS, "data_on_device", False, "workers", 1, "resume", current(folder))
    assert_same_run(finished, folder)
    assert "images: 8 pixels, in the memory of cpu" in log_of(finished)
    assert "images: 8 pixels, read by 1 workers" in log_of(folder)
    assert "data_on_device was" not in log_of(folder)


def test_class_folders_that_are_read_train_the_same_run(tmp_path):
    """With held-out images and two passes per step."""
    write_folders(tmp_path / "images", per_class=(30, 60, 12))
    options = ["data_path", tmp_path / "images", "val_per_class", 3, "accumulate", 2, "image_size", 12]
    options += ["batch_size", 40, "num_epochs", 1]
    cfg = "config/folder/folder_arbloss_mixup.yaml"
    here = train(tmp_path / "here", *options, "data_on_device", True, cfg=cfg)
    read = train(tmp_path / "read", *options, "data_on_device", False, "workers", 0, cfg=cfg)
    assert_same_run(here, read)


@pytest.mark.slow
def test_evaluation_of_images_that_are_read_ends_with_the_logs_last_lines(finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    said = evaluated(capsys, folder, "data_on_device", False, "workers", 1)
    assert last_lines(said) == last_lines(log_of(folder))


@pytest.mark.parametrize("script", [train_stage1, eval_script])
def test_images_that_cannot_be_on_the_device_are_one_line(finished, lists, tmp_path, capsys, monkeypatch, script):
    """A machine of a megabyte, and images that stay in their files."""
    options = ["data_on_device", True, "save_dir", tmp_path / "saved"]
    if script is eval_script:
        options += ["resume", current(finished)]
    bad = failure(capsys, script.main, "--cfg", IMAGENET, "data_path", lists / "imagenet", *options)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "data_on_device: True, but the images of imagenet stay in their files" in bad.said
    ask, sizes = os.sysconf, {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2**20}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes.get(name) or ask(name))
    bad = failure(capsys, script.main, "--cfg", ARB, *options)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "data_on_device: True, but the images need 0.0 GiB and cpu has 0.0; use auto or False" in bad.said
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def half(request, tmp_path_factory) -> Path:
    """A run of two epochs in half precision; tests do not write into it."""
    return train(tmp_path_factory.mktemp("half"), *TWO_EPOCHS, "precision", request.param)


@pytest.mark.slow
def test_half_precision_trains_nearly_as_float32_does(half, finished):
    """The first epoch's loss; later ones part, since the first steps of a network amplify every difference."""
    ours, theirs = (history(folder)[0]["train"]["loss"] for folder in (half, finished))
    assert ours == pytest.approx(theirs, rel=0.1)
    name = {"bf16": "bfloat16", "fp16": "float16"}[content(half)["config"]["precision"]]
    assert f"computing: {name}, weights and loss in float32" in log_of(half)
    assert "computing: strict float32" in log_of(finished)


@pytest.mark.slow
def test_a_checkpoint_holds_float32_and_a_scaler_only_for_fp16(half, finished):
    for folder in (half, finished):
        saved = content(folder)
        tensors = [*saved["state_dict_model"].values(), *saved["state_dict_classifier"].values()]
        tensors += [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
        assert bool(saved["scaler"]) == (saved["config"]["precision"] == "fp16")


@pytest.mark.slow
def test_evaluation_in_the_runs_precision_ends_with_the_logs_last_lines(half, tmp_path, capsys):
    copied = copy_of(half, tmp_path)
    assert last_lines(evaluated(capsys, copied)) == last_lines(log_of(copied))


@pytest.mark.slow
def test_evaluation_in_another_precision_is_nearly_that_of_the_log(half, tmp_path, capsys):
    copied = copy_of(half, tmp_path)
    evaluated(capsys, copied, "precision", "fp32")
    ours, theirs = json.loads((copied / "eval/current/metrics.json").read_text()), history(copied)[-1]["test"]
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=0.05)
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=5)


@pytest.mark.slow
def test_a_resumed_run_in_half_precision_is_an_uninterrupted_one(half, tmp_path):
    parts = stopped(half, tmp_path)
    train(tmp_path, *TWO_EPOCHS, "precision", content(half)["config"]["precision"], "resume", current(parts))
    assert_same_run(half, parts)
    assert content(parts)["scaler"] == content(half)["scaler"]


def resumed(folder: Path, *overrides: object) -> Path:
    train(folder.parent, "num_epochs", 2, *overrides, "resume", current(folder))
    return folder


def test_a_resumed_run_goes_on_with_its_loss_scale(finished, tmp_path):
    """Eight steps in float16 after one epoch in float32."""
    scaler = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    folder = resumed(stopped(finished, tmp_path, scaler={**scaler, "_growth_tracker": 7}), "precision", "fp16")
    assert content(folder)["scaler"] == {**scaler, "_growth_tracker": 15}
    assert "precision changes from fp32 to fp16" in log_of(folder)
    assert content(folder)["config"]["precision"] == "fp16"


def test_a_checkpoint_without_a_scaler_goes_on(finished, tmp_path):
    """From before there were precisions."""
    config = {key: value for key, value in content(finished)["config"].items() if key != "precision"}
    folder = resumed(stopped(finished, tmp_path, scaler=None, config=config))
    assert content(folder)["epoch"] == 2
    assert [row["epoch"] for row in history(folder)] == [0, 1]
    assert "precision was" not in log_of(folder)


@pytest.mark.parametrize("scaler", [{"scale": 2.0}, {"scale": "large"}, [1.0], 3], ids=str)
def test_a_scaler_that_is_none_is_refused_in_one_line(finished, tmp_path, capsys, scaler):
    folder = stopped(finished, tmp_path, scaler=scaler)
    arguments = ["--cfg", ARB, *SHORT, "precision", "fp16", "resume", current(folder)]
    bad = failure(capsys, train_stage1.main, *arguments)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "does not fit this configuration" in bad.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA it is not")
def test_tf32_on_a_cpu_is_fp32(finished, tmp_path):
    folder = train(tmp_path, *TWO_EPOCHS, "precision", "tf32")
    assert_same_run(finished, folder)
    assert "computing: float32 (TF32 is for CUDA only)" in log_of(folder)


@pytest.mark.slow
def test_two_processes_train_lists_in_bf16_with_two_passes_per_step(lists, tmp_path, capsys):
    options = ["data_path", lists / "imagenet", "backbone", "resnet10", "image_size", 32, "batch_size", 16]
    options += ["precision", "bf16", "accumulate", 2, "num_epochs", 1, "workers", 2, "save_dir", tmp_path / "saved"]
    in_ranks(tmp_path, train_in_rank, IMAGENET, *options)
    (folder,) = (tmp_path / "saved").iterdir()
    assert "computing: bfloat16" in log_of(folder)
    assert "2 processes with 2 micro-batches per step" in log_of(folder)
    assert last_lines(evaluated(capsys, folder, "workers", 0)) == last_lines(log_of(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.fixture
def anew():
    """Compiled code of other tests is forgotten, and that of this one afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiling_without_a_compiler_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    bad = failure(capsys, train_stage1.main, "--cfg", ARB, "compile", True, "save_dir", tmp_path / "saved")
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "compile: True needs a C++ compiler on a CPU" in bad.said
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "precision", [pytest.param("fp32", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.soak)]
)
def test_a_compiled_run_is_evaluated_and_goes_on_compiled_or_not(anew, finished, tmp_path, capsys, precision):
    options = [*TWO_EPOCHS, "precision", precision]
    whole = train(tmp_path / "whole", *options, "compile", True)
    assert "; compiled" in log_of(whole)
    assert history(whole)[0]["train"]["loss"] == pytest.approx(history(finished)[0]["train"]["loss"], rel=0.1)
    assert content(whole)["state_dict_model"].keys() == content(finished)["state_dict_model"].keys()
    with torch.compiler.set_stance("fail_on_recompile"):  # neither evaluation nor another training compiles again
        assert last_lines(evaluated(capsys, copy_of(whole, tmp_path / "evaluated"))) == last_lines(log_of(whole))
        parts, eager = stopped(whole, tmp_path / "parts"), stopped(whole, tmp_path / "eager")
        for folder, compiled in ((parts, True), (eager, False)):
            train(folder.parent, *options, "compile", compiled, "resume", current(folder))
    assert_same_run(whole, parts)
    assert "compile changes from True to False" in log_of(eager)
    assert history(eager)[1]["train"]["loss"] == pytest.approx(history(whole)[1]["train"]["loss"], rel=0.1)


@pytest.mark.soak
def test_a_compiled_run_of_lists_ends_with_what_evaluation_says(anew, lists, tmp_path, capsys):
    options = ["data_path", lists / "imagenet", "backbone", "resnet10", "image_size", 64, "batch_size", 8]
    folder = train(tmp_path, *options, "workers", 1, "num_epochs", 1, "compile", True, cfg=IMAGENET)
    assert last_lines(evaluated(capsys, folder)) == last_lines(log_of(folder))


@pytest.mark.soak
def test_two_processes_train_a_compiled_run_in_bf16(tmp_path, capsys):
    options = [*TWO_EPOCHS, "precision", "bf16", "compile", True, "print_freq", 1, "save_dir", tmp_path / "saved"]
    in_ranks(tmp_path, train_in_rank, ARB, *options)
    (folder,) = (tmp_path / "saved").iterdir()
    assert "bfloat16, weights and loss in float32; compiled" in log_of(folder)
    assert [row["epoch"] for row in history(folder)] == [0, 1]
    assert last_lines(evaluated(capsys, folder)) == last_lines(log_of(folder))
