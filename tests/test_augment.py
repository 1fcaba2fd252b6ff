"""Crops, flips and colours against torchvision on the PIL image; draws as a pure function of (seed, epoch)."""

from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomResizedCrop, Resize, ToTensor

from datasets.augment import (
    central_crop,
    crop_and_flip,
    crop_box,
    draw_crops,
    draw_jitter,
    jitter,
    normalise,
    random_crop,
)
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


@pytest.mark.parametrize("draw", [partial(draw_crops, 500, 4, True), partial(draw_jitter, 500, 0.4)])
def test_draws_are_a_function_of_seed_and_epoch_alone(draw):
    np.random.seed(99)
    torch.manual_seed(99)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again = draw(3, 7), draw(seed=3, epoch=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        assert (first[0] == draw(seed, epoch)[0]).all(1).float().mean() < 0.05
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("epoch", range(2))
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


# ---------------------------------------------------------------------------------------------------------------------
# Large images

ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
ORDERS = list(permutations(range(3)))


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(9, 7, 3).numpy()).resize((width, height))


def decoded(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W], as a fast decoder gives it: in memory the colours of a pixel lie side by side."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def photographs() -> list[Image.Image]:
    """Those that come with scikit-learn, and those beside the project where there are any."""
    beside = (Path(__file__).parents[2] / "shared" / "data" / "photos").glob("*.JPEG")
    return [*map(Image.fromarray, load_sample_images().images), *(Image.open(path).convert("RGB") for path in beside)]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    values = np.concatenate([ours, theirs])
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(below[0] - below[1]).max()


def torchvision_boxes(height: int, width: int, number: int) -> np.ndarray:
    image = torch.empty(1).expand(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draw = RandomResizedCrop.get_params
        return np.array([draw(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]) for _ in range(number)])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (200, 200), (90, 300), (200, 67)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    number = 3000
    random = np.random.default_rng(0)
    ours = np.array([crop_box(height, width, random) for _ in range(number)])
    top, left, h, w = ours.T
    assert ((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)).all()
    statistics = {
        "share of the area": lambda _, __, h, w: h * w / (height * width),
        "ratio": lambda _, __, h, w: w / h,
        "top": lambda top, _, __, ___: top,
        "left": lambda _, left, __, ___: left,
        "free rows above": lambda top, _, h, __: np.where(h < height, top / np.maximum(height - h, 1), -1),
        "free columns left": lambda _, left, __, w: np.where(w < width, left / np.maximum(width - w, 1), -1),
    }
    theirs = torchvision_boxes(height, width, number)
    for name, statistic in statistics.items():
        far = distance(statistic(*ours.T), statistic(*theirs.T))
        assert far < 1.95 * (2 / number) ** 0.5, name  # one in 1000 goes beyond, if the distributions are equal
    share = h * w / (height * width)
    assert 0.078 < share.min() < 0.09
    assert (w / h).min() > 0.73 and (w / h).max() < 1.36


@pytest.mark.parametrize(("height", "width"), [(7, 150), (150, 7), (1, 30), (31, 1000), (1201, 53)])
def test_of_an_extreme_image_the_largest_central_crop_is_taken_as_in_torchvision(height, width):
    box = crop_box(height, width, np.random.default_rng(0))
    assert box == tuple(torchvision_boxes(height, width, 1)[0])
    assert all(type(value) is int for value in box)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (3, 3), (5, 4)])
def test_a_crop_of_a_tiny_image_lies_inside(height, width):
    random = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = crop_box(height, width, random)
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
        assert h > 0 and w > 0


@pytest.mark.parametrize(("width", "height", "size"), [(60, 45, 32), (33, 80, 24), (300, 20, 16), (5, 5, 8)])
def test_a_random_crop_equals_torchvisions_and_half_are_mirrored(width, height, size):
    image, mirrored = picture(width, height), 0
    for seed in range(200):
        ours = random_crop(image, size, np.random.default_rng(seed))
        assert (ours.dtype, ours.shape) == (np.uint8, (size, size, 3))
        box = crop_box(height, width, np.random.default_rng(seed))
        upright = TF.resized_crop(image, *box, [size, size])
        flip = not np.array_equal(ours, np.asarray(upright))
        np.testing.assert_array_equal(ours, np.asarray(TF.hflip(upright) if flip else upright))
        mirrored += flip
    assert abs(mirrored / 200 - 0.5) < 4 * 0.5 / 200**0.5


