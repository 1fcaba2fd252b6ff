"""Training end to end, by the real script on real images."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import eval as eval_script
import train_stage1
from datasets import build_data
from methods import build_method
from models import build_model
from tests.conftest import (
    ARB,
    ROOT,
    SHORT,
    assert_same_run,
    assert_same_tensors,
    content,
    failure,
    history,
    manager_of,
    train,
)
from utils import build
from utils.config import load_config
from utils.errors import DivergenceError
from utils.precision import new_scaler
from utils.run.log import RunLog
from utils.step import Step

CPU = torch.device("cpu")
CE = "config/digits/digits_imb005.yaml"


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """Exactly as written after &&, in a copy of the project; another CPU may give slightly other numbers."""
    commands = re.findall(r"^\s*pip install -r requirements.txt && (.+)$", (ROOT / "README.md").read_text(), re.M)
    command = next(c for c in commands if "train_stage1.py" in c)
    for name in ("config", "datasets", "methods", "models", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train_stage1.py", tmp_path)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = re.search(r"^last epoch .*$", done.stdout, re.M).group()
    top1, many, medium, few, ece = map(float, last.split(")")[1].split())
    assert top1 > 90
    assert min(many, medium, few) > 75
    assert 0 < ece < 25
    assert re.search(r"top-1\s+many\s+medium\s+few\s+ECE", done.stdout)


def test_what_a_run_leaves_behind(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    board = {name for name in names if name.startswith("tensorboard/")}
    assert len(board) == 1
    assert names - board == {
        "ckps/current.pth.tar",
        "ckps/model_best.pth.tar",
        "logs/digits_imb005_arbloss_mixup.txt",
        "config.yaml",
        "metrics.jsonl",
        "starts.jsonl",
        "summary.json",
        "predictions/0.npz",
        "predictions/1.npz",
        "predictions/targets.npz",
    }
    assert re.fullmatch(r"digits_imb005_arbloss_mixup_\d{14}(_\d+)?", finished.name)


def test_the_checkpoint_has_mislas_keys_and_says_who_chose_it(finished):
    last, best = content(finished), content(finished, "model_best")
    assert last["epoch"] == 2
    assert set(last) >= {"state_dict_model", "state_dict_classifier", "best_acc1", "its_ece"}
    assert last["best_acc1"].shape == (1,)
    scores = [row["test"]["top1"] for row in history(finished)]
    assert float(last["best_acc1"]) == pytest.approx(max(scores))
    assert best["epoch"] == scores.index(max(scores)) + 1
    assert best["selected_on"] == "test set"
    assert isinstance(last["its_ece"], float)


def test_the_log_begins_with_what_is_trained_and_has_mislas_lines(finished):
    log = (finished / "logs" / "digits_imb005_arbloss_mixup.txt").read_text()
    first = log.splitlines()[0]
    for words in ("ARB-Loss with batch class counts", "mixup alpha 1", "imbalance factor 0.05", "2 epochs", "seed 0"):
        assert words in first
    assert "x0.1 from epoch 30, x0.01 from epoch 36 ([30, 36] never reached)" in first
    assert len(re.findall(r"Epoch: \[[01]\]\[[04]/8\]\tTime .+\tLoss .+ \(.+\)\tAcc@1 .+\tAcc@5 .+", log)) == 4
    last = history(finished)[-1]["test"]
    assert f"* Acc@1 {last['top1']:.3f}% Acc@5 {last['top5']:.3f}% HAcc {last['many']:.3f}%" in log


def test_tensorboard_holds_every_curve_once(finished):
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    rows = history(finished)
    for tag, key in {"top1/test": "top1", "ece/test": "ece", "few/test": "few"}.items():
        points = board.Scalars(tag)
        assert [p.step for p in points] == [0, 1]
        assert [p.value for p in points] == pytest.approx([row["test"][key] for row in rows])
    assert [p.value for p in board.Scalars("lr")] == pytest.approx([0.02, 0.04])
    assert [p.value for p in board.Scalars("loss/train")] == pytest.approx([row["train"]["loss"] for row in rows])
    assert len([tag for tag in board.Tags()["scalars"] if tag.startswith("per_class/")]) == 10


def test_predictions_make_the_metrics_computable_afterwards(finished):
    targets = np.load(finished / "predictions" / "targets.npz")["targets"]
    for epoch, row in enumerate(history(finished)):
        saved = np.load(finished / "predictions" / f"{epoch}.npz")
        assert (saved["classes"].dtype, saved["confidences"].dtype) == (np.int16, np.float32)
        assert 100 * (saved["classes"] == targets).mean() == pytest.approx(row["test"]["top1"])
        assert 100 * saved["top5_hits"].mean() == pytest.approx(row["test"]["top5"])


def test_the_summary_has_the_three_numbers(finished):
    rows = history(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary) == ["last epoch", "cross-fitted best", "best on the test set"]
    assert summary["last epoch"]["top1"] == rows[-1]["test"]["top1"]
    assert summary["best on the test set"]["top1"] == max(row["test"]["top1"] for row in rows)
    first, second = (max((0, 1), key=lambda e: (rows[e]["halves"][half], -e)) for half in (0, 1))
    expected = (rows[first]["halves"][1] + rows[second]["halves"][0]) / 2
    assert summary["cross-fitted best"]["top1"] == pytest.approx(expected)
    assert summary["cross-fitted best"]["epochs"] == [first, second]


def test_a_terminal_sees_a_progress_bar_and_whole_lines(tmp_path):
    """Run behind a real pseudo-terminal of 100 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "train_stage1.py", "--cfg", CE, "num_epochs", "1", "save_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child)
    os.close(child)
    said = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a pseudo-terminal as an error
        while chunk := os.read(parent, 65536):
            said += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0
    text = said.decode()
    assert re.search(r"epoch 0:\s+\d+%\|", text)
    assert re.search(r"(^|\r|\n)Epoch: \[0\]\[10/15\]", text)


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility


