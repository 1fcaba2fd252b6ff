"""Batches: every image once per epoch, shards that add up to one process's batches, and evaluation."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.augment import crop_and_flip, draw_crops, normalise
from datasets.loaders import Batch, EvalLoader, InMemoryImages, TrainLoader, plan_micro_batches, shard
from datasets.source import DataError
from datasets.specs import CIFAR_MEAN, CIFAR_STD

CPU = torch.device("cpu")
SIDE = 16  # padding 2


def images_and_targets(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(size)
    images = random.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)
    return torch.from_numpy(images), torch.from_numpy(random.integers(0, 10, size))


def train_loader(size=53, batch_size=16, flip=True, seed=1, rank=0, world_size=1, accumulate=1) -> TrainLoader:
    images, targets = images_and_targets(size)
    pixels = InMemoryImages(images, CIFAR_MEAN, CIFAR_STD, CPU, flip)
    return TrainLoader(pixels, targets, batch_size, seed, CPU, rank, world_size, accumulate)


def assert_bit_equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.augment(), b.augment())


def joined(parts: Sequence[Batch]) -> Batch:
    """The parts that count, as one batch."""
    counted = [part for part in parts if part.weight > 0]
    inputs = tuple(torch.cat(tensors) for tensors in zip(*(part.inputs for part in counted), strict=True))
    labels = {name: torch.cat([getattr(part, name) for part in counted]) for name in ("targets", "indices")}
    weight = sum(part.weight for part in parts) / len(parts)
    return parts[-1]._replace(inputs=inputs, weight=weight, **labels)


@given(size=st.integers(0, 500), world_size=st.integers(1, 20))
def test_shards_are_disjoint_complete_and_differ_by_at_most_one(size, world_size):
    shards = [list(range(size))[shard(size, rank, world_size)] for rank in range(world_size)]
    assert list(chain.from_iterable(shards)) == list(range(size))
    lengths = [len(s) for s in shards]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "batch_size"), [(53, 16), (48, 16), (7, 16), (1, 1), (17, 1)])
def test_an_epoch_sees_every_image_once_and_keeps_the_last_smaller_batch(size, batch_size):
    images, targets = images_and_targets(size)
    loader = train_loader(size, batch_size)
    batches = list(loader.epoch(0))
    lengths = [len(batch.indices) for batch in batches]
    assert (
        lengths
        == loader.batch_sizes
        == [batch_size] * (size // batch_size) + [size % batch_size] * (size % batch_size > 0)
    )
    assert len(loader) == len(batches)
    seen = torch.cat([batch.indices for batch in batches])
    assert torch.equal(seen.sort().values, torch.arange(size))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), targets[seen])
    assert all(batch.augment().shape == (len(batch.indices), 3, *images.shape[1:3]) for batch in batches)


def test_a_batch_holds_the_crops_of_its_images():
    images, _ = images_and_targets(53)
    offsets, flips = draw_crops(53, 2, True, seed=1, epoch=4)
    for batch in train_loader().epoch(4):
        cropped = crop_and_flip(images[batch.indices], offsets[batch.indices], flips[batch.indices], padding=2)
        assert torch.equal(batch.augment(), normalise(cropped, CIFAR_MEAN, CIFAR_STD))


def test_the_crop_of_an_image_does_not_depend_on_its_batch():
    whole, single = (joined(list(train_loader(batch_size=b).epoch(2))) for b in (53, 5))
    assert torch.equal(whole.augment(), single.augment())
    assert torch.equal(whole.indices, single.indices)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [53, 48, 49])
def test_processes_together_see_the_batches_of_one(size, world_size):
    ranks = [train_loader(size, rank=r, world_size=world_size).epoch(3) for r in range(world_size)]
    together = [joined(parts) for parts in zip(*ranks, strict=True)]
    assert_bit_equal(together, list(train_loader(size).epoch(3)))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), batch_size=st.integers(5, 20), world_size=st.integers(1, 5))
def test_weighted_means_of_the_shards_average_to_the_mean_of_the_global_batch(size, batch_size, world_size):
    ranks = [train_loader(size, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    loss = torch.linspace(-1, 1, size, dtype=torch.float64) ** 3
    for parts in zip(*(loader.epoch(0) for loader in ranks), strict=True):
        assert sum(part.weight for part in parts) / world_size == pytest.approx(1)
        means = [part.weight * loss[part.indices].mean().item() for part in parts]
        assert sum(means) / world_size == pytest.approx(loss[joined(parts).indices].mean().item())


epochs = {
    "size": st.integers(1, 60),
    "batch_size": st.integers(1, 25),
    "world_size": st.integers(1, 5),
    "accumulate": st.integers(1, 5),
}


@given(**epochs)
def test_micro_batches_of_a_process_are_what_as_many_processes_see(size, batch_size, world_size, accumulate):
    parts = world_size * accumulate
    alone = [plan_micro_batches(size, batch_size, part, parts, 1) for part in range(parts)]
    for rank in range(world_size):
        micro_batches = plan_micro_batches(size, batch_size, rank, world_size, accumulate)
        steps = zip(*alone[rank * accumulate : (rank + 1) * accumulate], strict=True)
        for ours, theirs in zip(micro_batches, chain.from_iterable(steps), strict=True):
            assert ours.positions == theirs.positions
            assert ours.weight * accumulate == pytest.approx(theirs.weight)


@given(**epochs)
def test_micro_batches_of_a_step_share_its_batch_and_its_weight(size, batch_size, world_size, accumulate):
    plans = [plan_micro_batches(size, batch_size, rank, world_size, accumulate) for rank in range(world_size)]
    steps = -(-size // batch_size)
    for step in range(steps):
        parts = [p for plan in plans for p in plan[step * accumulate : (step + 1) * accumulate]]
        assert sum(p.weight for p in parts) == pytest.approx(world_size)
        seen = [list(range(p.positions.start, p.positions.stop)) for p in parts]
        assert all(seen)  # every process takes part in every micro-batch, and no mean is over nothing
        whole = range(step * batch_size, min((step + 1) * batch_size, size))
        assert [i for part, p in zip(seen, parts, strict=True) if p.weight for i in part] == list(whole)
        assert all(part == [whole[0]] for part, p in zip(seen, parts, strict=True) if not p.weight)
        lengths = [len(part) for part, p in zip(seen, parts, strict=True) if p.weight]
        assert max(lengths) - min(lengths) <= 1
    assert [p.ends_step for p in plans[0]] == [*[False] * (accumulate - 1), True] * steps


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 3), (3, 4), (1, 16)])
@pytest.mark.parametrize("size", [53, 48, 49])
def test_accumulated_steps_see_the_batches_of_steps_at_once(size, world_size, accumulate):
    loaders = [train_loader(size, rank=r, world_size=world_size, accumulate=accumulate) for r in range(world_size)]
    whole = list(train_loader(size).epoch(3))
    ranks = [list(loader.epoch(3)) for loader in loaders]
    for loader, batches in zip(loaders, ranks, strict=True):
        assert len(loader) == len(whole)
        assert loader.batch_sizes == [len(batch.indices) for batch in batches]
        assert [batch.ends_step for batch in batches] == [*[False] * (accumulate - 1), True] * len(whole)
    steps = [slice(n * accumulate, (n + 1) * accumulate) for n in range(len(whole))]
    assert_bit_equal([joined([batch for rank in ranks for batch in rank[step]]) for step in steps], whole)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (3, 1), (2, 3)])
def test_every_part_knows_the_labels_of_the_whole_global_batch(world_size, accumulate):
    whole = list(train_loader().epoch(4))
    for rank in range(world_size):
        batches = list(train_loader(rank=rank, world_size=world_size, accumulate=accumulate).epoch(4))
        for number, batch in enumerate(batches):
            assert torch.equal(batch.step_targets, whole[number // accumulate].targets)


def test_the_last_parts_of_a_small_batch_are_the_empty_ones():
    """Rank 0's batch-norm statistics are kept, so it is the last to go without images."""
    assert [p.weight > 0 for r in range(4) for p in plan_micro_batches(3, 8, r, 4, 2)] == [True] * 3 + [False] * 5


