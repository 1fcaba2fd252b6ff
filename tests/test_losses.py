"""The losses against their formulas, at the edges, in half precision and by gradcheck."""

import ast
import copy
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import losses
from methods.losses import (
    ARBLoss,
    arb_loss,
    count_classes,
    label_aware_smoothing,
    log_probabilities,
    smoothing_by_count,
)
from tests.test_architecture import imported

COUNTS = torch.tensor([50.0, 20, 0, 7, 1])
# With the step's counts, which not every loss reads.
ALL_LOSSES = pytest.mark.parametrize(
    "loss",
    [
        lambda z, y, n: losses.cross_entropy(z, y),
        lambda z, y, n: losses.cross_entropy(z, y, label_smoothing=0.2),
        losses.arb,
        lambda z, y, n: losses.arb(z, y, n, clamp=None),
        lambda z, y, n: losses.arb(z, y, n, tau=0.5),
        losses.focal_arb,
        losses.weighted_arb,
        lambda z, y, n: losses.smoothed_cross_entropy(z, y, torch.linspace(0, 0.3, len(n))),
        lambda z, y, n: losses.logit_adjustment(z, y, torch.linspace(0.1, 0.3, len(n)), tau=1.5),
        lambda z, y, n: losses.ldam(z, y, losses.ldam_margins(n), cosine_scale=2.0),
        lambda z, y, n: losses.dot_regression(z, y),
    ],
    ids=[
        *("ce", "ce smoothed", "arb", "arb unclamped", "arb with tau", "focal_arb", "weighted_arb", "las"),
        *("logit_adjustment", "ldam", "dot_regression"),
    ],
)


def example(batch: int = 12, classes: int = 5, scale: float = 3.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(batch * classes)
    logits = scale * torch.randn(batch, classes, generator=random, dtype=dtype)
    targets = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (batch,), generator=random)]
    return logits, targets


def equation_14(z: torch.Tensor, y: int, n: torch.Tensor) -> float:
    """The printed formula, term by term."""
    total = sum(float(n[k] / n[y]) * math.exp(float(z[k])) for k in range(len(n)))
    return -math.log(math.exp(float(z[y])) / total)


def test_the_clamp_acts_before_the_counts_are_added():
    logits = torch.tensor([[40.0, -50.0, 0.0]])
    counts = torch.tensor([1.0, 1000.0, 10.0])
    clamped = arb_loss(logits, torch.tensor([1]), counts)
    torch.testing.assert_close(
        clamped, F.cross_entropy(torch.tensor([[30.0, -30.0, 0.0]]) + counts.log(), torch.tensor([1]))
    )
    assert arb_loss(logits, torch.tensor([1]), counts, clamp=None) > clamped + 20


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
    assert loss.item() == 0 and not logits.grad.any()
    counts = torch.bincount(torch.tensor(targets), minlength=5)
    losses.focal_arb(logits, torch.tensor([targets]), counts, focal_gamma=0.5).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 3e38, float("inf")])
