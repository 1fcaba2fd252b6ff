"""Component norms against autograd, class by class."""

import pytest
import torch

from methods.gradients import component_norms
from methods.losses import arb_loss

CLASSES, FEATURES, BATCH = 6, 5, 14


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(CLASSES, FEATURES, generator=random, dtype=torch.float64)
    features = torch.randn(BATCH, FEATURES, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 4, (BATCH,), generator=random)  # classes 4 and 5 are absent
    partners = targets[torch.randperm(BATCH, generator=random)]
    return weight, features, targets, partners


def by_autograd(weight, features, counts, parts) -> torch.Tensor:
    """``parts``: (share of the loss, targets) pairs; entry (i, j) by one backward pass per class j."""
    table = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for label in range(CLASSES):
        weight = weight.detach().requires_grad_()
        logits = features @ weight.T
        total = sum(
            share * (arb_loss(logits, targets, counts, "none", clamp=None) * (targets == label)).sum()
            for share, targets in parts
        )
        (gradient,) = torch.autograd.grad(total, weight)
        table[:, label] = gradient.norm(dim=1)
    return table


@pytest.mark.parametrize("counts", [None, [4, 5, 3, 2, 0, 0], [500, 200, 70, 30, 10, 3]], ids=["ce", "batch", "global"])
def test_true_rows_equal_autograd(batch, counts):
    weight, features, targets, _ = batch
    n = None if counts is None else torch.tensor(counts)
    table = component_norms(features @ weight.T, features, targets, n, absent_rows="true")
    expected = by_autograd(weight, features, torch.ones(CLASSES) if n is None else n, [(1.0, targets)])
    torch.testing.assert_close(table, expected)


def test_under_mixup_components_are_those_of_the_mixed_loss(batch):
    weight, features, targets, partners = batch
    n = torch.tensor([500, 200, 70, 30, 10, 3])
    table = component_norms(features @ weight.T, features, targets, n, "true", mixed=(partners, 0.3))
    torch.testing.assert_close(table, by_autograd(weight, features, n, [(0.3, targets), (0.7, partners)]))


def test_zero_rows_leave_out_classes_absent_from_the_batch(batch):
    weight, features, targets, _ = batch
    true = component_norms(features @ weight.T, features, targets, absent_rows="true")
    zero = component_norms(features @ weight.T, features, targets)
    assert (zero[4:] == 0).all()
    assert (true[4:, :4] > 0).all()
    torch.testing.assert_close(zero[:4], true[:4])


def test_columns_of_absent_classes_are_zero(batch):
    weight, features, targets, _ = batch
    assert (component_norms(features @ weight.T, features, targets, absent_rows="true")[:, 4:] == 0).all()


def test_an_unknown_rule_for_absent_rows_is_refused(batch):
    weight, features, targets, _ = batch
    with pytest.raises(ValueError, match="known are zero, true"):
        component_norms(features @ weight.T, features, targets, absent_rows="skip")