def test_fewer_images_than_parts_in_every_step_are_refused():
    with pytest.raises(
        DataError, match=r"^batch_size: 5 is less than one image for each of 3 micro-batches \(accumulate\) of 2"
    ):
        train_loader(batch_size=5, world_size=2, accumulate=3)
    assert len(train_loader(batch_size=6, world_size=2, accumulate=3)) == 9


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_resumes_at_any_step(world_size, accumulate, first):
    for rank in range(world_size):
        loader = train_loader(53, 16, rank=rank, world_size=world_size, accumulate=accumulate)
        whole, rest = list(loader.epoch(3)), list(loader.epoch(3, first))
        assert len(rest) == (4 - first) * accumulate
        assert_bit_equal(rest, whole[first * accumulate :])
        assert [batch.full for batch in rest] == [batch.full for batch in whole[first * accumulate :]]


def test_the_images_of_a_step_are_those_of_all_its_parts():
    loaders = [train_loader(53, 16, rank=rank, world_size=2, accumulate=2) for rank in range(2)]
    for step in range(4):
        parts = [b for loader in loaders for b in list(loader.epoch(3))[2 * step : 2 * step + 2] if b.weight]
        indices = torch.cat([part.indices for part in parts]).tolist()
        assert loaders[0].step_indices(3, step) == loaders[1].step_indices(3, step) == indices