def test_logits_of_any_size_give_a_finite_loss_and_gradient(size):
    logits = torch.tensor([[size, -size, 0.0], [-size, size, 1.0]], requires_grad=True)
    loss = arb_loss(logits, torch.tensor([1, 0]), torch.tensor([5, 3, 2]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ALL_LOSSES
def test_half_precision_logits_are_raised_before_anything_else(loss, dtype):
    logits, targets = example(dtype=torch.float32)
    half = logits.to(dtype)
    result = loss(half, targets[None], COUNTS * 1e5)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(half.float(), targets[None], COUNTS * 1e5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
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
    with pytest.raises(ValueError, match="'avg' is unknown"):
        ARBLoss(reduction="avg")


def test_the_module_counts_the_batch_or_takes_the_given_counts():
    logits, targets = example()
    batch = torch.bincount(targets, minlength=5)
    assert torch.equal(ARBLoss()(logits, targets), arb_loss(logits, targets, batch))
    module = ARBLoss(COUNTS, reduction="sum", clamp=None)
    assert torch.equal(module(logits, targets), arb_loss(logits, targets, COUNTS, "sum", clamp=None))
    assert "class_counts" in module.state_dict()
    assert torch.equal(ARBLoss([50, 20, 0, 7, 1])(logits, targets), arb_loss(logits, targets, COUNTS))
    assert torch.equal(arb_loss(logits, targets), arb_loss(logits, targets, batch))


# ---------------------------------------------------------------------------------------------------------------------
# In other people's code

CRITERIA = pytest.mark.parametrize(
    "criterion",
    [
        lambda z, y, **options: ARBLoss(**options)(z, y),
        lambda z, y, **options: ARBLoss([50, 20, 0, 7, 1], **options)(z, y),
        lambda z, y, **options: label_aware_smoothing(z, y, torch.linspace(0, 0.3, 5), **options),
    ],
    ids=["batch counts", "given counts", "las"],
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
@CRITERIA
def test_labels_of_any_integer_type(criterion, dtype):
    logits, targets = example()
    assert torch.equal(criterion(logits, targets.to(dtype)), criterion(logits, targets))
    maps, pixels = logits.T.reshape(1, 5, 3, 4), targets.reshape(1, 3, 4).clone()
    pixels[0, 0] = 255
    kept = (pixels != 255).flatten()
    for labels in (pixels, pixels.to(dtype)):
        loss = criterion(maps, labels, ignore_index=255)
        torch.testing.assert_close(loss, criterion(logits[kept], targets[kept]))


@CRITERIA
def test_a_sample_alone_is_a_batch_of_one(criterion):
    logits, targets = example()
    for reduction in losses.REDUCTIONS:
        loss = criterion(logits[0], targets[0], reduction=reduction)
        assert loss.shape == ()
        assert loss == criterion(logits[:1], targets[:1], reduction=reduction)


@pytest.mark.parametrize("label", [5, -1, 255])
@CRITERIA
def test_a_label_out_of_range_is_named(criterion, label):
    logits, targets = example()
    targets[7] = label
    with pytest.raises(ValueError, match=rf": label {label} is neither 0 to 4 nor ignore_index, -100"):
        criterion(logits, targets)


@CRITERIA
def test_no_value_is_read_on_other_devices_than_the_cpu(criterion):
    """Which on CUDA would synchronise, and on this device is impossible."""
    logits, targets = (tensor.to("meta") for tensor in example())
    assert criterion(logits, targets).is_meta


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z, y: (z, y.double()),
        lambda z, y: (z, F.one_hot(y, 5)),
        lambda z, y: (z, y[:, None]),
        lambda z, y: (z, y[1:]),
        lambda z, y: (z.mean(), y[0]),
        lambda z, y: (z.long(), y),
        lambda z, y: (y, z),
    ],
    ids=["float labels", "one-hot", "column", "too few", "no logits", "integer logits", "swapped"],
)
@CRITERIA
def test_targets_that_do_not_fit_are_refused(criterion, wrong):
    logits, targets = wrong(*example())
    with pytest.raises(
        ValueError, match=r"(arb_loss|label_aware_smoothing): targets .* do not fit logits .*: labels are"
    ):
        criterion(logits, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_class_probabilities_are_mixed_labels(dtype):
    """A class that is absent from the counts has probability 0, and no part in the loss."""
    logits, targets = example()
    both = torch.stack([targets, targets.roll(1)])
    mixed = (0.75 * F.one_hot(both[0], 5) + 0.25 * F.one_hot(both[1], 5)).to(dtype)
    first, second = losses.arb(logits, both, COUNTS)
    for reduction, reduced in {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}.items():
        loss = ARBLoss(COUNTS, reduction)(logits, mixed)
        torch.testing.assert_close(loss, reduced(0.75 * first + 0.25 * second))
    maps = [x.T.reshape(1, 5, 3, 4) for x in (logits, mixed)]
    torch.testing.assert_close(arb_loss(*maps, COUNTS), arb_loss(logits, mixed, COUNTS))
    assert torch.autograd.gradcheck(lambda z: arb_loss(z, mixed, COUNTS), logits.requires_grad_())


def test_class_probabilities_need_given_counts():
    logits, targets = example()
    soft = F.one_hot(targets, 5).double()
    with pytest.raises(ValueError, match="arb_loss: class probabilities have no batch counts; they need class_counts"):
        ARBLoss()(logits, soft)
    with pytest.raises(ValueError, match="label_aware_smoothing: targets are probabilities; it smooths labels"):
        label_aware_smoothing(logits, soft, torch.zeros(5))


@pytest.mark.parametrize(
    "counts",
    [[5, -1], [5, math.nan], [5, math.inf], [[5, 1]], 5, [], [0, 0], "51", ["5", "1"], {0: 5, 1: 1}],
    ids=repr,
)
def test_impossible_counts_are_refused_when_the_loss_is_made(counts):
    with pytest.raises(
        ValueError, match=r"ARBLoss: class_counts .* are not \[C\] finite numbers, none negative and not"
    ):
        ARBLoss(counts)


def test_counts_for_other_classes_are_refused():
    logits, targets = example()
    with pytest.raises(ValueError, match=r"class_counts of shape \(3,\) do not fit 5 classes"):
        ARBLoss(COUNTS[:3])(logits, targets)


def test_a_label_whose_count_is_0_is_refused_by_the_module_and_infinite_for_the_function():
    logits, targets = example()
    ARBLoss(COUNTS)(logits.fill_(math.nan), targets)  # not finite for another reason
    logits.zero_()
    targets[3] = 2
    assert arb_loss(logits, targets, COUNTS, "none").isinf().tolist() == (targets == 2).tolist()
    for labels, named in (
        (targets.to(torch.uint8), "label 2"),
        (F.one_hot(targets, 5).float(), "a probability above 0"),
    ):
        for reduction in losses.REDUCTIONS:
            with pytest.raises(ValueError, match=f"ARBLoss: {named} is of a class that has count 0 in class_counts"):
                ARBLoss(COUNTS, reduction)(logits, labels)
    assert ARBLoss(COUNTS, ignore_index=2)(logits, targets).isfinite()


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)])
def test_conversions_of_the_module_leave_the_counts_alone(convert):
    logits, targets = example()
    counts = [100_001.0, 20.0, 0.0, 7.0, 1.0]
    criterion = convert(nn.ModuleList([ARBLoss(counts)]))[0]
    assert criterion.class_counts.tolist() == counts and criterion.class_counts.dtype == torch.float32
    assert torch.equal(criterion(logits, targets), ARBLoss(counts)(logits, targets))
    assert convert(ARBLoss()).class_counts is None
    assert ARBLoss(counts).to("meta").class_counts.is_meta


