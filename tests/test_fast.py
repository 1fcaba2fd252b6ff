"""Runs with what makes training fast or lets it fit: precisions, compiled steps, images that workers read."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train_stage1
from tests import test_several_processes as several
from tests.conftest import ARB, assert_same_run, content, failure, history, train
from tests.test_train_stage1 import write_folders

IMAGENET = "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml"
SMALL = ["image_size", 8, "imb_factor", 0.01, "batch_size", 120]  # three steps an epoch, the last one smaller


def log(folder: Path) -> str:
    return next((folder / "logs").iterdir()).read_text()


def evaluated(capsys, folder: Path, *overrides: object) -> str:
    """What eval.py says of a run's last checkpoint with the run's own configuration."""
    capsys.readouterr()
    arguments = ["--cfg", folder / "config.yaml", "resume", folder / "ckps" / "current.pth.tar", *overrides]
    eval_script.main(list(map(str, arguments)))
    return capsys.readouterr().out


def last_lines(text: str) -> list[str]:
    """The two that scripts of the field read."""
    return re.findall(r"\* (?:Acc@1|ECE) .*", text)[-2:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of two epochs in float32; tests do not write into it."""
    return train(tmp_path_factory.mktemp("plain"), "num_epochs", 2, *SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# Images that workers read


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_read_train_the_same_run(plain, tmp_path, workers):
    folder = train(tmp_path, "num_epochs", 2, *SMALL, "data_on_device", False, "workers", workers)
    assert_same_run(plain, folder)
    assert "images: 8 pixels, in the memory of cpu" in log(plain)
    assert f"images: 8 pixels, read by {workers} workers" in log(folder)


def test_class_folders_that_are_read_train_the_same_run(tmp_path):
    """With held-out images and two passes per step; a run goes on wherever its images live."""
    write_folders(tmp_path / "images", per_class=(30, 60, 12))
    options = ["data_path", tmp_path / "images", "val_per_class", 3, "accumulate", 2, "image_size", 12]
    options += ["backbone", "resnet20", "batch_size", 40]
    cfg = "config/folder/folder_arbloss_mixup.yaml"
    here = train(tmp_path / "here", *options, "num_epochs", 2, "data_on_device", True, cfg=cfg)
    read = train(tmp_path / "read", *options, "num_epochs", 1, "data_on_device", False, "workers", 1, cfg=cfg)
    resume = ["resume", read / "ckps" / "current.pth.tar", "data_on_device", "auto"]
    train(tmp_path / "read", *options, "num_epochs", 2, *resume, cfg=cfg)
    assert_same_run(here, read)
    assert "data_on_device was" not in log(read)


def test_evaluation_of_images_that_are_read_ends_with_the_logs_last_lines(plain, tmp_path, capsys):
    folder = shutil.copytree(plain, tmp_path / plain.name)
    said = evaluated(capsys, folder, "data_on_device", False, "workers", 1)
    assert last_lines(said) == last_lines(log(folder))


@pytest.mark.parametrize("script", [train_stage1, eval_script])
def test_images_that_cannot_be_on_the_device_are_one_line(plain, lists, tmp_path, capsys, monkeypatch, script):
    """A machine of a megabyte, and images that stay in their files."""
    options = ["data_on_device", True, "save_dir", tmp_path / "saved"]
    if script is eval_script:
        options += ["resume", plain / "ckps" / "current.pth.tar"]
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
    return train(tmp_path_factory.mktemp("half"), "num_epochs", 2, *SMALL, "precision", request.param)


@pytest.fixture
def copy(half, tmp_path) -> Path:
    return shutil.copytree(half, tmp_path / half.name)


def test_half_precision_trains_nearly_as_float32_does(half, plain):
    """The first epoch's loss; later ones part, since the first steps of a network amplify every difference."""
    ours, theirs = (history(folder)[0]["train"]["loss"] for folder in (half, plain))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.05)


def test_the_log_says_the_precision(half, plain):
    name = {"bf16": "bfloat16", "fp16": "float16"}[content(half)["config"]["precision"]]
    assert f"computing: {name}, weights and loss in float32" in log(half)
    assert "computing: strict float32" in log(plain)


def test_a_checkpoint_holds_float32_and_a_scaler_only_for_fp16(half, plain):
    for folder in (half, plain):
        saved = content(folder)
        tensors = [*saved["state_dict_model"].values(), *saved["state_dict_classifier"].values()]
        tensors += [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
        assert bool(saved["scaler"]) == (saved["config"]["precision"] == "fp16")


def test_evaluation_in_the_runs_precision_ends_with_the_logs_last_lines(copy, capsys):
    assert last_lines(evaluated(capsys, copy)) == last_lines(log(copy))


def test_evaluation_in_another_precision_is_nearly_that_of_the_log(copy, capsys):
    said = evaluated(capsys, copy, "precision", "fp32")
    assert last_lines(said) != last_lines(log(copy))
    ours, theirs = json.loads((copy / "eval/current/metrics.json").read_text()), history(copy)[-1]["test"]
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=0.01)
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=2)


def test_a_resumed_run_in_half_precision_is_an_uninterrupted_one(half, tmp_path):
    options = [*SMALL, "precision", content(half)["config"]["precision"]]
    parts = train(tmp_path, *options, "num_epochs", 1)
    train(tmp_path, *options, "num_epochs", 2, "resume", parts / "ckps" / "current.pth.tar")
    assert_same_run(half, parts)
    assert content(parts)["scaler"] == content(half)["scaler"]