def test_an_epoch_is_the_same_whenever_it_is_drawn():
    loader = train_loader()
    first = list(loader.epoch(5))
    list(loader.epoch(6))
    torch.manual_seed(99)
    np.random.seed(99)
    assert_bit_equal(list(loader.epoch(5)), first)
    assert_bit_equal(list(train_loader().epoch(5)), first)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 6), (2, 5)])
def test_another_epoch_or_seed_differs_in_order_and_crops(seed, epoch):
    first, other = joined(list(train_loader().epoch(5))), joined(list(train_loader(seed=seed).epoch(epoch)))
    assert abs(np.corrcoef(first.indices, other.indices)[0, 1]) < 0.6  # 53 images: 4 standard deviations
    by_image = [batch.augment()[batch.indices.argsort()] for batch in (first, other)]
    differs = (by_image[0] != by_image[1]).flatten(1).any(1)
    assert differs.float().mean() > 0.8


def test_training_touches_neither_the_images_nor_the_global_generators():
    loader = train_loader()
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(loader.epoch(0))
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert torch.equal(loader.pixels.images, images_and_targets(53)[0])


@pytest.mark.parametrize(("side", "padding"), [(32, 4), (8, 1), (64, 8), (7, 0)])
def test_padding_is_an_eighth_of_the_side(side, padding):
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    pixels = InMemoryImages(images, CIFAR_MEAN, CIFAR_STD, CPU)
    assert pixels.padding == padding
    inputs = next(pixels.train_inputs(torch.arange(2), [slice(0, 2)], 0, 0))
    assert pixels.augment(*inputs).shape == (2, 3, side, side)


def test_without_flips_no_image_is_mirrored():
    ramp = torch.arange(SIDE, dtype=torch.uint8).mul(9).add(1).reshape(1, 1, SIDE, 1).expand(64, SIDE, SIDE, 3)
    arguments = (ramp, (0.0,) * 3, (1.0,) * 3, CPU)
    for flip in (False, True):
        pixels = InMemoryImages(*arguments, flip)
        images = pixels.augment(*next(pixels.train_inputs(torch.arange(64), [slice(0, 64)], 0, 0)))
        middle = images[:, 0, SIDE // 2, 2:-2].diff()  # left of the padding, brightness rises unless mirrored
        rises, falls = (middle > 0).all(1), (middle < 0).all(1)
        assert (rises | falls).all()
        assert falls.any() == flip


@pytest.mark.parametrize("batch_size", [1, 10, 500])
def test_evaluation_sees_every_image_in_order_as_it_is(batch_size):
    images, targets = images_and_targets(53)
    loader = EvalLoader(InMemoryImages(images, CIFAR_MEAN, CIFAR_STD, CPU), targets, batch_size, CPU)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert [len(t) for _, t in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat([i for i, _ in batches]), normalise(images, CIFAR_MEAN, CIFAR_STD))
        assert torch.equal(torch.cat([t for _, t in batches]), targets)


@pytest.mark.parametrize("world_size", [1, 3, 9])
@pytest.mark.parametrize(("size", "batch_size"), [(53, 10), (50, 10), (1, 1)])
def test_processes_evaluate_whole_batches_that_are_those_of_one_process_in_order(size, batch_size, world_size):
    """With more processes than batches some have none."""
    images, targets = images_and_targets(size)
    source = InMemoryImages(images, CIFAR_MEAN, CIFAR_STD, CPU)
    ranks = [EvalLoader(source, targets, batch_size, CPU, r, world_size) for r in range(world_size)]
    lengths = [len(list(rank)) for rank in ranks]
    assert lengths == [len(rank) for rank in ranks]
    assert max(lengths) - min(lengths) <= 1
    alone = EvalLoader(source, targets, batch_size, CPU)
    for ours, theirs in zip(chain.from_iterable(ranks), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