def test_the_module_has_a_copy_of_the_counts():
    given = COUNTS.clone()
    criterion = ARBLoss(given)
    given.zero_()
    for copied in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied.class_counts, COUNTS)


def test_state_dicts_with_and_without_counts_load_into_each_other():
    def loaded(into, source):
        model = nn.ModuleDict({"criterion": into})
        assert str(model.load_state_dict(nn.ModuleDict({"criterion": source}).state_dict())).startswith("<All keys")
        return into.class_counts

    with pytest.warns(UserWarning, match="ARBLoss: the state_dict has no class_counts: this criterion keeps its own"):
        assert torch.equal(loaded(ARBLoss(COUNTS), ARBLoss()), COUNTS)
    with pytest.warns(UserWarning, match="ARBLoss: the state_dict's class_counts are not used: this criterion counts"):
        assert loaded(ARBLoss(), ARBLoss(COUNTS)) is None
    assert loaded(ARBLoss([1, 2]), ARBLoss([0.25, 0.75])).tolist() == [0.25, 0.75]  # no integers
    with pytest.raises(RuntimeError, match=r"size mismatch for criterion\.class_counts"):
        loaded(ARBLoss([1, 2]), ARBLoss(COUNTS))
    broken = ARBLoss([1.0, 2.0])
    broken.class_counts[0] = math.inf  # as of a module that was converted to float16
    with pytest.raises(ValueError, match=r"ARBLoss: class_counts tensor\(\[inf, 2\.\]\) are not"):
        loaded(ARBLoss([1, 2]), broken)


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
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[[0, 1], [-100, -100]]])
    expected = arb_loss(logits, targets, torch.tensor([1, 1, 0]))
    assert torch.equal(ARBLoss()(logits, targets), expected)
    assert torch.autograd.gradcheck(lambda z: arb_loss(z, targets, COUNTS[:3] + 1), logits.requires_grad_())
    assert count_classes(torch.tensor([[2, 0], [2, -100]]), 4).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (0, 3)], ids=["ignored", "empty"])
