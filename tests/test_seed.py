"""Randomness is a function of seed, epoch and purpose alone."""

import itertools

import numpy as np
import torch

from utils.seed import generator, seeded_weights


def test_a_stream_depends_on_its_arguments_alone():
    first = generator(3, 5, "crop").random(100)
    np.random.default_rng(0).random(7)
    torch.rand(7)
    generator(3, 5, "order").random(7)
    np.testing.assert_array_equal(generator(3, 5, "crop").random(100), first)


def test_streams_of_seeds_epochs_and_purposes_are_independent():
    arguments = [*itertools.product(range(4), range(4), ["order", "crop", "flip", "mixup"])]
    streams = {generator(*given).bytes(16) for given in arguments}
    assert len(streams) == len(arguments)
    values = np.stack([generator(seed, epoch, purpose).random(500) for seed, epoch, purpose in arguments])
    correlations = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(correlations).max() < 0.25


def test_streams_of_images_are_independent():
    arguments = [(1, 2, "crop"), (1, 2, "crop", 0, 0), *((1, epoch, "crop", i) for epoch in (2, 3) for i in range(300))]
    streams = {generator(*given).bytes(16) for given in arguments}
    assert len(streams) == len(arguments)
    values = np.stack([generator(1, 2, "crop", i).random(500) for i in range(64)])
    assert np.abs(np.corrcoef(values) - np.eye(64)).max() < 0.25
    first = np.array([generator(1, 2, "crop", i).random() for i in range(4000)])
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.08  # neighbours
    np.testing.assert_allclose(np.histogram(first, 8, (0, 1))[0] / 4000, 1 / 8, atol=0.025)


def test_the_stream_of_an_image_depends_on_its_arguments_alone():
    first = generator(1, 2, "crop", 70_000).random(5)
    generator(1, 2, "crop", 69_999).random(7)
    np.testing.assert_array_equal(generator(1, 2, "crop", np.int64(70_000)).random(5), first)


def test_draws_for_one_purpose_do_not_shift_another():
    crops, mixing = generator(0, 0, "crop"), generator(0, 0, "mixup")
    crops.random(3)
    np.testing.assert_array_equal(mixing.random(10), generator(0, 0, "mixup").random(10))


def test_the_stream_is_the_same_in_every_process_and_version():
    assert generator(0, 0, "order").bit_generator.random_raw(2).tolist() == [17650036448499027134, 6721985885100968541]


def test_global_generators_are_unchanged():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    generator(0, 0, "order").random(5)
    with seeded_weights(7):
        torch.rand(11)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_seeded_weights_depend_on_the_seed_alone():
    drawn = []
    for seed in (7, 7, 8):
        torch.rand(3)
        with seeded_weights(seed):
            drawn.append(torch.nn.Linear(4, 4).weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_seeded_weights_restore_the_generator_after_an_error():
    torch.manual_seed(1)
    expected = torch.random.get_rng_state()
    try:
        with seeded_weights(7):
            torch.rand(3)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(torch.random.get_rng_state(), expected)
