"""methods/regularizers.py: the two regularizers against their formulas, and what of them reaches which gradient."""

import math

import pytest
import torch

from methods.regularizers import LARGEST_COSINE, CollapseRegularizer, between_class, within_class

TARGETS = torch.tensor([0, 0, 0, 1, 3, 3])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_within(features, targets, means) -> float:
    """Class by class, in plain numbers."""
    total = 0.0
    for k in range(len(means)):
        own = [h.tolist() for h, y in zip(features, targets.tolist(), strict=True) if y == k]
        total += sum(math.dist(h, means[k].tolist()) ** 2 for h in own) / max(1, len(own))
    return total / len(means)


def naive_between(means) -> float:
    """Pair by pair, in plain numbers."""
    centre = [sum(column) / len(means) for column in zip(*means.tolist(), strict=True)]
    centred = [[m - c for m, c in zip(mean, centre, strict=True)] for mean in means.tolist()]

    def angle(a, b):
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        return math.acos(max(-0.99999, min(0.99999, cosine)))

    rows = range(len(centred))
    return -sum(min(angle(centred[k], centred[j]) for j in rows if j != k) for k in rows) / len(centred)


def test_within_class_is_its_formula():
    features, means = drawn(6, 5), drawn(4, 5, seed=1)
    assert float(within_class(features, TARGETS, means)) == pytest.approx(
        naive_within(features, TARGETS, means), rel=1e-12
    )


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_between_class_is_its_formula(classes):
    means = drawn(classes, 5)
    assert float(between_class(means)) == pytest.approx(naive_between(means), rel=1e-12)


def test_gradients_in_float64():
    features, means = drawn(6, 5).requires_grad_(), drawn(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, m: within_class(h, TARGETS, m), (features, means))
    assert torch.autograd.gradcheck(between_class, (means,))


def test_a_class_that_is_not_in_the_batch_keeps_its_mean():
    means = drawn(4, 5, seed=1).requires_grad_()
    within_class(drawn(6, 5), TARGETS, means).backward()
    assert (means.grad[2] == 0).all()
    assert (means.grad[[0, 1, 3]] != 0).all()


def test_equal_and_opposite_means_have_a_finite_gradient():
    means = torch.tensor([[1.0, 0], [1, 0], [-1, 0]], requires_grad=True)
    loss = between_class(means)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * math.acos(LARGEST_COSINE) + math.acos(-LARGEST_COSINE)) / 3, rel=1e-4)
    assert means.grad.isfinite().all()
    nowhere = torch.zeros(3, 2, requires_grad=True)
    between_class(nowhere).backward()
    assert nowhere.grad.isfinite().all()


def test_a_simplex_has_the_least_between_class_loss():
    """Its angles are arccos(-1 / (C - 1)), and no others are that large."""
    simplex = torch.eye(4, dtype=torch.float64) - 1 / 4
    least = -math.acos(-1 / 3)
    assert float(between_class(simplex)) == pytest.approx(least)
    assert all(float(between_class(drawn(4, 4, seed=seed))) > least for seed in range(20))


def test_the_regularizer_adds_both_and_mixes_the_first():
    regularizer = CollapseRegularizer(4, 5, within=0.01, between=0.3).double()
    features, partners = drawn(6, 5), TARGETS.roll(1)
    means = regularizer.means.detach()
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixed = 0.3 * naive_within(features, TARGETS, means) + 0.7 * naive_within(features, partners, means)
    found = regularizer(features, torch.stack([TARGETS, partners]), shares)
    assert found.item() == pytest.approx(0.01 * mixed + 0.3 * naive_between(means), rel=1e-12)
    alone = CollapseRegularizer(4, 5, within=0.01, between=0.0).double()
    only = alone(features, TARGETS[None], torch.ones(1, dtype=torch.float64))
    assert only.item() == pytest.approx(0.01 * naive_within(features, TARGETS, alone.means.detach()), rel=1e-12)


def test_only_the_first_reaches_the_features():
    """The gradient in the features is that of lambda1 L_W alone."""
    features = drawn(6, 5).requires_grad_()
    gradients = []
    for between in (0.0, 5.0):
        regularizer = CollapseRegularizer(4, 5, 0.01, between).double()
        loss = regularizer(features, TARGETS[None], torch.ones(1, dtype=torch.float64))
        gradients.append(torch.autograd.grad(loss, [features, regularizer.means]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_half_precision_features_are_raised_under_autocast():
    regularizer = CollapseRegularizer(4, 5, 0.5, 0.5)
    features, labels, shares = drawn(6, 5).bfloat16(), TARGETS[None], torch.ones(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = regularizer(features, labels, shares)
    assert found.dtype == torch.float32
    assert torch.equal(found, regularizer(features.float(), labels, shares))


def test_means_start_as_normal_numbers_of_the_seed_alone():
    torch.manual_seed(1)
    first = CollapseRegularizer(100, 64, 0.01, 0.1, seed=3).means
    torch.manual_seed(2)
    assert torch.equal(first, CollapseRegularizer(100, 64, 0.01, 0.1, seed=3).means)
    assert not torch.equal(first, CollapseRegularizer(100, 64, 0.01, 0.1, seed=4).means)
    assert abs(float(first.detach().std()) - 1) < 0.03
    assert abs(float(first.detach().mean())) < 0.05