def test_a_batch_without_a_label_has_loss_zero_and_no_gradient(shape):
    logits = torch.ones(shape, requires_grad=True)
    loss = ARBLoss()(logits, torch.full((shape[0], *shape[2:]), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Variants


def test_focal_arb_is_its_formula():
    logits, targets = example()
    p = log_probabilities(logits, COUNTS, 30.0).exp().gather(1, targets[:, None]).squeeze(1)
    expected = -0.5 * (1 - p) ** 3 * p.log()
    result = losses.focal_arb(logits, targets[None], COUNTS, focal_alpha=0.5, focal_gamma=3.0)
    torch.testing.assert_close(result, expected[None])
    torch.testing.assert_close(
        losses.focal_arb(logits, targets[None], COUNTS, focal_gamma=0.0), losses.arb(logits, targets[None], COUNTS)
    )


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([6, 3, 0, 2, 1])], ids=["global", "batch"])
def test_weighted_arb_is_its_formula(counts):
    logits, targets = example()
    omega = counts.sum() / 4 / counts.double()  # four classes are present
    expected = omega[targets] * arb_loss(logits, targets, counts, "none")
    torch.testing.assert_close(losses.weighted_arb(logits, targets[None], counts), expected[None])


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


def test_label_smoothing_of_cross_entropy_is_torch_s():
    logits, targets = example()
    for eps in (0.1, 1.0):
        expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=eps)
        torch.testing.assert_close(losses.cross_entropy(logits, targets[None], eps)[0], expected)
    adjusted = logits + 1.5 * COUNTS.clamp(min=1).log()
    expected = F.cross_entropy(adjusted, targets, reduction="none", label_smoothing=0.1)
    ours = losses.logit_adjustment(logits, targets[None], COUNTS.clamp(min=1), 1.5, label_smoothing=0.1)[0]
    torch.testing.assert_close(ours, expected)


def test_label_smoothing_of_arb_spreads_its_own_loss_over_the_labels():
    logits, targets = example()
    counts = torch.tensor([50.0, 20, 3, 7, 1])
    expected = []
    for z, y in zip(logits, targets, strict=True):
        every = [equation_14(z, k, counts) for k in range(5)]
        expected.append(0.8 * every[y] + 0.2 / 5 * sum(every))
    ours = losses.arb(logits, targets[None], counts, clamp=None, label_smoothing=0.2)[0]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


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


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_arb_with_tau_is_arb_with_counts_to_that_power(tau):
    """At tau 0 too a class that is absent stays absent."""
    logits, targets = example()
    present = COUNTS > 0
    powers = torch.where(present, COUNTS.double() ** tau, 0.0)
    expected = torch.tensor([equation_14(z, int(y), powers) for z, y in zip(logits, targets, strict=True)])
    found = losses.arb(logits, targets[None], COUNTS, clamp=None, tau=tau)[0]
    torch.testing.assert_close(found, expected.double())
    if tau == 1:
        torch.testing.assert_close(arb_loss(logits, targets, COUNTS, "none"), expected.double())