def test_whether_a_crop_is_mirrored_does_not_depend_on_where_it_is():
    random, left, mirrored = np.random.default_rng(0), [], []
    ramp = Image.fromarray(np.arange(250, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2))
    for _ in range(3000):
        crop = random_crop(ramp, 8, random)[4, :, 0].astype(int)
        left.append(crop.min())
        mirrored.append(crop[0] > crop[-1])
    assert abs(np.corrcoef(left, mirrored)[0, 1]) < 4 / 3000**0.5


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (64, 73), (8, 9)])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (256, 256), (20, 31), (400, 25), (25, 400)])
def test_the_middle_of_an_image_equals_torchvisions_resize_and_center_crop(width, height, size, resized):
    image = picture(width, height)
    ours = central_crop(image, size)
    assert (ours.dtype, ours.shape) == (np.uint8, (size, size, 3))
    expected = np.asarray(Compose([Resize(resized), CenterCrop(size)])(image))
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(central_crop(decoded(image), size), expected.astype(int), rtol=0, atol=2)


@pytest.mark.parametrize(("width", "height", "size"), [(120, 90, 32), (300, 20, 16), (5, 5, 8), (1, 1, 4), (1, 9, 8)])
def test_crops_of_a_tensor_are_those_of_the_pil_image_but_for_rounding(width, height, size):
    image = picture(width, height)
    tensor, other_layout = decoded(image), decoded(image).contiguous()
    for seed in range(50):
        draws = [np.random.default_rng(seed) for _ in range(3)]
        ours, same, expected = map(random_crop, (tensor, other_layout, image), [size] * 3, draws)
        assert draws[0].bit_generator.state == draws[2].bit_generator.state
        assert (ours.dtype, ours.shape) == (np.uint8, (size, size, 3))
        np.testing.assert_array_equal(ours, same)
        np.testing.assert_allclose(ours, expected.astype(int), rtol=0, atol=2)
    np.testing.assert_allclose(central_crop(tensor, size), central_crop(image, size).astype(int), rtol=0, atol=2)
    assert torch.equal(tensor, decoded(image))


@pytest.mark.parametrize("size", [224, 64])
def test_most_pixels_of_a_photograph_are_the_same_as_a_tensor_and_as_a_pil_image(size):
    """On 63 photographs, at 224 pixels: 96.6 % of the values; the mean difference was 0.034 of 255, one crop's 0.25."""
    differences = []
    for image in photographs():
        tensor, seeds = decoded(image), [np.random.default_rng(seed) for seed in (0, 0, 1, 1)]
        pairs = [map(random_crop, (tensor, image), [size] * 2, seeds[i : i + 2]) for i in (0, 2)]
        for ours, expected in (*pairs, (central_crop(tensor, size), central_crop(image, size))):
            differences.append(np.abs(ours.astype(int) - expected))
            assert differences[-1].max() <= 2
            assert differences[-1].mean() < 0.3
    assert np.mean(differences) < 0.05


def jittered_by_torchvision(image: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> np.ndarray:
    result = Image.fromarray(image.numpy())
    for operation in order.tolist():
        result = ADJUST[operation](result, factors[operation].item())
    return np.asarray(result)


def assert_jitter_equals_torchvisions(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> None:
    before = images.clone()
    ours = jitter(images, factors, order)
    assert (ours.dtype, ours.shape) == (torch.uint8, images.shape)
    assert torch.equal(images, before)
    for i, image in enumerate(images):
        theirs = jittered_by_torchvision(image, factors[i], order[i])
        np.testing.assert_array_equal(ours[i].numpy(), theirs, err_msg=f"{factors[i]} {order[i]}")


def test_jitter_equals_torchvisions_pixel_by_pixel_for_each_images_draws():
    images, draws = noise(300, 20, 24, 3), draw_jitter(300, 0.4, 0, 0)
    assert len(draws.order.unique(dim=0)) == 6
    assert_jitter_equals_torchvisions(images, *draws)


@pytest.mark.parametrize("order", ORDERS)
def test_jitter_equals_torchvisions_for_extreme_factors(order):
    factors = torch.tensor(list(product([0.0, 1e-3, 1.0, 1.7, 300.0], repeat=3)))
    assert_jitter_equals_torchvisions(noise(len(factors), 5, 7, 3), factors, torch.tensor([order] * len(factors)))


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255), (1, 254, 128)])
def test_jitter_equals_torchvisions_on_one_colour(colour):
    images = torch.tensor(colour, dtype=torch.uint8).expand(60, 4, 5, 3)
    assert_jitter_equals_torchvisions(images, *draw_jitter(60, 0.99, 0, 0))


