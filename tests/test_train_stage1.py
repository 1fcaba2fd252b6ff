"""Training end to end, by the real script on real images."""

import fcntl
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

import eval as eval_script
import train_stage1
from datasets import build_data
from methods import build_method
from models import build_model
from tests.conftest import (
    ARB,
    CE,
    ROOT,
    SHORT,
    assert_same_run,
    assert_same_tensors,
    content,
    copy_of,
    current,
    failure,
    history,
    in_ranks,
    log_of,
    manager_of,
    stop_before,
    stopped,
    train,
    train_in_rank,
)
from utils import build, files
from utils.command_line import exit_code
from utils.config import load_config
from utils.errors import DivergenceError, Interrupted
from utils.precision import new_scaler
from utils.run import describe, provenance, record
from utils.run.log import RunLog
from utils.schedule import due
from utils.step import Step

CPU = torch.device("cpu")

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
        "ckps/epoch_1.pth.tar",
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
    log = log_of(finished)
    first = log.splitlines()[0]
    for words in ("ARB-Loss with batch class counts", "mixup alpha 1", "imbalance factor 0.05", "2 epochs", "seed 0"):
        assert words in first
    assert "x0.1 from epoch 30, x0.01 from epoch 36" in first
    assert "warning: lr_steps [30, 36]: not all of it is reached in 2 epochs\n" in log
    assert log.rstrip().endswith(
        f"tensorboard --logdir {finished}; figures: python -m utils.compare {finished} --out page.html"
    )
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


def test_a_terminal_sees_a_progress_bar_and_whole_lines(tmp_path, monkeypatch):
    """A pseudo-terminal of 100 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: _read(parent), b"")))
    reader.start()
    with os.fdopen(child, "w", buffering=1) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        train(tmp_path, "num_epochs", 1)
    reader.join(timeout=60)
    os.close(parent)
    text = b"".join(shown).decode()
    assert re.search(r"epoch 0:\s+\d+%\|", text)
    assert re.search(r"(^|\r|\n)Epoch: \[0\]\[4/8\]", text)


def _read(terminal: int) -> bytes:
    """What the other side wrote; nothing when it is closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility


def test_the_recorded_config_alone_reproduces_the_run(finished, tmp_path):
    """The same weights, metrics and predictions, whatever the number of workers."""
    copied = shutil.copy(finished / "config.yaml", tmp_path / "again.yaml")
    assert_same_run(finished, train(tmp_path / "saved", "workers", 3, cfg=str(copied)))


def test_another_seed_draws_other_weights_and_another_order():
    parts = []
    for seed in (0, 1):
        cfg = load_config(ARB, [*SHORT, "seed", str(seed)])
        data = build.load_data(cfg, cfg.class_map, CPU)
        batch = next(data.train_loader(cfg.batch_size, cfg.seed, CPU).epoch(0))
        parts.append((build.new_model(cfg, data).classifier.fc.weight, batch.indices))
    (weights, order), (other_weights, other_order) = parts
    assert not torch.equal(weights, other_weights)
    assert not torch.equal(order, other_order)


def test_two_methods_with_one_seed_see_identical_weights_batches_crops_and_lambdas():
    arms = []
    for path, overrides in ((ARB, []), (CE, ["mixup", "True", "loss", "focal_arb"])):
        cfg = load_config(path, [*SHORT, *overrides])
        data = build.load_data(cfg, cfg.class_map, CPU)
        loader = data.train_loader(cfg.batch_size, cfg.seed, CPU)
        method = build.new_method(cfg, data)
        batches = [batch for epoch in (0, 7) for batch in loader.epoch(epoch)]
        draws = [draw for epoch in (0, 7) for draw in method.draws(loader.batch_sizes, cfg.seed, epoch)]
        arms.append((build.new_model(cfg, data).state_dict(), batches, draws))
    (weights, batches, draws), (other_weights, other_batches, other_draws) = arms
    assert_same_tensors(weights, other_weights)
    assert len(batches) == len(draws) == 16
    for ours, theirs in zip(batches, other_batches, strict=True):
        assert torch.equal(ours.augment(), theirs.augment())
        assert torch.equal(ours.indices, theirs.indices)
    for ours, theirs in zip(draws, other_draws, strict=True):
        assert torch.equal(ours.lam, theirs.lam)
        assert torch.equal(ours.partner, theirs.partner)


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def test_going_back_to_an_earlier_checkpoint_leaves_no_epoch_twice(finished, tmp_path):
    folder = stopped(finished, tmp_path)
    train(tmp_path, "num_epochs", 2, "resume", current(folder))
    assert history(folder) == history(finished)
    assert "epochs from 1 on will be trained again; their 1 rows are dropped" in log_of(folder)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [p.step for p in board.Scalars("top1/test")] == [0, 1]


