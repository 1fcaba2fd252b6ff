"""The draws of an epoch and the mixing."""

import pytest
import torch
from scipy import stats

from methods.mixup import draw, mix


def test_mix_is_the_weighted_sum_with_the_partners_labels():
    images, targets = torch.arange(24.0).reshape(4, 3, 2), torch.tensor([5, 6, 7, 8])
    partner = torch.tensor([2, 0, 3, 1])
    mixed, targets_a, targets_b = mix(images, targets, 0.25, partner)
    for i in range(4):
        torch.testing.assert_close(mixed[i], 0.25 * images[i] + 0.75 * images[partner[i]])
    assert torch.equal(targets_a, targets)
    assert targets_b.tolist() == [7, 5, 8, 6]


def test_lambda_one_leaves_the_images_as_they_are():
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(mix(images, torch.zeros(3), torch.ones(()), torch.tensor([1, 2, 0]))[0], images)


def test_the_table_has_one_row_per_step_and_a_permutation_of_its_batch():
    table = draw(1.0, [8, 8, 3], seed=0, epoch=4)
    assert [sorted(row.partner.tolist()) for row in table] == [list(range(8)), list(range(8)), [0, 1, 2]]
    assert all(0 <= float(row.lam) <= 1 and row.lam.shape == () for row in table)


def test_alpha_zero_gives_lambda_one():
    assert [float(lam) for lam, _ in draw(0.0, [4, 4], seed=0, epoch=0)] == [1.0, 1.0]


def test_the_table_is_a_function_of_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = draw(0.2, [8] * 5, seed=3, epoch=7)
    torch.manual_seed(2)
    again = draw(0.2, [8] * 5, seed=3, epoch=7)
    assert all(
        torch.equal(a.lam, b.lam) and torch.equal(a.partner, b.partner) for a, b in zip(first, again, strict=True)
    )
    for other in (draw(0.2, [8] * 5, seed=4, epoch=7), draw(0.2, [8] * 5, seed=3, epoch=8)):
        assert all(not torch.equal(a.lam, b.lam) for a, b in zip(first, other, strict=True))


def test_lambdas_do_not_depend_on_the_batch_sizes():
    """Processes with unequal shares of a batch mix with the same lambda."""
    ours, theirs = draw(1.0, [8, 8, 3], 0, 0), draw(1.0, [8, 8, 2], 0, 0)
    assert [a.lam for a in ours] == [b.lam for b in theirs]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lambda_follows_the_beta_distribution(alpha):
    lams = torch.stack([row.lam for row in draw(alpha, [1] * 4000, seed=0, epoch=0)])
    assert stats.kstest(lams.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
