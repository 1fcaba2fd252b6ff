"""The preview of a configuration: its images are those that the training loop sees, and the file can be read back."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datasets import verify
from datasets.data import CPU
from tests import test_cifar
from tests.conftest import ARB, CE, failure
from utils.build import load_data, new_loaders, new_method
from utils.command_line import exit_code
from utils.config import load_config
from utils.report import style
from utils.report.preview import IMAGES, preview_rows

archive = test_cifar.archive
MIXED = ["mixup", "True", "alpha", "1.0", "seed", "3"]
PASTED = ["mix", "cmo", "cmo_idle", "1", "mix_prob", "1", "augment", "autoaugment", "cutout", "4"]


def settings(name: str, tmp_path: Path, lists: Path, archive) -> list[str]:
    """A configuration of each kind of data set."""
    if name == "CIFAR":
        return ["config/cifar10/cifar10_imb01.yaml", "data_path", str(archive("cifar10", 10)[0]), "batch_size", "7"]
    if name == "folder":
        for label in ("cat", "dog"):
            for part in ("train", "test"):
                for i in range(11 if label == "cat" else 3):
                    path = tmp_path / part / label / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.effect_noise((20, 16), 10 * i + 10).save(path)
        return ["config/folder/base.yaml", "data_path", str(tmp_path), "image_size", "16", "batch_size", "4"]
    if name == "lists":
        options = ["image_size", "32", "batch_size", "24", "workers", "1"]
        return ["config/imagenet/imagenet_resnet50.yaml", "data_path", str(lists / "imagenet"), *options]
    return [CE, "image_size", "8", "batch_size", "64", "val_per_class", "5"]


def expected(cfg) -> dict[tuple[str, int], torch.Tensor]:
    """The first images of each class, by its name and count, that the training loop makes: [n, S, S, 3].

    Of epoch 0 or, with CMO, 1.
    """
    data = load_data(cfg, cfg.class_map, CPU)
    loader, method, seen, epoch = new_loaders(cfg, data, CPU).train, new_method(cfg, data), {}, int(cfg.mix == "cmo")
    method.start_epoch(epoch)
    draws = method.draws(loader.batch_sizes, cfg.seed, epoch, loader.accumulate)
    for batch, draw in zip(loader.epoch(epoch, paste=method.pastes), draws, strict=True):
        images, targets = batch.augment(), torch.cat([batch.targets, batch.pasted_targets])
        if method.mixes:
            images, targets, _ = method.mixing.mix(images, targets, *draw)
        for image, label in zip(images if batch.weight else [], targets.tolist(), strict=False):
            shown = image.permute(1, 2, 0) * torch.tensor(data.spec.std) + torch.tensor(data.spec.mean)
            seen.setdefault(label, []).append(shown)
    names, counts = data.class_names, data.class_counts
    return {(names[label], int(counts[label])): torch.stack(images[:IMAGES]) for label, images in seen.items()}


@pytest.mark.parametrize(
    "mixup", [[], MIXED, PASTED, ["mix", "cutmix", "mix_prob", "1"]], ids=["plain", "mixup", "CMO", "CutMix"]
)
@pytest.mark.parametrize(
    ("name", "counts"), [("CIFAR", [5, 2, 1]), ("digits", [133, 26, 6]), ("folder", [11, 3]), ("lists", [32, 4, 2])]
)
def test_the_images_are_those_that_the_network_is_trained_on(name, counts, mixup, tmp_path, lists, archive):
    path, *options = settings(name, tmp_path, lists, archive)
    cfg = load_config(path, [*options, *mixup])
    rows, seen = preview_rows(cfg), expected(cfg)
    assert [row.count for row in rows] == counts
    for row in rows:
        assert_close(row.images, seen[row.name, row.count].clamp(0, 1))
        assert len(row.images) == len(row.weights) == min(row.count, IMAGES)
    weights = torch.cat([row.weights for row in rows])
    assert weights.lt(1).float().mean() > 0.5 if mixup else weights.eq(1).all()


def test_partners_are_those_of_the_micro_batch(tmp_path, lists, archive):
    """Its last step has a single image, so one micro-batch is filled up with another one's."""
    path, *options = settings("digits", tmp_path, lists, archive)
    size = sum(row[1] for row in expected(load_config(path, options)))
    cfg = load_config(path, [*options, *MIXED, "batch_size", str(size - 1), "accumulate", "2"])
    seen = expected(cfg)
    for row in preview_rows(cfg):
        assert_close(row.images, seen[row.name, row.count].clamp(0, 1))


@pytest.mark.parametrize("ending", ["png", "PDF"])
def test_the_command_writes_a_picture(ending, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FIGURES", str(tmp_path))
    target = tmp_path / f"preview.{ending}"
    arguments = ["--cfg", ARB, "--preview", f"$FIGURES/preview.{ending}", "image_size", "8"]
    assert exit_code(lambda: verify.main(arguments)) == 0
    assert capsys.readouterr().out.endswith(f"problems: 0\n\npreview: {target}\n")
    assert list(tmp_path.iterdir()) == [target]
    if ending == "PDF":
        assert target.read_bytes().startswith(b"%PDF")
        return
    with Image.open(target) as image:
        assert image.width == style.WIDE * style.DPI
        grey = image.convert("L")
    left, right = grey.crop((0, 0, grey.width // 10, grey.height)), grey.crop((grey.width // 2, 0, *grey.size))
    assert left.getextrema()[0] < 60  # names of the classes
    assert len(right.getcolors()) > 100


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("x.jpg", "must be a file that ends with .png or .pdf, not 'x.jpg'"),
        ("x", "must be a file that ends with .png or .pdf, not 'x'"),
        ("folder.png", "must be a file that ends with .png or .pdf, not 'folder.png'"),
        ("nowhere/x.png", "nowhere cannot be written to: No such file or directory"),
        ("file/x.png", "file cannot be written to: Not a directory"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_the_data_are_read(
    target, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    failed = failure(capsys, verify.main, "--cfg", "nowhere.yaml", "--preview", target)
    assert (failed.code, len(failed.lines)) == (2, 1)
    assert failed.said.startswith(f"error: command line: argument --preview: {said} (usage: ")