@pytest.mark.parametrize("tau", [0.0, 1.5])
@pytest.mark.parametrize("classes", [5, 1001])
def test_logit_adjustment_is_its_formula(tau, classes):
    logits, targets = example(classes=classes)
    prior = torch.arange(1, classes + 1) / sum(range(1, classes + 1))
    found = losses.logit_adjustment(logits, targets[None], prior, tau)[0]
    for z, y, loss in zip(logits.tolist(), targets.tolist(), found.tolist(), strict=True):
        odds = [math.exp(value) * p**tau for value, p in zip(z, prior.double().tolist(), strict=True)]
        assert loss == pytest.approx(-math.log(odds[y] / sum(odds)), rel=1e-12)


def test_logit_adjustment_of_a_prior_without_a_class_leaves_it_out():
    logits, targets = example()
    found = losses.logit_adjustment(logits, targets[None], losses.class_prior(COUNTS))
    torch.testing.assert_close(found[0], arb_loss(logits, targets, COUNTS, "none", clamp=None), rtol=1e-6, atol=1e-7)


def test_ldam_margins_are_their_formula():
    expected = [0.0 if n == 0 else 0.5 * n**-0.25 / 1**-0.25 for n in COUNTS.tolist()]
    assert losses.ldam_margins(COUNTS).tolist() == pytest.approx(expected, rel=1e-6)
    assert losses.ldam_margins([10000, 16], max_margin=0.25).tolist() == pytest.approx([0.05, 0.25], rel=1e-6)


def test_ldam_is_its_formula():
    """Cosines, from which the label's margin is taken before they are scaled."""
    cosines, targets = example(scale=0.3)
    margins = losses.ldam_margins(COUNTS)
    found = losses.ldam(20 * cosines, targets[None], margins, cosine_scale=20.0)[0]
    for row, y, loss in zip(cosines.tolist(), targets.tolist(), found.tolist(), strict=True):
        own = 20 * (row[y] - margins.double()[y].item())
        others = sum(math.exp(20 * value) for k, value in enumerate(row) if k != y)
        assert loss == pytest.approx(-math.log(math.exp(own) / (math.exp(own) + others)), rel=1e-6, abs=1e-12)


def test_dot_regression_is_its_formula_and_reads_the_label_s_logit_alone():
    logits, targets = example()
    found = losses.dot_regression(logits.requires_grad_(), targets[None])
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


@ALL_LOSSES
def test_gradcheck_in_float64(loss):
    logits, targets = example(batch=4)
    both = torch.stack([targets, targets.roll(1)])
    assert torch.autograd.gradcheck(lambda z: loss(z, both, COUNTS), logits.requires_grad_())


@ALL_LOSSES
@pytest.mark.parametrize("classes", [5, 1001])
def test_several_targets_at_once_are_each_of_them_alone(loss, classes):
    logits, targets = example(classes=classes)
    both = torch.stack([targets, targets.roll(1)])
    counts = torch.arange(1, classes + 1)
    each = [loss(logits, row[None], counts)[0] for row in both]
    assert torch.equal(loss(logits, both, counts), torch.stack(each))


@pytest.mark.parametrize("classes", [5, 1001])
@pytest.mark.parametrize("clamp", [None, 3.0])
def test_double_backward_in_float64(clamp, classes):
    logits, targets = example(batch=2, classes=classes)
    counts = torch.arange(1, classes + 1)
    assert torch.autograd.gradgradcheck(
        lambda z: arb_loss(z, targets, counts, clamp=clamp), logits.requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("classes", [5, 1001])
@pytest.mark.parametrize("given", [True, False], ids=["given counts", "batch counts"])
def test_function_transforms(given, classes):
    """torch.func.grad gives the gradient; under vmap that of each batch, or each sample, with its own labels."""
    (first, targets), counts = example(classes=classes), torch.arange(1, classes + 1)
    criterion = ARBLoss(counts if given else None)
    batches, labels = torch.stack([first, first.roll(1)]), torch.stack([targets, targets.flip(0)])
    leaf = batches.clone().requires_grad_()
    sum(map(criterion, leaf, labels)).backward()
    gradient = torch.func.grad(criterion)
    torch.testing.assert_close(gradient(first, targets), leaf.grad[0])
    torch.testing.assert_close(torch.func.vmap(gradient)(batches, labels), leaf.grad)
    samples = torch.func.vmap(gradient)(first, targets)
    torch.testing.assert_close(samples, torch.stack(list(map(gradient, first, targets))))
    hessian = torch.func.hessian(criterion)(first[:2], targets[:2])
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda z: criterion(z, targets[:2]), first[:2])
    )