@pytest.mark.parametrize("grey", [0, 99, 100, 254])
def test_a_mean_grey_that_ends_in_a_half_is_rounded_as_in_torchvision(grey):
    images = torch.full((3, 4, 4, 3), grey, dtype=torch.uint8)
    for number, brighter in enumerate([7, 8, 9]):  # of 16 pixels
        images[number].view(16, 3)[:brighter] += 1
    factors = torch.tensor([[1.0, 0.0, 1.0]]).expand(3, 3)  # contrast 0: the mean grey alone
    assert_jitter_equals_torchvisions(images, factors, torch.tensor([[0, 1, 2]] * 3))
    assert jitter(images, factors, torch.tensor([[0, 1, 2]] * 3))[:, 0, 0, 0].tolist() == [grey, grey + 1, grey + 1]


@pytest.mark.parametrize("brighter", [59_999, 60_000])
def test_the_mean_grey_of_a_large_image_is_exact(brighter):
    """Of 120,000 pixels: the sum of all is more than float32 counts up to."""
    images = torch.full((1, 3, 40_000, 3), 254, dtype=torch.uint8)
    images.view(-1, 3)[:brighter] += 1
    assert_jitter_equals_torchvisions(images, torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0, 1, 2]]))


def test_grey_is_pils_for_every_colour():
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack(torch.meshgrid(levels[::5], levels, levels, indexing="ij"), dim=-1)  # [52, 256, 256, 3]
    grey = jitter(images, torch.tensor([[1.0, 1.0, 0.0]]).expand(52, 3), torch.tensor([[0, 1, 2]]).expand(52, 3))
    for ours, colours in zip(grey, images, strict=True):
        expected = np.asarray(Image.fromarray(colours.numpy()).convert("L"))
        np.testing.assert_array_equal(ours, expected[..., None].repeat(3, axis=-1))


def test_every_image_of_a_batch_has_its_own_factors_and_order():
    image = noise(12, 12, 3)
    factors, order = draw_jitter(200, 0.4, 0, 0)
    same_order, same_factors = order[:1].expand_as(order), factors[:1].expand_as(factors)
    batch = image.expand(200, *image.shape)
    assert len(jitter(batch, factors, same_order).flatten(1).unique(dim=0)) == 200
    assert len(jitter(batch, same_factors, order).flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("strength", [0.4, 0.1])
def test_factors_are_uniform_and_orders_equally_frequent(strength):
    size = 60_000
    factors, order = draw_jitter(size, strength, 0, 0)
    assert (factors.dtype, order.dtype) == (torch.float32, torch.int64)
    uniform = (np.arange(size) + 0.5) / size
    for column in factors.T:
        assert distance((column.double().numpy() - 1 + strength) / (2 * strength), uniform) < 1.95 / size**0.5
        assert 1 - strength <= column.min() and column.max() <= 1 + strength
    which = sum(order[:, i] * 3 ** (2 - i) for i in range(3))
    seen, counts = which.unique(return_counts=True)
    assert seen.tolist() == [a * 9 + b * 3 + c for a, b, c in ORDERS]
    assert ((counts - size / 6) ** 2 / (size / 6)).sum() < 20.5  # 5 degrees of freedom: one in 1000 is larger
    related = np.corrcoef(torch.column_stack([factors, order[:, :2]]).T.numpy()) - np.eye(5)
    related[3:, 3:] = 0  # first and second place of a permutation do depend on each other
    assert np.abs(related).max() < 4 / size**0.5
