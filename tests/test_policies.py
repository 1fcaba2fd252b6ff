"""Policies, Cutout and random erasing: against torchvision image by image, and what is drawn how often."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from datasets.image_ops import NUMBERS, OPERATIONS, _by_operation, _everywhere, apply
from datasets.policies import POLICIES, Augmentation, Augmenter, cutout_boxes, erase, erasing_boxes
from datasets.specs import CIFAR_MEAN, CIFAR_STD
from tests.test_streaming import SIZE, folder, pixels, train_loader
from utils.seed import generator

__all__ = ["folder"]  # a fixture
SIDE = 32


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Five pieces of a photograph, one grey, one of a single colour: uint8 [7, 3, 32, 32]."""
    whole = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    pieces = [whole[:, 40 * n : 40 * n + SIDE, 60 * n : 60 * n + SIDE] for n in range(5)]
    return torch.stack([*pieces, pieces[0][:1].expand(3, -1, -1), torch.full_like(pieces[0], 7)])


def spaces() -> dict[str, set[float]]:
    """Every strength that a policy of torchvision gives an operation."""
    found: dict[str, set[float]] = {}
    for space in (
        AutoAugment()._augmentation_space(10, (SIDE, SIDE)),
        RandAugment()._augmentation_space(31, (SIDE, SIDE)),
        TrivialAugmentWide()._augmentation_space(31),
    ):
        for name, (strengths, signed) in space.items():
            values = strengths.reshape(-1).tolist()
            found.setdefault(name, set()).update(values, [-value for value in values] if signed else [])
    return found