class Step(nn.Module):
    """A network with its loss."""

    def __init__(self, criterion):
        super().__init__()
        self.linear, self.criterion = nn.Linear(8, 5), criterion

    def forward(self, features, targets):
        return self.criterion(self.linear(features), targets)


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["batch counts", "given counts"])
def test_a_step_can_be_exported_and_compiled_as_one_graph(counts):
    features, targets = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), example()[1]
    step, batch = Step(ARBLoss(counts)), torch.export.Dim("batch")
    program = torch.export.export(step, (features, targets), dynamic_shapes=({0: batch}, {0: batch})).module()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for size in (12, 3):
        expected = step(features[:size], targets[:size])
        torch.testing.assert_close(program(features[:size], targets[:size]), expected)
        torch.testing.assert_close(compiled(features[:size], targets[:size]), expected)


@pytest.mark.parametrize("target", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_clamp_stops_the_gradient_from_its_bounds_on(dtype, target):
    logits = torch.tensor([[30.0, -30.0, 31.0, 29.875, 0.5]], dtype=dtype, requires_grad=True)
    arb_loss(logits, torch.tensor([target]), torch.ones(5)).backward()
    probs = logits.detach().double().clamp(-30, 30).softmax(dim=1)
    expected = (probs - F.one_hot(torch.tensor([target]), 5)) * torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(logits.grad, expected.to(dtype))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_unclamped_logits_that_are_not_finite_show_in_their_rows_alone(value):
    logits, targets = example(classes=1001)
    expected = arb_loss(logits, targets, torch.ones(1001), "none", clamp=None)
    logits[1, targets[1]] = value
    found = arb_loss(logits, targets, torch.ones(1001), "none", clamp=None)
    assert not found[1].isfinite()
    assert torch.equal(found[torch.arange(12) != 1], expected[torch.arange(12) != 1])


def test_losses_that_no_probability_could_express():
    """-log p of a p that is 0 in float32."""
    logits = torch.zeros(1, 1001)
    logits[0, 0] = 500.0
    found = losses.cross_entropy(logits, torch.tensor([[1], [0]]))
    torch.testing.assert_close(found, torch.tensor([[500.0], [0.0]]))


# ---------------------------------------------------------------------------------------------------------------------
# The file alone


def test_the_file_imports_nothing_but_torch_and_the_standard_library():
    names = {name.split(".")[0] for name in imported(ast.parse(Path(losses.__file__).read_text()))}
    assert names <= {"torch", *sys.stdlib_module_names}


ALONE = """
import torch
from losses import ARBLoss, arb_loss

logits = torch.randn(2, 1001, dtype=torch.float64)
targets, counts = torch.tensor([3, 700]), torch.arange(1, 1002)
expected = torch.nn.functional.cross_entropy(logits + counts.log(), targets)
torch.testing.assert_close(ARBLoss(counts)(logits, targets), expected)
torch.func.grad(lambda z: arb_loss(z, targets, counts))(logits)
assert torch.autograd.gradgradcheck(lambda z: arb_loss(z, targets, counts), logits.requires_grad_(), fast_mode=True)
"""


@pytest.mark.slow
def test_the_file_works_alone_in_another_project(tmp_path):
    """Whose packages have the names of this one's."""
    shutil.copy(losses.__file__, tmp_path)
    for name in ("datasets", "methods", "models", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('another project')")
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