@pytest.mark.parametrize("workers", [0, 3])
def test_the_recorded_config_alone_reproduces_the_run(finished, tmp_path, workers):
    """The same weights, metrics and predictions, with any number of workers."""
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    copy = tmp_path / "again.yaml"
    copy.write_text(yaml.safe_dump(settings))
    assert_same_run(finished, train(tmp_path / "saved", "workers", workers, cfg=str(copy)))


def test_another_seed_gives_another_run(finished, tmp_path):
    other = train(tmp_path, "num_epochs", 1, "seed", 1)
    assert history(other)[0]["train"] != history(finished)[0]["train"]


def test_two_methods_with_one_seed_see_identical_weights_batches_crops_and_lambdas():
    arms = []
    for path, overrides in ((ARB, []), (CE, ["mixup", "True", "loss", "focal_arb"])):
        cfg = load_config(path, overrides)
        data = build.load_data(cfg, cfg.class_map, CPU)
        loader = data.train_loader(cfg.batch_size, cfg.seed, CPU)
        method = build.new_method(cfg, data)
        batches = [batch for epoch in (0, 7) for batch in loader.epoch(epoch)]
        draws = [draw for epoch in (0, 7) for draw in method.draws(loader.batch_sizes, cfg.seed, epoch)]
        arms.append((build.new_model(cfg, data).state_dict(), batches, draws))
    (weights, batches, draws), (other_weights, other_batches, other_draws) = arms
    assert_same_tensors(weights, other_weights)
    assert len(batches) == len(draws) == 30
    for ours, theirs in zip(batches, other_batches, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.indices, theirs.indices)
    for ours, theirs in zip(draws, other_draws, strict=True):
        assert torch.equal(ours.lam, theirs.lam)
        assert torch.equal(ours.partner, theirs.partner)


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def test_train_four_equals_train_two_and_resume_two(tmp_path):
    whole = train(tmp_path / "whole", "num_epochs", 4)
    parts = train(tmp_path / "parts", "num_epochs", 2)
    train(tmp_path / "parts", "num_epochs", 4, "resume", parts / "ckps" / "current.pth.tar")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [parts.name]
    assert_same_run(whole, parts)
    board = EventAccumulator(str(parts / "tensorboard")).Reload()
    assert [p.step for p in board.Scalars("top1/test")] == [0, 1, 2, 3]