def theirs(image: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    return _apply_op(image, name, strength, InterpolationMode.NEAREST, None)


def assert_same(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal; where pixels move, one in a thousand may come from the neighbour, half a pixel away from both."""
    assert (ours.dtype, ours.shape) == (torch.uint8, expected.shape)
    moves = name in ("ShearX", "ShearY", "Rotate")
    assert (ours != expected).float().mean() <= (0.001 if moves else 0), name


@pytest.mark.parametrize(("name", "strengths"), spaces().items(), ids=lambda value: value if type(value) is str else "")
def test_an_operation_equals_torchvisions_at_every_strength(photographs, name, strengths):
    chosen = sorted(strengths)[:: max(1, len(strengths) // 12)]
    images = photographs.repeat(len(chosen), 1, 1, 1)
    strength = torch.tensor(chosen, dtype=torch.float64).repeat_interleave(len(photographs))
    before = images.clone()
    ours = apply(images, torch.full((len(images),), NUMBERS[name]), strength)
    expected = torch.stack([theirs(image, name, s) for image, s in zip(images, strength.tolist(), strict=True)])
    assert_same(ours, expected, name)
    assert torch.equal(images, before)


@pytest.mark.parametrize("way", [_by_operation, _everywhere], ids=["as on a CPU", "as on a GPU"])
def test_each_image_has_its_own_operation(photographs, way):
    own = {"TranslateX": 5, "TranslateY": -3, "Rotate": 20, "Posterize": 4, "Solarize": 120}
    strengths = [float(own.get(name, 0.3)) for name in OPERATIONS]
    images = photographs[:1].expand(len(OPERATIONS), -1, -1, -1)
    ours = way(images, torch.arange(len(OPERATIONS)), torch.tensor(strengths, dtype=torch.float64))
    for name, strength, image in zip(OPERATIONS, strengths, ours, strict=True):
        assert_same(image, theirs(photographs[0], name, strength), name)
    assert len(ours.flatten(1).unique(dim=0)) >= len(OPERATIONS) - 1  # one stretches nothing


def test_half_precision_of_the_network_is_not_that_of_its_images(photographs):
    augmenter = new_augmenter(Augmentation("autoaugment"))
    numbers, strengths = (table.repeat(20, 1) for table in augmenter.draw(len(photographs), 0, 0))
    images = photographs.repeat(20, 1, 1, 1).permute(0, 2, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = augmenter(images, numbers, strengths)
    assert torch.equal(half, augmenter(images, numbers, strengths))


@pytest.mark.parametrize("large", [False, True], ids=["CIFAR-10", "ImageNet"])
def test_autoaugment_draws_every_pair_with_its_probabilities_and_signs(large):
    policy = AutoAugmentPolicy.IMAGENET if large else AutoAugmentPolicy.CIFAR10
    size, options = 50_000, Augmentation("autoaugment")
    numbers, strengths = POLICIES["autoaugment"](size, SIDE, large, options, generator(0, 0, "policy"))
    assert (numbers.shape, strengths.shape) == ((size, 2), (size, 2))
    space = AutoAugment()._augmentation_space(10, (SIDE, SIDE))
    expected: dict[tuple[int, float], float] = {}
    for first, chance, level in (pair[0] for pair in AutoAugment(policy).policies):
        magnitudes, signed = space[first]
        strength = float(magnitudes if level is None else magnitudes[level])
        for sign in (1, -1) if signed else (1,):
            key = (NUMBERS[first], round(sign * strength, 6))
            expected[key] = expected.get(key, 0) + chance / 25 / (2 if signed else 1)
    seen = list(zip(numbers[:, 0].tolist(), (round(s, 6) for s in strengths[:, 0].tolist()), strict=True))
    for key, chance in expected.items():
        count = sum(pair in (key, (key[0], -0.0)) if key[1] == 0 else pair == key for pair in seen)
        if key[1] == 0 and chance:  # both signs of a strength of 0
            chance = sum(value for other, value in expected.items() if other == key)
        assert chance == 0 or stats.binomtest(count, size, min(chance, 1)).pvalue > 1e-6, key


def test_randaugment_applies_num_ops_of_the_magnitude():
    options = Augmentation("randaugment", num_ops=3, magnitude=12)
    numbers, strengths = POLICIES["randaugment"](3000, SIDE, False, options, generator(0, 0, "policy"))
    space = RandAugment()._augmentation_space(31, (SIDE, SIDE))
    assert numbers.shape == (3000, 3)
    for name, (magnitudes, signed) in space.items():
        drawn = strengths[numbers == NUMBERS[name]]
        assert 0.8 < len(drawn) / (9000 / len(space)) < 1.2
        expected = float(magnitudes[12] if magnitudes.ndim else magnitudes)
        assert set(drawn.abs().tolist()) == {expected}
        assert bool(drawn.lt(0).any()) == (signed and expected > 0)


def test_trivialaugment_applies_one_operation_of_any_strength():
    numbers, strengths = POLICIES["trivialaugment"](30_000, SIDE, False, Augmentation(), generator(0, 0, "policy"))
    assert numbers.shape == (30_000, 1)
    rotations = strengths[numbers == NUMBERS["Rotate"]]
    assert len(rotations.abs().unique()) == 31
    assert 0.45 < rotations.lt(0).double().mean() < 0.55


@pytest.mark.parametrize("length", [16, 7, 64])
def test_cutout_cuts_a_square_around_every_pixel_alike(length):
    boxes = cutout_boxes(20_000, SIDE, length, generator(0, 0, "cutout"))
    top, left, bottom, right = boxes.T
    assert boxes.min() >= 0
    assert boxes.max() <= SIDE
    assert (bottom - top).max() == min(length, SIDE)
    assert ((bottom - top) >= length // 2).all() or length == 64
    inner = boxes[(top > 0) & (left > 0) & (bottom < SIDE) & (right < SIDE)]
    assert torch.equal(inner[:, 2:] - inner[:, :2], torch.full((len(inner), 2), length))
    if length == 16:  # the centre is uniform: 15 of 32 rows leave the square whole, and border squares start at 0
        assert 0.20 < len(inner) / len(boxes) < 0.26


def test_random_erasing_draws_as_torchvision_does():
    boxes = erasing_boxes(20_000, SIDE, 0.25, generator(0, 0, "random erasing"))
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = height > 0
    assert 0.23 < erased.double().mean() < 0.27
    area = (height * width)[erased].double() / SIDE**2
    ratio = (height / width)[erased]
    assert 0.01 < area.min() < 0.04
    assert 0.30 < area.max() < 0.36
    assert stats.kstest(area.numpy(), stats.uniform(0.02, 0.31).cdf).statistic < 0.05
    assert 0.45 < ratio.gt(1).double().mean() < 0.6
    assert boxes.min() >= 0
    assert boxes.max() <= SIDE


def test_erasing_sets_the_box_to_zero_and_nothing_else():
    images = torch.rand(2, 3, 8, 6) + 1
    erased = erase(images.clone(), torch.tensor([[1, 2, 4, 6], [3, 3, 3, 3]]))
    assert torch.equal(erased[0, :, 1:4, 2:6], torch.zeros(3, 3, 4))
    assert (erased == 0).sum() == 3 * 3 * 4
    assert torch.equal(erased[1], images[1])


def new_augmenter(options: Augmentation) -> Augmenter:
    return Augmenter(options, SIDE, False, torch.tensor(CIFAR_MEAN), torch.tensor(CIFAR_STD))


def test_a_policy_comes_before_normalisation_and_boxes_after_it(photographs):
    options = Augmentation("autoaugment", cutout=8, random_erasing=1.0)
    augmenter, count = new_augmenter(options), len(photographs)
    numbers, strengths, cut, erased = augmenter.draw(count, 3, 5)
    ours = augmenter(photographs.permute(0, 2, 3, 1), numbers, strengths, cut, erased)
    for n, image in enumerate(photographs):
        for number, strength in zip(numbers[n].tolist(), strengths[n].tolist(), strict=True):
            image = apply(image[None], torch.tensor([number]), torch.tensor([strength], dtype=torch.float64))[0]
        expected = (image / 255 - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]
        for top, left, bottom, right in (cut[n].tolist(), erased[n].tolist()):
            expected[:, top:bottom, left:right] = 0
        torch.testing.assert_close(ours[n], expected, rtol=1e-5, atol=1e-6)


def test_draws_are_a_function_of_seed_epoch_and_stream():
    augmenter = new_augmenter(Augmentation("randaugment", cutout=8, random_erasing=0.5))
    first, again = augmenter.draw(500, 3, 7), augmenter.draw(500, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (augmenter.draw(500, 4, 7), augmenter.draw(500, 3, 8), augmenter.draw(500, 3, 7, "pasted ")):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert new_augmenter(Augmentation()).draw(500, 3, 7) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_on_large_images_a_policy_takes_the_place_of_the_jitter(folder, workers):
    """The crops are those of the standard augmentation; the order of batches and the workers do not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = train_loader(folder, workers, augmentation=Augmentation("autoaugment", cutout=8))
        batches = list(loader.epoch(2))
    crops = pixels(folder)
    numbers, strengths, boxes = crops.augmenter.__class__(
        Augmentation("autoaugment", cutout=8), SIDE, True, crops.mean, crops.std
    ).draw(SIZE, 1, 2)
    for batch in batches:
        (plain,) = (inputs[0] for inputs in crops.train_inputs(batch.indices, [slice(0, None)], 1, 2))
        images = plain.permute(0, 3, 1, 2)
        for k in range(2):
            images = apply(images, numbers[batch.indices, k], strengths[batch.indices, k])
        expected = (images / 255 - crops.mean[:, None, None]) / crops.std[:, None, None]
        expected = erase(expected, boxes[batch.indices])
        torch.testing.assert_close(batch.augment(), expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(batch.targets, batch.indices % 5)
