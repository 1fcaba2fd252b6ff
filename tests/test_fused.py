"""The fused form against the plain one: numbers, gradients, edges, and when it is taken."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from methods import losses
from methods.fused import fused_nll
from methods.losses import arb_log_probabilities, arb_loss, log_probabilities

MANY = losses.FUSED_ABOVE + 1
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LAM = torch.tensor([[0.3], [0.7]])


def example(batch: int = 6, classes: int = MANY, scale: float = 4.0, dtype=torch.float32):
    """Logits, two targets per row (the same one in row 0), and counts of which every fifth is 0."""
    random = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(batch, classes, generator=random, dtype=torch.float64)
    counts = torch.randint(1, 500, (classes,), generator=random)
    counts[::5] = 0
    present = counts.nonzero().squeeze(1)
    targets = present[torch.randint(0, len(present), (2, batch), generator=random)]
    targets[1, 0] = targets[0, 0]
    return logits.to(dtype), targets, counts


def plain_nll(logits, targets, counts, clamp):
    log_probs = log_probabilities(logits) if counts is None else arb_log_probabilities(logits, counts, clamp)
    return -log_probs.gather(1, targets.T).T


def fused(logits, targets, counts, clamp):
    return fused_nll(logits, targets, None if counts is None else counts.double().log().to(logits.dtype), clamp)


def loss_and_gradient(nll, logits, *arguments):
    logits = logits.detach().requires_grad_()
    result = nll(logits, *arguments)
    (result * LAM[-len(result) :].to(result)).sum().backward()
    return result.detach(), logits.grad


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("count", [1, 2], ids=["one target", "two targets"])
@pytest.mark.parametrize("counted", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("clamp", [None, 3.0])
def test_gradcheck_in_float64(clamp, counted, count):
    logits, targets, counts = example(batch=3, classes=7, dtype=torch.float64)
    assert (logits.abs() > 3).any()
    arguments = (targets[:count], counts if counted else None, clamp)
    assert torch.autograd.gradcheck(lambda z: fused(z, *arguments), logits.requires_grad_())


@pytest.mark.parametrize("count", [1, 2], ids=["one target", "two targets"])
@pytest.mark.parametrize("counted", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("clamp", [None, 30.0, 3.0])
@pytest.mark.parametrize("classes", [2, 10, 1001, 8142])
def test_it_is_the_plain_form(classes, clamp, counted, count):
    logits, targets, counts = example(classes=classes)
    arguments = (targets[:count], counts if counted else None, clamp if counted else None)
    result, gradient = loss_and_gradient(fused, logits, *arguments)
    expected, expected_gradient = loss_and_gradient(plain_nll, logits.double(), *arguments)
    assert result.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(result, expected.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("counts", ["global", "batch"])
@pytest.mark.parametrize("case", ["small", "large_logits", "thousand"])
def test_it_is_the_published_code(case, counts):
    stored = np.load(Path(__file__).parent / "goldens" / "arb_loss.npz")
    names = (f"{case}.logits", f"{case}.labels", f"{case}.{counts}_counts")
    logits, labels, class_counts = (torch.from_numpy(stored[name]) for name in names)
    logits = logits.clone().requires_grad_()
    loss = fused(logits, labels[None], class_counts, 30.0).mean()
    loss.backward()
    assert_allclose(loss.item(), stored[f"{case}.{counts}.mean.loss"], rtol=2e-6)
    assert_allclose(logits.grad, stored[f"{case}.{counts}.mean.grad"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised_first_and_get_their_gradient_in_half(dtype):
    logits, targets, counts = example(dtype=dtype, scale=15.0)
    log_counts = counts.double().log().float()
    result, gradient = loss_and_gradient(fused_nll, logits, targets, log_counts, 30.1)  # 30.1 is no half number
    expected, expected_gradient = loss_and_gradient(fused_nll, logits.float(), targets, log_counts, 30.1)
    assert torch.equal(result, expected)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("target", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_clamp_stops_the_gradient_from_its_bounds_on(dtype, target):
    """Where torch.clamp's slope at the bounds is 1 (older versions), hardtanh's is 0."""
    logits = torch.tensor([[30.0, -30.0, 31.0, 29.875, 0.5]], dtype=dtype)

    def plain(z, targets):
        return -torch.log_softmax(torch.nn.functional.hardtanh(z.double(), -30.0, 30.0), dim=1)[:, targets[0]]

    gradient = loss_and_gradient(fused_nll, logits, torch.tensor([[target]]), None, 30.0)[1]
    torch.testing.assert_close(gradient, loss_and_gradient(plain, logits, torch.tensor([[target]]))[1])
    assert (gradient[0, :3] == 0).all()
    assert (gradient[0, 3:] != 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# Edges


def test_an_absent_target_has_an_infinite_loss_and_the_plain_gradient():
    logits, targets, counts = example()
    targets[0, 2] = 0
    result, gradient = loss_and_gradient(fused, logits, targets, counts, 30.0)
    expected, expected_gradient = loss_and_gradient(plain_nll, logits, targets, counts, 30.0)
    assert result.isinf().sum() == 1
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("clamp", [None, 30.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_logits_that_are_not_finite_end_as_in_the_plain_form(value, clamp):
    """At NaN itself the slope of a clamp may be 0 or NaN."""
    logits, targets, counts = example()
    logits[1, 3] = value
    logits[2, targets[0, 2]] = value
    logits[3] = value
    result, gradient = loss_and_gradient(fused, logits, targets, counts, clamp)
    expected, expected_gradient = loss_and_gradient(plain_nll, logits, targets, counts, clamp)
    torch.testing.assert_close(result, expected, equal_nan=True)
    at = ~logits.isnan()
    torch.testing.assert_close(gradient[at], expected_gradient[at], equal_nan=True)


def test_losses_that_no_probability_could_express():
    """-log p of a p that is 0 in float32."""
    logits = torch.zeros(1, MANY)
    logits[0, 0] = 500.0
    torch.testing.assert_close(fused(logits, torch.tensor([[1], [0]]), None, None), torch.tensor([[500.0], [0.0]]))


def test_an_empty_batch():
    logits = torch.zeros(0, MANY, requires_grad=True)
    result = fused(logits, torch.zeros(2, 0, dtype=torch.int64), torch.ones(MANY), 30.0)
    result.sum().backward()
    assert result.shape == (2, 0)
    assert logits.grad.shape == logits.shape


def test_any_strides():
    logits, targets, counts = example()
    expected, expected_gradient = loss_and_gradient(fused, logits, targets, counts, 30.0)
    for other in (logits.T.contiguous().T, torch.stack([logits, logits], dim=2)[..., 1]):
        assert not other.is_contiguous()
        result, gradient = loss_and_gradient(fused, other, targets.T.contiguous().T, counts, 30.0)
        assert torch.equal(result, expected)
        assert torch.equal(gradient, expected_gradient)


def test_neither_logits_nor_targets_change_and_a_second_backward_pass_gives_the_same():
    logits, targets, counts = example(scale=20.0)
    before = logits.clone(), targets.clone()
    logits.requires_grad_()
    loss = fused(logits, targets, counts, 30.0).mean()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert torch.equal(logits.detach(), before[0])
    assert torch.equal(targets, before[1])


def test_targets_of_another_batch_are_refused():
    logits, targets, counts = example()
    with pytest.raises(ValueError, match=r"shape \(2, 1\) does not fit logits of shape \(6, 1001\)"):
        fused(logits, targets[:, :1], counts, 30.0)


def test_one_copy_of_the_logits_is_kept_for_the_backward_pass():
    logits, targets, counts = example(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses.arb_terms(logits.requires_grad_(), counts)(targets).mean()
    assert [tensor.dtype for tensor in kept if tensor.numel() >= logits.numel()] == [torch.float32]


def test_where_no_gradient_is_wanted_none_is_kept():
    logits, targets, counts = example()
    assert not fused(logits, targets, counts, 30.0).requires_grad
    with torch.no_grad():
        assert not fused(logits.requires_grad_(), targets, counts, 30.0).requires_grad


def test_there_is_no_second_derivative():
    logits, targets, counts = example()
    logits.requires_grad_()
    loss = (fused(logits, targets, counts, 30.0) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    logits, targets, counts = example(dtype=torch.bfloat16)
    counts = counts.double().log().float()
    expected = loss_and_gradient(fused_nll, logits, targets, counts, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        result = loss_and_gradient(fused_nll, logits, targets, counts, 30.0)
    assert result[0].dtype == torch.float32
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 33, 1001, 1024, 8142, 100_003])
def test_softmax_may_write_over_what_it_reads(classes, dtype, device):
    """The fused form relies on it; torch's documentation is silent."""
    logits = 9 * torch.randn(5, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits = logits.to(device)
    expected = torch.softmax(logits, dim=1)
    assert torch.equal(torch.softmax(logits, dim=1, out=logits), expected)


@CUDA
def test_on_cuda_nothing_waits_for_the_device():
    logits, targets, counts = example(batch=64)
    expected = loss_and_gradient(fused, logits, targets, counts, 3.0)
    arguments = [tensor.cuda() for tensor in (logits, targets, counts)]
    LAM.cuda()  # CUDA is ready from here on
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = arguments[0].requires_grad_()
        fused(leaf, *arguments[1:], 3.0).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    result = loss_and_gradient(fused, *arguments, 3.0)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Where it is taken


def graph_of(tensor: torch.Tensor) -> set[str]:
    """The names of all nodes that a backward pass from ``tensor`` would visit."""
    names, open_nodes = set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        names.add(node.name())
        open_nodes += [child for child, _ in node.next_functions if child is not None]
    return names


TERMS = pytest.mark.parametrize(
    "terms",
    [losses.ce_terms, losses.arb_terms, losses.focal_arb_terms, losses.weighted_arb_terms],
    ids=lambda terms: terms.__name__,
)


@TERMS
@pytest.mark.parametrize("classes", [10, MANY - 1, MANY])
def test_only_many_classes_take_the_fused_form(terms, classes):
    logits, targets, counts = example(classes=classes)
    names = graph_of(terms(logits.requires_grad_(), counts)(targets))
    fused_nodes = {name for name in names if "FusedNLL" in name}
    assert bool(fused_nodes) == (classes == MANY)
    assert ("LogSoftmaxBackward0" in names) == (classes < MANY)


@TERMS
def test_the_losses_of_many_classes_are_those_of_the_plain_form(terms, monkeypatch):
    logits, targets, counts = example()
    result, gradient = loss_and_gradient(lambda z: terms(z, counts)(targets), logits)
    monkeypatch.setattr(losses, "FUSED_ABOVE", MANY)
    expected, expected_gradient = loss_and_gradient(lambda z: terms(z, counts)(targets), logits)
    torch.testing.assert_close(result, expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_arb_loss_of_many_classes_ignores_what_has_no_label(reduction, monkeypatch):
    logits, targets, counts = example()
    targets = targets[0]
    targets[[1, 4]] = -1
    counts[0] = 0  # the class that stands in for no label is absent
    arguments = (targets, counts, reduction, 30.0, -1)
    result, gradient = loss_and_gradient(lambda z: arb_loss(z, *arguments)[None], logits)
    monkeypatch.setattr(losses, "FUSED_ABOVE", MANY)
    expected, expected_gradient = loss_and_gradient(lambda z: arb_loss(z, *arguments)[None], logits)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert (gradient[[1, 4]] == 0).all()


def test_dense_logits_of_many_classes_take_the_plain_form():
    logits = torch.randn(1, MANY, 2, 2, requires_grad=True)
    loss = arb_loss(logits, torch.tensor([[[0, 1], [2, -100]]]), torch.ones(MANY))
    assert "LogSoftmaxBackward0" in graph_of(loss)