def test_going_back_to_an_earlier_checkpoint_leaves_no_epoch_twice(tmp_path):
    folder = train(tmp_path, "num_epochs", 3)
    rows = history(folder)
    saved = content(folder)
    saved["epoch"] = 1  # as if the run had been stopped after its first epoch
    torch.save(saved, folder / "ckps" / "current.pth.tar")
    train(tmp_path, "num_epochs", 2, "resume", folder / "ckps" / "current.pth.tar")
    assert [row["epoch"] for row in history(folder)] == [0, 1]
    assert history(folder)[0] == rows[0]
    assert (
        "epochs from 1 on will be trained again; their 2 rows are dropped"
        in next((folder / "logs").iterdir()).read_text()
    )


def stop_after(monkeypatch, calls):
    """Sends this process a SIGTERM before the run's step number ``calls`` (from 0 on)."""
    taken = itertools.count()

    def step(self, batch, draw, own=Step.__call__):
        if next(taken) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        own(self, batch, draw)

    monkeypatch.setattr(Step, "__call__", step)


def log_of(folder):
    """What an uninterrupted run would have logged, without times."""
    text = next((folder / "logs").iterdir()).read_text()
    lines = [re.sub(r"Time +[\d.]+", "", line[24:]) for line in text.splitlines()]
    return [line for line in lines if line.startswith(("Epoch: [", "* "))]


HALF = ["precision", "fp16", "max_grad_norm", 1.0, "image_size", 8]  # slow where the processor has no such numbers
OPTIONS = [[], ["accumulate", 2, "diagnostics", 2, "nc_every", 1], HALF]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_stopped_within_an_epoch_goes_on_inside_it(tmp_path, options, monkeypatch, capsys):
    options = ["num_epochs", 2, "print_freq", 3, *options]
    whole, start = train(tmp_path / "whole", *options), ["--cfg", ARB, *SHORT, *options, "save_dir", tmp_path / "parts"]
    for calls, reached in ((5, "epoch 0, 6 of 8"), (9, "epoch 1, 8 of 8")):
        with monkeypatch.context() as patch:
            stop_after(patch, calls * (2 if "accumulate" in options else 1))
            result = failure(capsys, train_stage1.main, *start, "resume", "auto")
        assert result.code == 143
        assert result.lines[0].startswith(f"stopped by SIGTERM: {reached} steps, is saved; resume with: python train_")
    (folder,) = (tmp_path / "parts").iterdir()
    assert not (folder / "summary.json").exists()
    train(tmp_path / "parts", *options, "resume", "auto")
    assert_same_run(whole, folder)
    assert log_of(whole) == log_of(folder)
    assert len(log_of(whole)) == 2 * (3 + 2)


def test_a_step_s_checkpoint_goes_on_inside_the_epoch(tmp_path, monkeypatch):
    """The process is lost between two checkpoints: what came after the last one is done again."""
    options = ["num_epochs", 1, "checkpoint_every_steps", 3, "print_freq", 1]
    whole = train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.build.evaluate", lambda *_: 1 / 0)
        train(tmp_path / "parts", *options)
    (folder,) = (tmp_path / "parts").iterdir()
    assert content(folder)["step"] == 6
    assert len(log_of(folder)) == 8
    train(tmp_path / "parts", *options, "resume", "auto")
    assert_same_run(whole, folder)
    assert log_of(whole) == log_of(folder)


