"""The losses against their formulas, at the edges, in half precision and by gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import losses
from methods.losses import (
    ARBLoss,
    arb_log_probabilities,
    arb_loss,
    count_classes,
    label_aware_smoothing,
    smoothing_by_count,
)

COUNTS = torch.tensor([50.0, 20, 0, 7, 1])


def example(batch: int = 12, classes: int = 5, scale: float = 3.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(batch * classes)
    logits = scale * torch.randn(batch, classes, generator=random, dtype=dtype)
    targets = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (batch,), generator=random)]
    return logits, targets


def equation_14(z: torch.Tensor, y: int, n: torch.Tensor) -> float:
    """The printed formula, term by term."""
    total = sum(float(n[k] / n[y]) * math.exp(float(z[k])) for k in range(len(n)))
    return -math.log(math.exp(float(z[y])) / total)


@pytest.mark.parametrize("clamp", [None, 30.0])
def test_arb_loss_is_equation_14(clamp):
    logits, targets = example()
    expected = torch.tensor([equation_14(z, int(y), COUNTS) for z, y in zip(logits, targets, strict=True)])
    torch.testing.assert_close(arb_loss(logits, targets, COUNTS, "none", clamp), expected.double())


def test_the_clamp_acts_before_the_counts_are_added():
    logits = torch.tensor([[40.0, -50.0, 0.0]])
    counts = torch.tensor([1.0, 1000.0, 10.0])
    clamped = arb_loss(logits, torch.tensor([1]), counts)
    torch.testing.assert_close(
        clamped, F.cross_entropy(torch.tensor([[30.0, -30.0, 0.0]]) + counts.log(), torch.tensor([1]))
    )
    assert arb_loss(logits, torch.tensor([1]), counts, clamp=None) > clamped + 20


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 1000), st.integers(0, 99))
def test_equal_counts_make_it_cross_entropy(batch, classes, count, seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=random, dtype=torch.float64)
    targets = torch.randint(0, classes, (batch,), generator=random)
    loss = arb_loss(logits, targets, torch.full((classes,), count))
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-12, atol=1e-12)


def test_absent_classes_drop_out_exactly():
    """As if the absent class were no output of the network at all, with no gradient to it."""
    logits, targets = example()
    logits.requires_grad_()
    loss = arb_loss(logits, targets, COUNTS)
    loss.backward()
    kept = [0, 1, 3, 4]
    relabelled = torch.tensor([0, 1, -1, 2, 3])[targets]
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, kept] + COUNTS[kept].double().log(), relabelled))
    assert (logits.grad[:, 2] == 0).all()
    assert (logits.grad[:, kept] != 0).any()


@pytest.mark.parametrize("targets", [[3], [2, 2, 2, 2]], ids=["one image", "one class"])
def test_a_batch_of_one_class_has_loss_zero_and_no_gradient(targets):
    """All other classes are absent, so the label is certain whatever the logits say."""
    logits = torch.randn(len(targets), 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = ARBLoss()(logits, torch.tensor(targets))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38, float("inf")])
def test_logits_of_any_size_give_a_finite_loss_and_gradient(size):
    logits = torch.tensor([[size, -size, 0.0], [-size, size, 1.0]], requires_grad=True)
    loss = arb_loss(logits, torch.tensor([1, 0]), torch.tensor([5, 3, 2]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "terms",
    [
        losses.ce_terms,
        losses.arb_terms,
        losses.focal_arb_terms,
        losses.weighted_arb_terms,
        lambda z, n: losses.logit_adjustment_terms(z, n, COUNTS),
        lambda z, n: losses.ldam_terms(z, n, losses.ldam_margins(COUNTS)),
        losses.dot_regression_terms,
    ],
    ids=["ce", "arb", "focal_arb", "weighted_arb", "logit_adjustment", "ldam", "dot_regression"],
)
def test_half_precision_logits_are_raised_before_anything_else(terms, dtype):
    logits, targets = example(dtype=torch.float32)
    half = logits.to(dtype)
    result = terms(half, COUNTS * 1e5)(targets[None])
    assert result.dtype == torch.float32
    assert torch.equal(result, terms(half.float(), COUNTS * 1e5)(targets[None]))


def test_under_autocast_the_loss_is_that_of_the_half_precision_logits_in_float32():
    features = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(16, 5)
    targets = torch.tensor([0, 1, 3, 4, 0, 0, 1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(features)
        loss = arb_loss(logits, targets, COUNTS)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(loss, arb_loss(logits.float(), targets, COUNTS))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.float16])
def test_counts_of_any_real_type(dtype):
    logits, targets = example()
    torch.testing.assert_close(arb_loss(logits, targets, COUNTS.to(dtype)), arb_loss(logits, targets, COUNTS))


def test_reductions():
    logits, targets = example()
    each = arb_loss(logits, targets, COUNTS, "none")
    assert each.shape == targets.shape
    torch.testing.assert_close(arb_loss(logits, targets, COUNTS, "sum"), each.sum())
    torch.testing.assert_close(arb_loss(logits, targets, COUNTS), each.mean())
    with pytest.raises(ValueError, match=r"'avg' is unknown; known are none, mean, sum"):
        arb_loss(logits, targets, COUNTS, "avg")
    with pytest.raises(ValueError, match="does not fit 5 classes"):
        arb_loss(logits, targets, COUNTS[:3])


def test_the_module_counts_the_batch_or_takes_the_given_counts():
    logits, targets = example()
    batch = torch.bincount(targets, minlength=5)
    assert torch.equal(ARBLoss()(logits, targets), arb_loss(logits, targets, batch))
    module = ARBLoss(COUNTS, reduction="sum", clamp=None)
    assert torch.equal(module(logits, targets), arb_loss(logits, targets, COUNTS, "sum", clamp=None))
    assert "class_counts" in module.state_dict()
    assert torch.equal(ARBLoss([50, 20, 0, 7, 1])(logits, targets), arb_loss(logits, targets, COUNTS))


# ---------------------------------------------------------------------------------------------------------------------
# Dense


def test_dense_equals_the_flat_loss_over_labelled_pixels():
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 3, 4, generator=random, dtype=torch.float64)
    targets = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (2, 3, 4), generator=random)]
    targets[0, 0] = 255
    flat = logits.permute(0, 2, 3, 1).reshape(-1, 5)
    labelled = targets.flatten() != 255
    expected = arb_loss(flat[labelled], targets.flatten()[labelled], COUNTS)
    torch.testing.assert_close(arb_loss(logits, targets, COUNTS, ignore_index=255), expected)
    each = arb_loss(logits, targets, COUNTS, "none", ignore_index=255)
    assert each.shape == targets.shape
    assert (each[0, 0] == 0).all()


def test_dense_batch_counts_leave_out_ignored_pixels():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[[0, 1], [2, -100]]])
    targets[0, 1, 0] = -100
    expected = arb_loss(logits, targets, torch.tensor([1, 1, 0]))
    assert torch.equal(ARBLoss()(logits, targets), expected)


def test_a_dense_batch_without_a_label_has_loss_zero_and_no_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = ARBLoss()(logits, torch.full((1, 2, 2), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_count_classes():
    assert count_classes(torch.tensor([[2, 0], [2, -100]]), 4).tolist() == [1, 0, 2, 0]
    assert count_classes(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Variants


def test_focal_arb_is_its_formula():
    logits, targets = example()
    p = arb_log_probabilities(logits, COUNTS).exp().gather(1, targets[:, None]).squeeze(1)
    expected = -0.5 * (1 - p) ** 3 * p.log()
    result = losses.focal_arb_terms(logits, COUNTS, alpha=0.5, gamma=3.0)(targets[None])
    torch.testing.assert_close(result, expected[None])
    torch.testing.assert_close(
        losses.focal_arb_terms(logits, COUNTS, gamma=0.0)(targets[None]),
        losses.arb_terms(logits, COUNTS)(targets[None]),
    )


def test_focal_arb_has_a_finite_gradient_where_a_label_is_certain():
    logits = torch.zeros(2, 3, requires_grad=True)
    losses.focal_arb_terms(logits, torch.tensor([2, 0, 0]), gamma=0.5)(torch.tensor([[0, 0]])).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([6, 3, 0, 2, 1])], ids=["global", "batch"])
def test_weighted_arb_is_its_formula(counts):
    logits, targets = example()
    omega = counts.sum() / 4 / counts.double()  # four classes are present
    expected = omega[targets] * arb_loss(logits, targets, counts, "none")
    torch.testing.assert_close(losses.weighted_arb_terms(logits, counts)(targets[None]), expected[None])


def test_label_aware_smoothing_is_its_formula():
    logits, targets = example()
    smoothing = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.0], dtype=torch.float64)
    log_probs = F.log_softmax(logits, dim=1)
    expected = sum(
        -(1 - smoothing[y]) * row[y] - smoothing[y] * row.mean() for row, y in zip(log_probs, targets, strict=True)
    )
    torch.testing.assert_close(label_aware_smoothing(logits, targets, smoothing, "sum"), expected)
    torch.testing.assert_close(label_aware_smoothing(logits, targets, smoothing), expected / len(targets))
    torch.testing.assert_close(label_aware_smoothing(logits, targets, torch.zeros(5)), F.cross_entropy(logits, targets))


def test_smoothing_runs_from_tail_to_head_and_is_defined_for_equal_counts():
    counts = torch.tensor([100, 40, 10])
    for shape in ("concave", "linear", "convex"):
        smoothing = smoothing_by_count(counts, 0.3, 0.1, shape)
        torch.testing.assert_close(smoothing[[0, 2]], torch.tensor([0.3, 0.1]))
        assert smoothing[0] > smoothing[1] > smoothing[2]
    assert torch.equal(smoothing_by_count(torch.tensor([7, 7]), 0.3, 0.1), torch.tensor([0.3, 0.3]))
    with pytest.raises(ValueError, match="known are concave, linear, convex, exp"):
        smoothing_by_count(counts, 0.3, 0.1, "square")
    with pytest.raises(ValueError, match="needs a power"):
        smoothing_by_count(counts, 0.3, 0.1, "exp")


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_arb_with_tau_is_arb_with_counts_to_that_power(tau):
    """At tau 0 too a class that is absent stays absent."""
    logits, targets = example()
    present = COUNTS > 0
    powers = torch.where(present, COUNTS.double() ** tau, 0.0)
    expected = torch.tensor([equation_14(z, int(y), powers) for z, y in zip(logits, targets, strict=True)])
    found = losses.arb_terms(logits, COUNTS, clamp=None, tau=tau)(targets[None])[0]
    torch.testing.assert_close(found, expected.double())
    if tau == 1:
        assert torch.equal(found, losses.arb_terms(logits, COUNTS, clamp=None)(targets[None])[0])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("classes", [5, 1001])
def test_logit_adjustment_is_its_formula_whatever_the_step_s_counts(tau, classes):
    logits, targets = example(classes=classes)
    prior = torch.arange(1, classes + 1) / sum(range(1, classes + 1))
    found = losses.logit_adjustment_terms(logits, torch.randint(0, 9, (classes,)), prior, tau)(targets[None])[0]
    for z, y, loss in zip(logits.tolist(), targets.tolist(), found.tolist(), strict=True):
        odds = [math.exp(value) * p**tau for value, p in zip(z, prior.double().tolist(), strict=True)]
        assert loss == pytest.approx(-math.log(odds[y] / sum(odds)), rel=1e-12)


def test_logit_adjustment_of_a_prior_without_a_class_leaves_it_out():
    logits, targets = example()
    found = losses.logit_adjustment_terms(logits.requires_grad_(), torch.ones(5), COUNTS / COUNTS.sum())(targets[None])
    torch.testing.assert_close(found[0], arb_loss(logits, targets, COUNTS, "none", clamp=None), rtol=1e-6, atol=1e-7)
    found.sum().backward()
    assert (logits.grad[:, 2] == 0).all()


def test_ldam_margins_are_their_formula():
    expected = [0.0 if n == 0 else 0.5 * n**-0.25 / 1**-0.25 for n in COUNTS.tolist()]
    assert losses.ldam_margins(COUNTS).tolist() == pytest.approx(expected, rel=1e-6)
    assert losses.ldam_margins([10000, 16], max_margin=0.25).tolist() == pytest.approx([0.05, 0.25], rel=1e-6)


def test_ldam_is_its_formula():
    """Cosines, from which the label's margin is taken before they are scaled."""
    cosines, targets = example(scale=0.3)
    margins = losses.ldam_margins(COUNTS)
    found = losses.ldam_terms(20 * cosines, COUNTS, margins, scale=20.0)(targets[None])[0]
    for row, y, loss in zip(cosines.tolist(), targets.tolist(), found.tolist(), strict=True):
        own = 20 * (row[y] - margins.double()[y].item())
        others = sum(math.exp(20 * value) for k, value in enumerate(row) if k != y)
        assert loss == pytest.approx(-math.log(math.exp(own) / (math.exp(own) + others)), rel=1e-6, abs=1e-12)