def changed(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of a run whose last checkpoint is the one after its first epoch, so to say, and holds ``changes``.

    None takes a key away.
    """
    folder = shutil.copytree(run, folder / run.name)
    saved = content(folder) | {"epoch": 1} | changes
    torch.save({key: value for key, value in saved.items() if value is not None}, folder / "ckps" / "current.pth.tar")
    return folder


def resumed(folder: Path, *overrides: object) -> Path:
    checkpoint = folder / "ckps" / "current.pth.tar"
    train(folder.parent, "num_epochs", 2, *SMALL, *overrides, "resume", checkpoint)
    return folder


def test_a_resumed_run_goes_on_with_its_loss_scale(plain, tmp_path):
    scaler = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    folder = resumed(changed(plain, tmp_path, scaler={**scaler, "_growth_tracker": 7}), "precision", "fp16")
    assert content(folder)["scaler"] == {**scaler, "_growth_tracker": 10}
    assert "precision changes from fp32 to fp16" in log(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_without_a_scaler_goes_on(plain, tmp_path, precision):
    """From before there were precisions."""
    config = {key: value for key, value in content(plain)["config"].items() if key != "precision"}
    folder = resumed(changed(plain, tmp_path, scaler=None, config=config), "precision", precision)
    assert content(folder)["epoch"] == 2
    assert [row["epoch"] for row in history(folder)] == [0, 1]
    assert "precision was" not in log(folder)


@pytest.mark.parametrize("scaler", [{"scale": 2.0}, {"scale": "large"}, [1.0], 3], ids=str)
def test_a_scaler_that_is_none_is_refused_in_one_line(plain, tmp_path, capsys, scaler):
    folder = changed(plain, tmp_path, scaler=scaler)
    options = [*SMALL, "precision", "fp16", "resume", folder / "ckps" / "current.pth.tar"]
    bad = failure(capsys, train_stage1.main, "--cfg", ARB, *options)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "does not fit this configuration" in bad.said


def test_going_on_in_another_precision_is_noted(plain, tmp_path):
    folder = resumed(changed(plain, tmp_path), "precision", "bf16")
    assert "note: precision changes from fp32 to bf16" in log(folder)
    assert content(folder)["config"]["precision"] == "bf16"


def test_tf32_on_a_cpu_is_fp32(plain, tmp_path):
    folder = train(tmp_path, "num_epochs", 2, *SMALL, "precision", "tf32")
    assert_same_run(plain, folder)
    assert "computing: float32 (TF32 is for CUDA only)" in log(folder)


def test_two_processes_train_lists_in_bf16_with_two_passes_per_step(tmp_path, capsys):
    tree = several.make_tree(tmp_path / "tree", "imagenet")
    options = ["image_size", 32, "precision", "bf16", "accumulate", 2]
    done = several.completed(tmp_path, *several.TORCHRUN, *several.training(tree, tmp_path / "saved", *options))
    assert done.code == 0, done.err
    run = several.only_run(tmp_path / "saved")
    assert "computing: bfloat16" in run.log
    assert "2 processes with 2 micro-batches per step" in run.log
    assert last_lines(evaluated(capsys, run.folder, "workers", 0)) == run.lines


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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_is_evaluated_and_goes_on_compiled_or_not(anew, plain, tmp_path, capsys, precision):
    options = [*SMALL, "precision", precision]
    whole = train(tmp_path / "whole", *options, "num_epochs", 2, "compile", True)
    assert "; compiled" in log(whole)
    assert history(whole)[0]["train"]["loss"] == pytest.approx(history(plain)[0]["train"]["loss"], rel=0.05)
    assert content(whole)["state_dict_model"].keys() == content(plain)["state_dict_model"].keys()
    with torch.compiler.set_stance("fail_on_recompile"):  # neither evaluation nor another training compiles again
        assert last_lines(evaluated(capsys, whole)) == last_lines(log(whole))
        parts = train(tmp_path / "parts", *options, "num_epochs", 1, "compile", True)
        copy = shutil.copytree(parts, tmp_path / "eager" / parts.name)
        for folder, compiled in ((parts, True), (copy, False)):
            resume = ["resume", folder / "ckps" / "current.pth.tar"]
            train(folder.parent, *options, "num_epochs", 2, "compile", compiled, *resume)
    assert_same_run(whole, parts)
    assert "compile changes from True to False" in log(copy)
    assert history(copy)[1]["train"]["loss"] == pytest.approx(history(whole)[1]["train"]["loss"], rel=0.05)


@pytest.mark.slow
def test_a_compiled_run_of_lists_ends_with_what_evaluation_says(anew, lists, tmp_path, capsys):
    options = ["data_path", lists / "imagenet", "backbone", "resnet10", "image_size", 64, "batch_size", 8]
    folder = train(tmp_path, *options, "workers", 1, "num_epochs", 1, "compile", True, cfg=IMAGENET)
    assert last_lines(evaluated(capsys, folder)) == last_lines(log(folder))


@pytest.mark.slow
def test_two_processes_train_a_compiled_run_in_bf16(tmp_path, capsys):
    options = [*SMALL, "num_epochs", 2, "precision", "bf16", "compile", True, "device", "cpu", "print_freq", 1]
    save = ["save_dir", tmp_path / "saved"]
    done = several.completed(tmp_path, *several.TORCHRUN, "./train_stage1.py", "--cfg", f"./{ARB}", *options, *save)
    assert done.code == 0, done.err
    run = several.only_run(tmp_path / "saved")
    assert "bfloat16, weights and loss in float32; compiled" in run.log
    assert [row["epoch"] for row in run.rows] == [0, 1]
    assert last_lines(evaluated(capsys, run.folder)) == run.lines