@pytest.mark.parametrize(("changed", "step"), [(["lr", 0.05], 6), (["batch_size", 32], 0), (["seed", 1], 0)])
def test_an_epoch_begins_anew_where_its_steps_have_changed(tmp_path, changed, step, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, "num_epochs", 1, "save_dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    train(tmp_path, "num_epochs", 1, "resume", folder / "ckps" / "current.pth.tar", *changed)
    said = capsys.readouterr().out
    assert f"{changed[0]} changes from " in said
    assert "resuming after 0 epochs and 6 steps" in said
    assert ("epoch 0 starts over" in said) == (step == 0)


def test_a_resume_elsewhere_says_that_bits_will_differ(finished, tmp_path, capsys):
    path = tmp_path / "elsewhere.pth.tar"
    moved = content(finished)
    moved["environment"] |= {"CPU threads": 99, "torch": "2.0"}
    torch.save(moved, path)
    train(tmp_path / "saved", "num_epochs", 2, "resume", path)
    said = capsys.readouterr().out
    assert f"CPU threads: 99 before, {torch.get_num_threads()} now; results are no longer bit-identical" in said
    assert f"torch: 2.0 before, {torch.__version__} now" in said
    assert "processes" not in said
    train(tmp_path / "saved", "num_epochs", 2, "resume", finished / "ckps" / "current.pth.tar")
    assert "bit-identical" not in capsys.readouterr().out


def test_other_labels_or_lists_are_refused(finished, tmp_path, capsys):
    other = content(finished)
    other["fingerprint"] = "0" * 64
    torch.save(other, tmp_path / "x.pth.tar")
    arguments = ["resume", tmp_path / "x.pth.tar", "save_dir", tmp_path / "saved"]
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, *arguments)
    assert (result.code, len(result.lines)) == (2, 1)
    assert "was trained on other data: the lists (or the images' labels) are not what they were" in result.said
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": torch.zeros(3)}, "was trained on other data"),
        ({"class_counts": [1, 2]}, "was trained on other images"),
        ({"step": 9, "sums": torch.zeros(1, 6, dtype=torch.float64)}, "is at step 9 of an epoch that has 8 steps"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(finished, tmp_path, capsys, change, said):
    torch.save(content(finished) | change, tmp_path / "x.pth.tar")
    arguments = ["resume", tmp_path / "x.pth.tar", "save_dir", tmp_path / "saved", "num_epochs", 3]
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, *arguments)
    assert (result.code, len(result.lines)) == (2, 1)
    assert said in result.said


def test_a_finished_run_keeps_its_settings(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / finished.name)
    before = (folder / "config.yaml").read_bytes()
    train(tmp_path, "num_epochs", 1, "batch_size", 32, "resume", folder / "ckps" / "current.pth.tar")
    assert (folder / "config.yaml").read_bytes() == before


def test_auto_starts_anew_where_there_is_nothing_and_eval_finds_the_run(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 1, "resume", "auto")
    assert "no checkpoint of this configuration" in capsys.readouterr().out
    assert load_config(folder / "config.yaml").resume == ""  # the file alone repeats the run
    train(tmp_path, "num_epochs", 1, "resume", "auto")
    assert f"{folder}/ckps/current.pth.tar: resuming after 1 epochs" in capsys.readouterr().out
    arguments = ["--cfg", ARB, *SHORT, "save_dir", tmp_path, "resume", "auto"]
    assert failure(capsys, eval_script.main, *arguments, "num_epochs", 1).code == 0
    assert (folder / "eval" / "current" / "metrics.json").exists()
    result = failure(capsys, eval_script.main, *arguments, "num_epochs", 2)
    assert result.code == 2
    assert "resume: auto finds no checkpoint of this configuration" in result.said


def test_a_run_goes_on_with_its_own_data_and_names_what_else_changed(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / finished.name)
    path = folder / "ckps" / "current.pth.tar"
    before = (folder / "config.yaml").read_text()
    for key, value in (("imb_factor", 0.5), ("val_per_class", 5), ("subset_seed", 1)):
        result = failure(capsys, train_stage1.main, "--cfg", ARB, "resume", path, key, value)
        assert result.code == 2
        assert len(result.lines) == 1
        assert f"was trained with {key} " in result.said
        assert f"but {key} is {value}" in result.said
    assert (folder / "config.yaml").read_text() == before
    train(tmp_path, "num_epochs", 3, "lr", 0.05, "resume", path)
    said = capsys.readouterr().out
    assert "lr changes from 0.1 to 0.05" in said
    assert "num_epochs changes from 2 to 3" in said