def test_dot_regression_is_its_formula_and_reads_the_label_s_logit_alone():
    logits, targets = example()
    found = losses.dot_regression_terms(logits.requires_grad_(), COUNTS)(targets[None])
    expected = [0.5 * (row[y] - 1) ** 2 for row, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    assert found[0].tolist() == pytest.approx(expected)
    found.sum().backward()
    assert ((logits.grad != 0).sum(dim=1) == 1).all()


def test_drw_weights_are_their_formula_and_sum_to_the_number_of_classes():
    counts = [5000, 387, 0, 50]
    for beta in (0.0, 0.9, 0.9999):
        raw = [0.0 if n == 0 else (1 - beta) / (1 - beta**n) for n in counts]
        expected = [4 * w / sum(raw) for w in raw]
        assert losses.drw_weights(counts, beta).tolist() == pytest.approx(expected, rel=1e-6)
        assert float(losses.drw_weights(counts, beta).sum()) == pytest.approx(4)
    assert losses.drw_weights(counts).tolist() == losses.drw_weights(torch.tensor(counts), 0.9999).tolist()


def test_the_post_hoc_shift_is_tau_log_prior_and_counts_an_absent_class_as_one_image():
    assert losses.post_hoc_shift([900, 99, 1], 1.5).tolist() == pytest.approx(
        [1.5 * math.log(n / 1000) for n in (900, 99, 1)], rel=1e-6
    )
    shift = losses.post_hoc_shift([900, 100, 0], 1.0)
    assert shift.isfinite().all()
    assert float(shift[2]) == pytest.approx(-math.log(1000), rel=1e-6)
    assert not losses.post_hoc_shift([5, 3], 0.0).any()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, and several targets


ALL_TERMS = pytest.mark.parametrize(
    "terms",
    [
        losses.ce_terms,
        losses.arb_terms,
        lambda z, n: losses.arb_terms(z, n, clamp=None),
        losses.focal_arb_terms,
        losses.weighted_arb_terms,
        lambda z, n: losses.arb_terms(z, n, tau=0.5),
        lambda z, n: losses.smoothing_terms(z, n, torch.linspace(0, 0.3, len(n))),
        lambda z, n: losses.logit_adjustment_terms(z, n, torch.linspace(0.1, 0.3, len(n)), tau=1.5),
        lambda z, n: losses.ldam_terms(z, n, losses.ldam_margins(n), scale=2.0),
        losses.dot_regression_terms,
    ],
    ids=[
        *("ce", "arb", "arb unclamped", "focal_arb", "weighted_arb", "arb with tau", "las"),
        *("logit_adjustment", "ldam", "dot_regression"),
    ],
)


@ALL_TERMS
def test_gradcheck_in_float64(terms):
    logits, targets = example(batch=6)
    both = torch.stack([targets, targets.roll(1)])
    assert torch.autograd.gradcheck(lambda z: terms(z, COUNTS)(both), logits.requires_grad_())


@ALL_TERMS
@pytest.mark.parametrize("classes", [5, 1001])
def test_several_targets_at_once_are_each_of_them_alone(terms, classes):
    logits, targets = example(classes=classes)
    both = torch.stack([targets, targets.roll(1)])
    counts = torch.arange(1, classes + 1)
    each = [terms(logits, counts)(row[None])[0] for row in both]
    assert torch.equal(terms(logits, counts)(both), torch.stack(each))


def test_gradcheck_dense():
    logits = torch.randn(1, 5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[[0, 1], [-100, 4]]])
    assert torch.autograd.gradcheck(lambda z: arb_loss(z, targets, COUNTS), logits.requires_grad_())
