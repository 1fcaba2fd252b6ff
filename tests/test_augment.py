"""Crops and flips against torchvision on the PIL image; an epoch's draws as a pure function of (seed, epoch)."""

from itertools import product

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from datasets.augment import crop_and_flip, draw_crops, normalise
from datasets.specs import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def torchvision_crop(image: torch.Tensor, row: int, column: int, flip: bool, padding: int) -> np.ndarray:
    height, width, _ = image.shape
    padded = TF.pad(Image.fromarray(image.numpy()), padding, fill=0)
    cropped = TF.crop(padded, row, column, height, width)
    return np.asarray(TF.hflip(cropped) if flip else cropped)


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (9, 14, 1), (8, 8, 0), (5, 3, 4)])
def test_every_crop_and_flip_equals_torchvision_on_the_pil_image(height, width, padding):
    draws = list(product(range(2 * padding + 1), range(2 * padding + 1), (False, True)))
    images = noise(len(draws), height, width, 3)
    before = images.clone()
    ours = crop_and_flip(images, torch.tensor([d[:2] for d in draws]), torch.tensor([d[2] for d in draws]), padding)
    theirs = np.stack([torchvision_crop(image, *draw, padding) for image, draw in zip(images, draws, strict=True)])
    assert ours.dtype == torch.uint8
    np.testing.assert_array_equal(ours.numpy(), theirs)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("mean", "std"), [(CIFAR_MEAN, CIFAR_STD), (IMAGENET_MEAN, IMAGENET_STD)])
def test_normalise_is_bit_equal_to_totensor_and_normalize(mean, std):
    every_value = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    images = torch.cat([every_value, noise(3, 16, 16, 3)])
    transform = Compose([ToTensor(), Normalize(mean, std)])
    ours = normalise(images, mean, std)
    assert torch.equal(ours, torch.stack([transform(Image.fromarray(image.numpy())) for image in images]))
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_draws_are_a_function_of_seed_and_epoch_alone():
    first = draw_crops(500, 4, True, seed=3, epoch=7)
    np.random.seed(99)
    torch.manual_seed(99)
    draw_crops(500, 4, True, seed=3, epoch=8)
    again = draw_crops(500, 4, True, seed=3, epoch=7)
    assert torch.equal(first.offsets, again.offsets)
    assert torch.equal(first.flips, again.flips)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 8), (4, 7), (7, 3)])
def test_another_seed_or_epoch_gives_other_draws(seed, epoch):
    first, other = draw_crops(500, 4, True, 3, 7), draw_crops(500, 4, True, seed, epoch)
    assert (first.offsets == other.offsets).all(1).float().mean() < 0.05
    assert (first.flips == other.flips).float().mean() < 0.65


def test_drawing_leaves_the_global_generators_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    draw_crops(500, 4, True, 0, 0)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("epoch", range(3))
def test_offsets_are_uniform_and_half_of_the_images_flip(epoch):
    size = 81_000
    offsets, flips = draw_crops(size, 4, True, 0, epoch)
    assert (offsets.dtype, flips.dtype) == (torch.int64, torch.bool)
    seen = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert len(seen) == 81  # nothing outside 0..8 on either axis
    assert (offsets >= 0).all() and (offsets <= 8).all()
    chi_square = ((seen - size / 81) ** 2 / (size / 81)).sum()
    assert 33 < chi_square < 150  # 80 degrees of freedom: 80 +- 4 (below) and 5.5 (above) standard deviations
    assert abs(flips.float().mean() - 0.5) < 5 * 0.5 / size**0.5
    flipped_from = torch.bincount(offsets[flips, 1], minlength=9) / torch.bincount(offsets[:, 1], minlength=9)
    assert (flipped_from - 0.5).abs().max() < 5 * 0.5 / (size / 9) ** 0.5  # a flip does not depend on the offset


def test_without_flips_nothing_flips_and_the_crops_stay_the_same():
    mirrored, upright = draw_crops(1000, 4, True, 0, 0), draw_crops(1000, 4, False, 0, 0)
    assert mirrored.flips.any()
    assert not upright.flips.any()
    assert torch.equal(mirrored.offsets, upright.offsets)


def test_without_padding_images_are_only_flipped():
    images = noise(40, 6, 6, 3)
    offsets, flips = draw_crops(40, 0, True, 0, 0)
    expected = torch.where(flips[:, None, None, None], images.flip(2), images)
    assert torch.equal(crop_and_flip(images, offsets, flips, 0), expected)