def lines_of(folder):
    """The log's lines of progress and accuracy, without times."""
    lines = [re.sub(r"Time +[\d.]+", "", line[24:]) for line in log_of(folder).splitlines()]
    return [line for line in lines if line.startswith(("Epoch: [", "* "))]


HALF = ["precision", "fp16", "max_grad_norm", 1.0]
IMAGES = ["mixup", False, "mix", "cmo", "cmo_idle", 0, "augment", "randaugment", "cutout", 3, "random_erasing", 0.5]
OPTIONS = [
    ["accumulate", 2, "diagnostics", 2, "nc_every", 1],
    [*IMAGES, "diagnostics", 2, "sam", 0.05, "ema", 0.9, "nesterov", True, "nc_means", 1, "nc_dual", 1, "spa", "slerp"],
    pytest.param(HALF, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_stopped_within_an_epoch_goes_on_inside_it(tmp_path, options, monkeypatch, capsys):
    """By a signal in each of its two epochs."""
    options = ["num_epochs", 2, "print_freq", 3, *options]
    whole = train(tmp_path / "whole", *options)
    start = ["--cfg", ARB, *SHORT, *options, "save_dir", tmp_path / "parts", "resume", "auto"]
    passes = 2 if "accumulate" in options else 1
    for steps, reached in ((5, "epoch 0, 6 of 8"), (9, "epoch 1, 8 of 8")):
        with monkeypatch.context() as patch:
            stop_before(patch, steps * passes)
            result = failure(capsys, train_stage1.main, *start)
        assert result.code == 143
        assert f"SIGTERM: {reached} steps" in result.lines[0]
        assert "resume " in result.lines[0]
    (folder,) = (tmp_path / "parts").iterdir()
    assert not (folder / "summary.json").exists()
    train(tmp_path / "parts", *options, "resume", "auto")
    assert_same_run(whole, folder)
    assert lines_of(whole) == lines_of(folder)
    assert len(lines_of(whole)) == 2 * (3 + 2 + ("ema" in options))


def test_a_step_s_checkpoint_goes_on_inside_the_epoch(finished, tmp_path, monkeypatch):
    """The process is lost between two checkpoints: what came after the last one is done again."""
    options = ["num_epochs", 2, "checkpoint_every_steps", 3]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.build.evaluate", lambda *_: 1 / 0)
        train(tmp_path, *options)
    (folder,) = tmp_path.iterdir()
    assert (content(folder)["epoch"], content(folder)["step"]) == (0, 6)
    train(tmp_path, *options, "resume", "auto")
    assert history(folder) == history(finished)
    assert lines_of(folder) == lines_of(finished)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of one epoch that a signal ended after six of its eight steps."""
    root = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_before(patch, 5)
        train(root, "num_epochs", 1)
    (folder,) = root.iterdir()
    return folder


@pytest.mark.parametrize(("changed", "step"), [(["lr", 0.05], 6), (["batch_size", 32], 0), (["seed", 1], 0)])
def test_an_epoch_begins_anew_where_its_steps_have_changed(interrupted, tmp_path, changed, step, capsys):
    folder = copy_of(interrupted, tmp_path)
    train(tmp_path, "num_epochs", 1, "resume", current(folder), *changed)
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
    assert f"CPU threads: 99 before, {torch.get_num_threads()} now" in said
    assert f"torch: 2.0 before, {torch.__version__} now" in said
    assert "processes" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 64}, "was trained on other data"),
        ({"fingerprint": torch.zeros(3)}, "was trained on other data"),
        ({"class_counts": [1, 2]}, "was trained on other images"),
        ({"step": 9, "sums": torch.zeros(1, 6, dtype=torch.float64)}, "is at step 9 of an epoch that has 8 steps"),
    ],
    ids=["other lists or labels", "a hash that is none", "counts that are none", "more steps than an epoch has"],
)
def test_a_checkpoint_of_other_data_or_against_itself_is_refused(finished, tmp_path, capsys, change, said):
    torch.save(content(finished) | change, tmp_path / "x.pth.tar")
    arguments = ["resume", tmp_path / "x.pth.tar", "save_dir", tmp_path / "saved", "num_epochs", 3]
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, *arguments)
    assert (result.code, len(result.lines)) == (2, 1)
    assert said in result.said


def test_auto_starts_anew_where_there_is_nothing_and_goes_on_where_there_is(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 1, "resume", "auto")
    assert "no checkpoint of this configuration" in capsys.readouterr().out
    assert load_config(folder / "config.yaml").resume == ""  # the file alone repeats the run
    train(tmp_path, "num_epochs", 1, "resume", "auto")
    assert f"{current(folder)}: resuming after 1 epochs" in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_data_and_names_what_else_changed(finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    before = (folder / "config.yaml").read_text()
    for key, value in (("imb_factor", 0.5), ("val_per_class", 5), ("subset_seed", 1), ("optimizer", "adamw")):
        result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, "resume", current(folder), key, value)
        assert (result.code, len(result.lines)) == (2, 1)
        assert f"was trained with {key} " in result.said
        assert f"but {key} is {value}" in result.said
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, "resume", current(folder), "spa", "proj")
    assert "was trained without moving class means; nc_means, nc_dual and spa cannot be switched on" in result.said
    assert (folder / "config.yaml").read_text() == before
    train(tmp_path, "num_epochs", 3, "lr", 0.05, "resume", current(folder))
    said = capsys.readouterr().out
    assert "lr changes from 0.1 to 0.05" in said
    assert "num_epochs changes from 2 to 3" in said
    assert [row["epoch"] for row in history(folder)] == [0, 1, 2]


def test_resuming_a_finished_run_prints_the_table_and_changes_nothing(finished, tmp_path, capsys):
    """Not even its settings, whatever else is asked for."""
    folder = copy_of(finished, tmp_path)
    train(tmp_path, "num_epochs", 1, "batch_size", 32, "resume", current(folder))
    said = capsys.readouterr().out
    assert "last epoch (epoch 1)" in said
    assert "best on the test set" in said
    assert_same_run(finished, folder)
    assert (folder / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()


def test_a_finished_checkpoint_alone_is_evaluated(finished, tmp_path):
    """Without its run's folder there is no history; the table still has the last epoch."""
    alone = shutil.copy(current(finished), tmp_path / "mine.pth.tar")
    folder = train(tmp_path / "saved", "num_epochs", 2, "resume", alone)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last epoch"]["top1"] == pytest.approx(history(finished)[-1]["test"]["top1"])


def test_a_foreign_file_gives_weights_only_and_says_so(finished, tmp_path):
    own = content(finished)
    foreign = {key: own[key] for key in ("epoch", "best_acc1", "its_ece", "state_dict_classifier")}
    foreign["state_dict_model"] = {f"module.{key}": value for key, value in own["state_dict_model"].items()}
    torch.save(foreign, tmp_path / "mislas.pth.tar")
    folder = train(tmp_path / "saved", "num_epochs", 1, "resume", tmp_path / "mislas.pth.tar")
    assert "weights only, training starts at epoch 0" in log_of(folder)
    assert content(folder)["epoch"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume"] == str(tmp_path / "mislas.pth.tar")


# ---------------------------------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("loss", ["ce", "arb"])
def test_forty_steps_overfit_a_batch(loss):
    data = build_data("digits", "", image_size=8)
    batch = next(data.train_loader(64, 0, CPU).epoch(0))
    images, targets = batch.augment(), batch.targets
    torch.manual_seed(0)
    model = build_model("digits", "resnet8", 10).train()
    method = build_method(loss, "batch", data.class_counts, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for draws in method.draws([64] * 40, seed=0, epoch=0):
        optimizer.zero_grad()
        output = method(model, images, targets, draws)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] / 2


class ScalarReads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def one_epoch(cfg, batch_size, run, lr=0.1):
    """An epoch by the trainer's own loop, in batches of ``batch_size``, with one log line."""
    cfg = load_config(cfg, SHORT)
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
        one_epoch(CE, 477, run, lr=math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_held_out_images_choose_the_best_model_of_the_evaluated_epochs(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 3, "eval_every", 2, "val_per_class", 10)
    rows, best = history(folder), content(folder, "model_best")
    assert ["test" in row for row in rows] == [False, True, True]
    scores = {row["epoch"]: row["val"]["top1"] for row in rows if "val" in row}
    assert rows[1]["val"]["samples"] == 100
    assert best["selected_on"] == "held-out images"
    assert best["epoch"] == max(scores, key=scores.get) + 1  # the first of them
    assert "chosen on held-out images" in capsys.readouterr().out


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
    first, second = in_ranks(tmp_path, train_in_rank, CE, "num_epochs", 1, "save_dir", tmp_path / "saved")
    (folder,) = (tmp_path / "saved").iterdir()
    assert len(history(folder)) == 1
    assert first.count("last epoch (epoch 0)") == 1
    assert "2 processes: each has its own" in first
    assert second == ""


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


BAD_INPUT = [
    (["--cfg", "config"], "config: is a folder; give the path of a YAML file"),
    (["--cfg", CE, "lr", 0], "lr: 0 must be a number > 0"),
    (["--cfg", CE, "loss", "arc"], "'arc' is unknown; known are ce, arb"),
    (["--cfg", CE, "val_per_class", 500], "has only 138 training images"),
    (["--cfg", CE, "resume", "README.md"], "README.md: is damaged or no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT, ids=[" ".join(map(str, a[1:])) for a, _ in BAD_INPUT])
def test_bad_input_ends_in_exit_code_2_and_one_line(arguments, expected, capsys, tmp_path):
    """One for each place where it is noticed: file, option, registry, data, checkpoint."""
    result = failure(capsys, train_stage1.main, *arguments, "save_dir", tmp_path / "saved")
    assert (result.code, len(result.lines)) == (2, 1)
    assert expected in result.said
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("part", "where", "workers"), [("train", "auto", 0), ("train", False, 0), ("test", False, 2)])
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
    """477 images in batches of 68 leave one; ResNet-18 pools 32 pixels down to one, ResNet-8 eight to two."""
    arguments = ["--cfg", CE, "batch_size", 68, "backbone", "resnet18", "save_dir", tmp_path / "saved"]
    result = failure(capsys, train_stage1.main, *arguments)
    assert result.code == 2
    assert "batch_size: 68 leaves a pass of one image" in result.said
    assert not (tmp_path / "saved").exists()
    cfg = load_config(CE, [*SHORT, "batch_size", "68"])
    data = build.load_data(cfg, cfg.class_map, CPU)
    loader = data.train_loader(cfg.batch_size, 0, CPU)
    assert min(loader.batch_sizes) == 1
    build.check_smallest_batch(build.new_model(cfg, data), loader, data.image_size)


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, capsys):
    path = finished / "ckps" / "current.pth.tar"
    own = torch.load(path, weights_only=True)
    torch.save({key: own[key] for key in own if key != "config"}, tmp_path / "weights.pth.tar")
    named = "was trained with backbone resnet8, but backbone is resnet32"
    for file, said in ((path, named), (tmp_path / "weights.pth.tar", "is of another architecture")):
        arguments = [
            "--cfg",
            ARB,
            "image_size",
            8,
            "backbone",
            "resnet32",
            "resume",
            file,
            "save_dir",
            tmp_path / "saved",
        ]
        result = failure(capsys, train_stage1.main, *arguments)
        assert result.code == 2
        assert len(result.lines) == 1
        assert said in result.said
    assert not (tmp_path / "saved").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    path = current(folder)
    before = path.read_bytes()
    arguments = ["--cfg", ARB, *SHORT, "num_epochs", 4, "lr", 1e30, "resume", path, "save_dir", tmp_path]
    result = failure(capsys, train_stage1.main, *arguments)
    assert result.code == 2
    found = re.search(
        r"error: epoch 2, step (\d+): the loss or a logit is not finite .* images: ([\d, ]+);", result.said
    )
    data = build_data("digits", "", imb_factor=0.05, image_size=8)
    batches = list(data.train_loader(64, 0, CPU).epoch(2))
    assert list(map(int, found[2].split(", "))) == batches[int(found[1])].indices.tolist()
    assert result.said.endswith(f"; the last good checkpoint is {path}\n")
    assert path.read_bytes() == before


def test_a_cutout_of_the_whole_image_is_refused(tmp_path, capsys):
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, "save_dir", tmp_path, "cutout", 8)
    assert (result.code, len(result.lines)) == (2, 1)
    assert "cutout: 8 leaves nothing of images of 8 pixels; use less" in result.said


def test_evaluated_are_every_so_many_th_epoch_and_each_of_the_last():
    def epochs(every, last):
        return [epoch for epoch in range(12) if due(epoch, every, 12, last)]

    assert epochs(5, 0) == epochs(5, 1) == [4, 9, 11]
    assert epochs(5, 3) == [4, 9, 10, 11]
    assert epochs(20, 99) == list(range(12))
    assert epochs(0, 3) == []


def test_what_only_describes_a_run_cannot_end_it(tmp_path, monkeypatch):
    def fail(*arguments):
        raise LookupError("no package metadata")

    for module, name in ((record, "machine"), (provenance, "environment"), (describe, "describe_method")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    with pytest.warns(UserWarning, match="is left out") as said:
        folder = train(tmp_path, "num_epochs", 1)
    what = {str(warning.message).partition(" is left out")[0] for warning in said}
    described = {"the run's description", "the machine in starts.jsonl", "the environment in checkpoints"}
    assert described | {"TensorBoard's curves"} <= what
    assert (folder / "summary.json").is_file()


def test_classes_without_training_images_are_counted_by_group():
    counts = torch.tensor([5, 0, 3, 0, 0])
    masks = {"many": counts > 3, "medium": counts == 3, "few": counts == 0}
    (line,) = describe.empty_classes(counts, {"count": masks, "index": {}})
    assert line.startswith("3 of 5 classes have no training image (0 of 1 many, 0 of 1 medium, 3 of 3 few);")
    assert describe.empty_classes(counts + 1, {"count": masks}) == []


def test_what_windows_lacks_is_not_needed(tmp_path, monkeypatch):
    for module, names in (
        (os, ("sysconf", "getppid", "sched_getaffinity", "fork")),
        (signal, ("SIGHUP", "SIGUSR1", "pthread_sigmask", "sigwaitinfo")),
        (files, ("fcntl",)),
    ):
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(files, "fcntl", None, raising=False)
    folder = train(tmp_path, "num_epochs", 1)
    arguments = ["--cfg", ARB, *SHORT, "num_epochs", "1", "resume", str(current(folder))]
    assert exit_code(lambda: eval_script.main(arguments)) == 0
    assert exit_code(lambda: train_stage1.main([*arguments, "save_dir", str(tmp_path)])) == 0
