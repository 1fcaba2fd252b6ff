"""methods/regularizers.py: the regularizers against their formulas, and what of them reaches which gradient."""

import copy
import math

import pytest
import torch

from methods.regularizers import (
    LARGEST_COSINE,
    CollapseGeometry,
    CollapseRegularizer,
    MovingMeans,
    between_class,
    duality,
    means_apart,
    rows_apart,
    within_class,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# Moving class means

SEEN = torch.tensor([True, True, False, True])
ALL = torch.ones(4, dtype=torch.bool)
ONE = torch.ones(1, dtype=torch.float64)


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def naive_apart(vectors: list) -> float:
    ideal = -1 / (len(vectors) - 1)
    return (
        sum(
            (cosine(a, b) - (1 if i == j else ideal)) ** 2 for i, a in enumerate(vectors) for j, b in enumerate(vectors)
        )
        / len(vectors) ** 2
    )


def naive_centred(means: list) -> list:
    centre = [sum(column) / len(means) for column in zip(*means, strict=True)]
    return [[m - c for m, c in zip(mean, centre, strict=True)] for mean in means]


def naive_duality(rows: list, means: list) -> float:
    return sum(1 - cosine(w, m) for w, m in zip(rows, naive_centred(means), strict=True)) / len(rows)


@pytest.mark.parametrize("seen", [ALL, SEEN], ids=["all", "three of four"])
def test_the_terms_of_moving_means_are_their_formulas(seen):
    rows, means = drawn(4, 5), drawn(4, 5, seed=1)
    present = means[seen].tolist()
    assert float(rows_apart(rows)) == pytest.approx(naive_apart(rows.tolist()), rel=1e-12)
    assert float(means_apart(means, seen)) == pytest.approx(naive_apart(naive_centred(present)), rel=1e-12)
    assert float(duality(rows, means, seen)) == pytest.approx(naive_duality(rows[seen].tolist(), present), rel=1e-12)


@pytest.mark.parametrize("seen", [ALL, SEEN], ids=["all", "three of four"])
def test_their_gradients_in_float64(seen):
    rows, means = drawn(4, 5).requires_grad_(), drawn(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(rows_apart, (rows,))
    assert torch.autograd.gradcheck(lambda m: means_apart(m, seen), (means,))
    assert torch.autograd.gradcheck(lambda w, m: duality(w, m, seen), (rows, means))


def test_a_simplex_gives_0_and_nothing_less():
    """In any position and of any size; the means around any centre."""
    simplex = (torch.eye(4, dtype=torch.float64) - 1 / 4) @ torch.linalg.qr(drawn(6, 4)).Q.T
    assert float(rows_apart(3 * simplex)) == pytest.approx(0, abs=1e-24)
    assert float(means_apart(3 * simplex + drawn(6), ALL)) == pytest.approx(0, abs=1e-24)
    assert float(duality(3 * simplex, 2 * simplex + drawn(6), ALL)) == pytest.approx(0, abs=1e-12)
    assert float(duality(-simplex, simplex, ALL)) == pytest.approx(2)


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_few_or_equal_means_have_finite_gradients(classes):
    seen = torch.arange(4) < classes
    for means in (drawn(4, 5), torch.ones(4, 5, dtype=torch.float64)):
        rows, means = drawn(4, 5, seed=1).requires_grad_(), means.clone().requires_grad_()
        loss = means_apart(means, seen) + duality(rows, means, seen)
        loss.backward()
        assert loss.isfinite() and rows.grad.isfinite().all() and means.grad.isfinite().all()
        assert (means.grad[classes:] == 0).all() and (rows.grad[classes:] == 0).all()


def test_means_are_averages_of_the_batches_means():
    """Three batches by a loop; class 2 comes last, class 0 is not in the second."""
    batches = [[0, 0, 0, 1, 3, 3], [1, 1, 1, 1, 3, 3], [0, 1, 2, 2, 2, 3]]
    moving = MovingMeans(5, 7).double()
    expected = {}
    for number, labels in enumerate(batches):
        features, before = drawn(6, 7, seed=number), moving.means.clone()
        means, seen = moving(features, torch.tensor([labels]), ONE)
        for k in set(labels):
            batch = torch.stack([h for h, y in zip(features, labels, strict=True) if y == k]).mean(dim=0)
            expected[k] = 0.9 * expected[k] + 0.1 * batch if k in expected else batch
        torch.testing.assert_close(means[sorted(expected)], torch.stack([expected[k] for k in sorted(expected)]))
        assert seen.nonzero().flatten().tolist() == sorted(expected)
        absent = [k for k in range(5) if k not in labels]
        assert torch.equal(moving.means[absent], before[absent])
        assert torch.equal(moving.means, means) and torch.equal(moving.seen, seen)


def test_under_mixup_a_feature_counts_for_both_labels():
    features, partners = drawn(6, 5), TARGETS.roll(1)
    means, seen = MovingMeans(4, 5).double()(
        features, torch.stack([TARGETS, partners]), torch.tensor([0.3, 0.7], dtype=torch.float64)
    )
    for k in range(4):
        weights = 0.3 * (k == TARGETS) + 0.7 * (partners == k)
        assert bool(seen[k]) == bool(weights.any())
        if seen[k]:
            torch.testing.assert_close(means[k], (weights[:, None] * features).sum(dim=0) / weights.sum())


def test_labels_that_count_nothing_are_not_seen():
    """lambda 1: partners of a class that the batch has not."""
    labels = torch.stack([TARGETS, torch.full_like(TARGETS, 2)])
    features = drawn(6, 5).requires_grad_()
    means, seen = MovingMeans(4, 5).double()(features, labels, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert seen.tolist() == SEEN.tolist()
    means_apart(means, seen).backward()
    assert features.grad.isfinite().all()


def everything(**options) -> CollapseGeometry:
    """All terms, after a first batch that has all classes but the third."""
    weights = {"nc_rows": 0.5, "nc_means": 2.0, "nc_dual": 0.7}
    geometry = CollapseGeometry(4, 5, **weights, **options).double()
    geometry.moving(drawn(6, 5, seed=7), TARGETS[None], ONE)
    return geometry


def test_the_terms_are_added_with_their_weights_and_reach_the_features_through_the_batch_s_share():
    geometry, weight, features = everything(), drawn(4, 5, seed=1).requires_grad_(), drawn(6, 5).requires_grad_()
    labels, shares = torch.stack([TARGETS, TARGETS.roll(1)]), torch.tensor([0.3, 0.7], dtype=torch.float64)

    def loss(features, weight):
        return copy.deepcopy(geometry)(features, labels, shares, weight)

    means, seen = copy.deepcopy(geometry.moving)(features, labels, shares)
    parts = (0.5 * rows_apart(weight), 2.0 * means_apart(means, seen), 0.7 * duality(weight, means, seen))
    torch.testing.assert_close(loss(features, weight), sum(parts))
    assert torch.autograd.gradcheck(loss, (features, weight))


def test_features_that_are_not_finite_move_no_mean():
    geometry, features = everything(), drawn(6, 5)
    before = copy.deepcopy(geometry.state_dict())
    features[:3] = torch.inf  # all of class 0
    features[3, 0] = torch.nan  # class 1
    geometry(features, TARGETS[None], ONE, drawn(4, 5))
    assert torch.equal(geometry.moving.means[:2], before["moving.means"][:2])
    assert not torch.equal(geometry.moving.means[3], before["moving.means"][3])
    assert torch.equal(geometry.moving.seen, before["moving.seen"])


def test_moving_means_are_computed_in_float32_under_autocast():
    first, second = (CollapseGeometry(4, 5, nc_rows=1.0, nc_means=1.0, nc_dual=1.0) for _ in range(2))
    features, weight = drawn(6, 5).bfloat16(), drawn(4, 5, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = first(features, TARGETS[None], ONE.float(), weight)
    assert torch.equal(found, second(features.float(), TARGETS[None], ONE.float(), weight))
    assert first.moving.means.dtype == found.dtype == torch.float32


def test_a_part_s_gradients_are_of_its_features_divided_by_its_share():
    """Averaged with the shares as weights they are those of one process; 0 is a process without images."""
    features = drawn(6, 5).requires_grad_()
    gradients = []
    for part in (1.0, 0.25):
        everything()(features, TARGETS[None], ONE, drawn(4, 5, seed=1), part).backward()
        gradients.append(features.grad.clone())
        features.grad = None
    torch.testing.assert_close(gradients[1], 4 * gradients[0])
    idle = everything()
    before = copy.deepcopy(idle.state_dict())
    idle(features, TARGETS[None], ONE, drawn(4, 5, seed=1).requires_grad_(), 0.0).backward()
    assert features.grad is None
    assert all(torch.equal(value, before[key]) for key, value in idle.state_dict().items())


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, None),
        ({"nc_rows": 1.0}, set()),
        *(({key: value}, {"moving.means", "moving.seen"}) for key, value in (("nc_means", 1.0), ("nc_dual", 1.0))),
        *(({"spa": spa}, {"moving.means", "moving.seen"}) for spa in ("proj", "slerp")),
    ],
)
def test_class_means_are_held_where_they_are_used(options, held):
    geometry = CollapseGeometry(4, 5, **options)
    assert geometry.is_on == (held is not None)
    assert set(geometry.state_dict()) == (held or set())
