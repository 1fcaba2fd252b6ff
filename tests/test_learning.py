"""Slow: that training learns, and that ARB-Loss does on the tail what it is for. Several seeds, real images."""

import json
import os

import pytest

from tests.conftest import train

pytestmark = pytest.mark.slow

SCHEDULE = ["num_epochs", 20, "lr_steps", "[15, 18]", "eval_every", 20]


def last_epoch(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test"]


def test_arb_loss_with_mixup_lifts_the_tail_of_the_digits(tmp_path):
    """Paired seeds: few-shot accuracy is higher in every pair, by 5 points and more on average."""
    differences = []
    for seed in range(3):
        folders = [
            train(tmp_path / f"{arm}{seed}", "seed", seed, *SCHEDULE, "batch_size", 32, cfg=f"config/digits/{arm}.yaml")
            for arm in ("digits_imb005_arbloss_mixup", "digits_imb005")
        ]
        arb, plain = (last_epoch(folder) for folder in folders)
        assert arb["top1"] > 85
        assert plain["top1"] > 80
        differences.append(arb["few"] - plain["few"])
    assert min(differences) > 0
    assert sum(differences) / len(differences) > 5


@pytest.mark.skipif("CIFAR10_IMAGES" not in os.environ, reason="CIFAR10_IMAGES names no folder with CIFAR-10 images")
def test_one_epoch_on_real_cifar_images_beats_chance(tmp_path):
    data = os.environ["CIFAR10_IMAGES"]
    cfg = "config/cifar10/cifar10_imb001_stage1_mixup.yaml"
    test = last_epoch(train(tmp_path, "data_path", data, "num_epochs", 1, "batch_size", 128, "lr", 0.2, cfg=cfg))
    assert test["samples"] == 10_000
    assert test["top1"] > 15
