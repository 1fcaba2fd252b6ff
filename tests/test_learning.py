"""That training learns, that ARB-Loss does on the tail what it is for, and that speed costs no accuracy."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tests.conftest import ARB, CE, train

SCHEDULE = ["num_epochs", 20, "lr_steps", "[15, 18]", "eval_every", 20]


def last_epoch(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test"]


def few_shot_gains(tmp_path, seeds):
    """ARB-Loss minus cross-entropy, both with mixup and the same seed, in points, one per seed."""
    gains = []
    for seed in range(seeds):
        options = ["seed", seed, *SCHEDULE, "batch_size", 32, "mixup", True]
        arb, plain = (last_epoch(train(tmp_path / f"{seed}" / Path(cfg).stem, *options, cfg=cfg)) for cfg in (ARB, CE))
        assert arb["top1"] > 50
        gains.append(arb["few"] - plain["few"])
    return gains


@pytest.mark.slow
def test_arb_loss_lifts_the_tail_of_the_digits(tmp_path):
    assert np.mean(few_shot_gains(tmp_path, 3)) > 5


@pytest.mark.soak
def test_arb_loss_lifts_the_tail_of_the_digits_over_many_seeds(tmp_path):
    assert lower_end(few_shot_gains(tmp_path, 10)) > 5


def lower_end(differences):
    """Of the one-sided 95 % interval (Student's t) of the mean of paired differences."""
    error = np.std(differences, ddof=1) / len(differences) ** 0.5
    return np.mean(differences) - stats.t.ppf(0.95, len(differences) - 1) * error


def test_the_lower_end_of_an_interval_is_that_of_a_table():
    """Differences of mean 1 and deviation 1; t of 0.95 with 4 degrees of freedom is 2.132."""
    differences = 1 + np.array([-1, -1, 0, 1, 1])
    assert lower_end(differences) == pytest.approx(1 - 2.132 / 5**0.5, abs=1e-3)


def fastest_minus_strict(tmp_path, seeds, fastest, *overrides, cfg):
    """Paired differences of top-1 after the last epoch, in points, one per seed."""
    torch.compiler.reset()
    differences = []
    for seed in range(seeds):
        fast, strict = (
            last_epoch(train(tmp_path / f"{name}{seed}", "seed", seed, *overrides, *options, cfg=cfg))["top1"]
            for name, options in (("fast", fastest), ("strict", ["cuda_graph", False]))
        )
        differences.append(fast - strict)
    return differences


def say(capsys, differences):
    with capsys.disabled():
        sys.stdout.write(
            f"\nfastest minus fp32, last epoch, top-1: {np.mean(differences):+.2f} points on average, deviation "
            f"{np.std(differences, ddof=1):.2f}, n {len(differences)}, lower end {lower_end(differences):+.2f}\n"
        )


@pytest.mark.soak
def test_the_fastest_mode_learns_digits_as_well_as_strict_float32(tmp_path, capsys):
    """bf16 and compiled is what the bench finds fastest on a CPU that has bf16."""
    fastest = ["precision", "bf16", "compile", True]
    differences = fastest_minus_strict(tmp_path, 20, fastest, *SCHEDULE, "batch_size", 32, cfg=ARB)
    say(capsys, differences)
    assert lower_end(differences) > -1.0


@pytest.mark.soak
@pytest.mark.skipif("CIFAR10_IMAGES" not in os.environ, reason="CIFAR10_IMAGES names no folder with CIFAR-10 images")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_fastest_mode_learns_cifar_as_well_as_strict_float32(tmp_path, capsys):
    fastest, cfg = ["precision", "bf16", "compile", True], "config/cifar10/cifar10_imb001_arbloss_mixup.yaml"
    schedule = ["num_epochs", 50, "lr_steps", "[40, 45]", "eval_every", 50, "batch_size", 128]
    data = ["data_path", os.environ["CIFAR10_IMAGES"]]
    differences = fastest_minus_strict(tmp_path, 10, fastest, *schedule, *data, cfg=cfg)
    say(capsys, differences)
    assert lower_end(differences) > -0.7


@pytest.mark.soak
@pytest.mark.skipif("CIFAR10_IMAGES" not in os.environ, reason="CIFAR10_IMAGES names no folder with CIFAR-10 images")
def test_one_epoch_on_real_cifar_images_beats_chance(tmp_path):
    data = os.environ["CIFAR10_IMAGES"]
    cfg = "config/cifar10/cifar10_imb001_stage1_mixup.yaml"
    test = last_epoch(train(tmp_path, "data_path", data, "num_epochs", 1, "batch_size", 128, "lr", 0.2, cfg=cfg))
    assert test["samples"] == 10_000
    assert test["top1"] > 15