def test_resuming_a_finished_run_prints_the_table_and_changes_nothing(finished, tmp_path, capsys):
    folder = tmp_path / finished.name
    shutil.copytree(finished, folder)
    train(tmp_path, "num_epochs", 2, "resume", folder / "ckps" / "current.pth.tar")
    said = capsys.readouterr().out
    assert "last epoch (epoch 1)" in said
    assert "best on the test set" in said
    assert_same_run(finished, folder)


def test_a_finished_checkpoint_alone_is_evaluated(finished, tmp_path):
    """Without its run's folder there is no history; the table still has the last epoch."""
    alone = tmp_path / "mine.pth.tar"
    shutil.copy(finished / "ckps" / "current.pth.tar", alone)
    folder = train(tmp_path / "saved", "num_epochs", 2, "resume", alone)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last epoch"]["top1"] == pytest.approx(history(finished)[-1]["test"]["top1"])


def test_a_foreign_file_gives_weights_only_and_says_so(finished, tmp_path):
    own = content(finished)
    foreign = {key: own[key] for key in ("epoch", "best_acc1", "its_ece", "state_dict_classifier")}
    foreign["state_dict_model"] = {f"module.{key}": value for key, value in own["state_dict_model"].items()}
    torch.save(foreign, tmp_path / "mislas.pth.tar")
    folder = train(tmp_path / "saved", "num_epochs", 1, "resume", tmp_path / "mislas.pth.tar")
    log = next((folder / "logs").iterdir()).read_text()
    assert "weights only, training starts at epoch 0" in log
    assert content(folder)["epoch"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume"] == str(tmp_path / "mislas.pth.tar")


# ---------------------------------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("loss", ["ce", "arb"])
def test_twenty_steps_overfit_a_batch(loss):
    data = build_data("digits", "")
    batch = next(data.train_loader(64, 0, CPU).epoch(0))
    images, targets = batch.images, batch.targets
    torch.manual_seed(0)
    model = build_model("digits", "resnet20", 10).train()
    method = build_method(loss, "batch", data.class_counts, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for draws in method.draws([64] * 20, seed=0, epoch=0):
        optimizer.zero_grad()
        output = method(model, images, targets, draws)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
    assert (output.logits.argmax(1) == targets).float().mean() > 0.95


class ScalarReads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def one_epoch(cfg, batch_size, run, lr=0.1):
    """An epoch by the trainer's own loop, in batches of ``batch_size``, with one log line."""
    cfg = load_config(cfg)
    data = build.load_data(cfg, cfg.class_map, CPU)
    model, method = build.new_model(cfg, data), build.new_method(cfg, data)
    loader = data.train_loader(batch_size, 0, CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = Step(model, method, optimizer, new_scaler("fp32", CPU), CPU)
    with ScalarReads() as counter:
        train_stage1.train_epoch(step, loader, run, manager_of(run, loader, step), epoch=0, seed=0, print_freq=1000)
    return counter.reads, len(loader)


@pytest.mark.parametrize("cfg", [ARB, CE])
def test_a_step_fetches_no_number_from_the_device(cfg, tmp_path):
    """An epoch of eight steps reads as many numbers, at its one log line and its end, as one of three."""
    with RunLog(tmp_path, "run") as run:
        (few, three), (many, eight) = one_epoch(cfg, 160, run), one_epoch(cfg, 64, run)
    assert (three, eight) == (3, 8)
    assert 0 < few == many


def test_a_weight_that_the_last_step_made_infinite_stops_the_run(tmp_path):
    """The loss of the only step is finite; what the step leaves behind is not."""
    with RunLog(tmp_path, "run") as run, pytest.raises(DivergenceError, match="epoch 0, last step: a weight"):
        one_epoch(CE, 477, run, lr=3e38)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_held_out_images_choose_the_best_model(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 2, "val_per_class", 10)
    rows = history(folder)
    best = content(folder, "model_best")
    scores = [row["val"]["top1"] for row in rows]
    assert rows[0]["val"]["samples"] == 100
    assert best["selected_on"] == "held-out training images"
    assert best["epoch"] == scores.index(max(scores)) + 1
    assert "chosen on held-out images" in capsys.readouterr().out


def test_eval_every_evaluates_then_and_at_the_end(tmp_path):
    folder = train(tmp_path, "num_epochs", 3, "eval_every", 2)
    assert ["test" in row for row in history(folder)] == [False, True, True]
    assert content(folder)["epoch"] == 3


def write_folders(root, per_class):
    """Real scans as class folders; class names whose order is not that of the digits."""
    digits = load_digits()
    for label, name in enumerate(("zero", "one", "two")):
        scans = digits.images[digits.target == label]
        for part, chosen in (("train", scans[: per_class[label]]), ("test", scans[-10:])):
            (root / part / name).mkdir(parents=True)
            for i, scan in enumerate(chosen):
                Image.fromarray((scan * 15.9).astype(np.uint8)).save(root / part / name / f"{i}.png")


def test_own_class_folders_with_their_natural_counts(tmp_path, capsys):
    write_folders(tmp_path / "images", per_class=(30, 120, 12))
    folder = train(
        tmp_path / "saved",
        "data_path",
        tmp_path / "images",
        "num_epochs",
        1,
        cfg="config/folder/folder_arbloss_mixup.yaml",
    )
    said = capsys.readouterr().out
    assert "162 training images in 3 classes (largest 120, smallest 12), 30 test images" in said
    assert history(folder)[0]["test"]["group_sizes"] == {"count": {"many": 1, "medium": 1, "few": 1}}
    cfg = load_config("config/folder/base.yaml", ["data_path", str(tmp_path / "images")])
    assert build.load_data(cfg, cfg.class_map, CPU).class_counts.tolist() == [120, 12, 30]  # one, two, zero


def test_two_processes_write_one_folder_and_train(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "train_stage1.py", "--cfg", CE, "device", "cpu", "num_epochs", "1", "save_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert len(history(folder)) == 1
    assert done.stdout.count("last epoch (epoch 0)") == 1
    assert "2 processes: each has its own" in done.stdout


# One epoch by the trainer's own loop, in as many processes as the launcher started; rank 0 leaves its findings.
WORKER = """
import json, sys
from pathlib import Path
import torch
import train_stage1
from torch import nn
from models.classifier import LinearClassifier
from models.model import Model
from tests.conftest import manager_of
from utils import distributed
from utils.config import load_config
from utils.precision import new_scaler
from utils.run.folder import new_folder
from utils.run.log import RunLog
from utils.step import Step

def work(folder):
    cfg = load_config("config/digits/digits_imb005.yaml")
    with distributed.processes("cpu") as device:
        data = build.load_data(cfg, cfg.class_map, device)
        torch.manual_seed(0)
        # No batch norm: each process would normalise by its own share.
        model = Model(nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Tanh()), LinearClassifier(8, 10))
        method = build.new_method(cfg, data)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        loader = data.train_loader(17, 0, device, distributed.rank(), distributed.world_size())
        with RunLog(new_folder(str(folder), "run"), "run") as run:
            parallel = distributed.parallel(model, device)
            step = Step(parallel, method, optimizer, new_scaler("fp32", device), device)
            row = train_stage1.train_epoch(step, loader, run, manager_of(run, loader, step), 0, 0, 1000)
        normed = build.new_model(cfg, data)
        normed.backbone.bn1.running_mean += distributed.rank()
        groups = build.class_groups(cfg, data)
        test, counts = data.test_loader(device), data.class_counts
        found = evaluation.evaluate(normed, test, None, counts, groups, "fp32").entries
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        content = {"train": row["train"], "weights": weights, "nll": found["test"]["nll"]}
        (folder / f"{distributed.rank()} of {distributed.world_size()}.json").write_text(json.dumps(content))

work(Path(sys.argv[1]))
"""


def test_two_processes_train_as_one_does_on_the_same_global_batches(tmp_path):
    """477 images in batches of 17: shares of 8 and 9, and a last batch of one image: one process has no share of it."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, str(tmp_path / "worker.py"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("0 of 1", "0 of 2", "1 of 2"))
    assert first["weights"] == second["weights"]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(weight), rtol=1e-4, atol=1e-5)
    assert first["train"] == pytest.approx(one["train"], rel=1e-5)
    assert first["nll"] == second["nll"] == pytest.approx(one["nll"], rel=1e-6)  # both with rank 0's statistics


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


BAD_INPUT = [
    (["--cfg", "config/none.yaml"], "config/none.yaml: no such configuration file"),
    (["--cfg", "config"], "config: no such configuration file"),
    (["--cfg", "requirements.txt"], "requirements.txt: "),
    (["--cfg", CE, "lrr", 0.1], "unknown key 'lrr'; the nearest known one is 'lr'"),
    (["--cfg", CE, "lr", "fast"], "lr: 'fast' must be a number > 0"),
    (["--cfg", CE, "lr", 0], "lr: 0 must be a number > 0"),
    (["--cfg", CE, "imb_factor", 100], "0.01 for a ratio of 100"),
    (["--cfg", CE, "imb_factor", 0], "must lie in (0, 1]"),
    (["--cfg", CE, "batch_size", 0], "batch_size: 0 must be a whole number >= 1"),
    (["--cfg", CE, "alpha", -0.1], "alpha: -0.1 must be a number >= 0"),
    (["--cfg", CE, "num_epochs", 0], "num_epochs: 0 must be a whole number >= 1"),
    (["--cfg", CE, "workers", -1], "workers: -1 must be a whole number >= 0"),
    (["--cfg", CE, "backbone", "resnet33"], "'resnet33' is unknown; known are resnet8, resnet20, resnet32"),
    (["--cfg", CE, "loss", "arc"], "'arc' is unknown; known are ce, arb"),
    (["--cfg", CE, "class_counts", "local"], "'local' is unknown; known are global, batch"),
    (["--cfg", CE, "dataset", "mnist"], "'mnist' is unknown; known are cifar10, cifar100, digits, folder"),
    (["--cfg", CE, "num_classes", 11], "num_classes: 11, but digits"),
    (["--cfg", CE, "tail_class_idx", "[7, 12]"], "come together"),
    (["--cfg", CE, "resume", "none.pth.tar"], "none.pth.tar: no such checkpoint file"),
    (["--cfg", CE, "resume", "README.md"], "README.md: is damaged or no checkpoint"),
    (["--cfg", CE, "val_per_class", 500], "has only 138 training images"),
    (["--cfg", "config/folder/base.yaml", "data_path", "none"], "none/train is no folder"),
    (["--cfg", ARB, "LAS", "True", "smooth_head", 0.3, "smooth_tail", 0], "LAS and arbloss cannot both be True"),
    (["--cfg", CE, "loss", "las"], "needs smooth_head and smooth_tail"),
    (["--cfg", CE, "precision", "bf8"], "precision: 'bf8' must be one of fp32, tf32, bf16, fp16"),
    (["--cfg", CE, "data_on_device", "maybe"], "data_on_device: 'maybe' must be one of auto, True, False"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT, ids=[" ".join(map(str, a[1:])) for a, _ in BAD_INPUT])
def test_bad_input_ends_in_exit_code_2_and_one_line(arguments, expected, capsys, tmp_path):
    save = ["save_dir", tmp_path / "saved"] if len(arguments) > 2 or "requirements" not in arguments[1] else []
    result = failure(capsys, train_stage1.main, *arguments, *save)
    assert result.code == 2
    assert len(result.lines) == 1
    assert expected in result.said
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("where", "workers"), [("auto", 0), (True, 2), (False, 0), (False, 2)])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_broken_image_is_named(tmp_path, capfd, part, where, workers):
    """At the start, or in training or evaluation when it is met; from a worker without a traceback."""
    write_folders(tmp_path / "images", per_class=(3, 3, 3))
    broken = tmp_path / "images" / part / "two" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = ["data_path", tmp_path / "images", "image_size", 8, "save_dir", tmp_path / "saved", "num_epochs", 1]
    options += ["data_on_device", where, "workers", workers]
    result = failure(capfd, train_stage1.main, "--cfg", "config/folder/base.yaml", *options)
    assert result.code == 2
    assert len(result.lines) == 1
    assert f"{broken}: is no readable image" in result.said
    assert (tmp_path / "saved").exists() == (where is False)


def test_a_last_batch_of_one_image_is_refused_before_training_where_batch_norm_cannot_take_it(tmp_path, capsys):
    """477 images in batches of 68 leave one; ResNet-18 pools 32 pixels down to one, ResNet-20 to eight."""
    arguments = ["--cfg", CE, "batch_size", 68, "num_epochs", 1, "save_dir", tmp_path / "saved"]
    result = failure(capsys, train_stage1.main, *arguments, "backbone", "resnet18")
    assert result.code == 2
    assert "batch_size: 68 leaves a pass of one image" in result.said
    assert not (tmp_path / "saved").exists()
    assert failure(capsys, train_stage1.main, *arguments).code == 0


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, capsys):
    path = finished / "ckps" / "current.pth.tar"
    own = torch.load(path, weights_only=True)
    torch.save({key: own[key] for key in own if key != "config"}, tmp_path / "weights.pth.tar")
    named = "was trained with backbone resnet20, but backbone is resnet32"
    for file, said in ((path, named), (tmp_path / "weights.pth.tar", "is of another architecture")):
        arguments = ["--cfg", ARB, "backbone", "resnet32", "resume", file, "save_dir", tmp_path / "saved"]
        result = failure(capsys, train_stage1.main, *arguments)
        assert result.code == 2
        assert len(result.lines) == 1
        assert said in result.said
    assert not (tmp_path / "saved").exists()


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_cut_or_unsafe_checkpoint_is_refused_and_runs_nothing(finished, tmp_path, capsys):
    whole = (finished / "ckps" / "current.pth.tar").read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict_model": Hostile(tmp_path / "made")}, tmp_path / "unsafe.pth.tar")
    for name, expected in (("cut", "is damaged"), ("unsafe", "unsafe to load")):
        path = tmp_path / f"{name}.pth.tar"
        arguments = ["--cfg", ARB, "resume", path, "save_dir", tmp_path / "saved"]
        result = failure(capsys, train_stage1.main, *arguments)
        assert result.code == 2
        assert len(result.lines) == 1
        assert f"{path}: " in result.said
        assert expected in result.said
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "made").exists()


def test_from_the_shell_there_is_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "train_stage1.py", "--cfg", CE, "lr", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: command line: lr: 0 must be a number > 0\n"


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 1)
    path = folder / "ckps" / "current.pth.tar"
    before = path.read_bytes()
    result = failure(
        capsys, train_stage1.main, "--cfg", ARB, "num_epochs", 3, "lr", 1e30, "resume", path, "save_dir", tmp_path
    )
    assert result.code == 2
    found = re.search(
        r"error: epoch 1, step (\d+): the loss or a logit is not finite .* images: ([\d, ]+);", result.said
    )
    data = build_data("digits", "", imb_factor=0.05)
    batches = list(data.train_loader(load_config(ARB).batch_size, 0, CPU).epoch(1))
    assert list(map(int, found[2].split(", "))) == batches[int(found[1])].indices.tolist()
    assert result.said.endswith(f"; the last good checkpoint is {path}\n")
    assert path.read_bytes() == before
    assert content(folder)["epoch"] == 1


def test_evaluated_are_every_so_many_th_epoch_and_each_of_the_last():
    def epochs(every, last):
        return [epoch for epoch in range(12) if train_stage1.due(epoch, every, 12, last)]

    assert epochs(5, 0) == epochs(5, 1) == [4, 9, 11]
    assert epochs(5, 3) == [4, 9, 10, 11]
    assert epochs(20, 99) == list(range(12))
    assert epochs(0, 3) == []
