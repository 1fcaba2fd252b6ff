"""What one step computes: counts, mixing, and the registry of losses."""

import pytest
import torch
import torch.nn.functional as F

from methods import build_method, losses
from methods.method import COUNTS, LOSSES, step_counts
from methods.mixup import StepDraws, draw
from methods.regularizers import between_class, within_class
from models import build_model
from utils.errors import InputError

CLASS_COUNTS = torch.tensor([60, 30, 9, 1])
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])


def method_for(loss: str, counts: str = "batch", mixup_alpha: float = 0.0):
    return build_method(loss, counts, CLASS_COUNTS, mixup_alpha, smooth_head=0.3, smooth_tail=0.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("cifar10", "resnet8", 4).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


PLAIN = StepDraws(torch.ones(()), torch.arange(6))
MIXED = StepDraws(torch.tensor(0.3), torch.tensor([5, 3, 1, 0, 2, 4]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("global", [60, 30, 9, 1]),
        ("batch", [3, 2, 1, 0]),
        ("batch_synced", [3, 2, 1, 0]),
        ("global_masked", [60, 30, 9, 0]),
        ("batch_unmasked", [3, 2, 1, 6 * 1 / 100]),
    ],
)
def test_counts_of_a_step(kind, expected):
    torch.testing.assert_close(step_counts(kind, TARGETS, CLASS_COUNTS).double(), torch.tensor(expected).double())


@pytest.mark.parametrize("kind", COUNTS)
def test_only_synced_counts_look_at_the_whole_global_batch(kind):
    whole = torch.cat([TARGETS, torch.tensor([3, 3, 0])])
    counts = step_counts(kind, TARGETS, CLASS_COUNTS, whole)
    expected = [4, 2, 1, 2] if kind == "batch_synced" else step_counts(kind, TARGETS, CLASS_COUNTS).tolist()
    assert counts.tolist() == expected


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_finite_gradient_and_none_where_a_pass_does_not_count(loss, counts, model, images):
    """Weight 0 times a loss that is not finite would be no number."""
    output = method_for(loss, counts, 1.0)(model, images, TARGETS, MIXED, torch.cat([TARGETS, TARGETS]))
    (output.loss * 0.0).backward(retain_graph=True)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("counts", ["batch", "global"])
def test_arb_without_mixup(model, images, counts):
    output = method_for("arb", counts)(model, images, TARGETS, PLAIN)
    logits = model(images)
    n = CLASS_COUNTS if counts == "global" else torch.tensor([3, 2, 1, 0])
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.features, model.features(images))
    torch.testing.assert_close(output.loss, losses.arb_loss(logits, TARGETS, n))


def test_without_mixup_the_draws_change_nothing(model, images):
    method = method_for("ce")
    assert torch.equal(method(model, images, TARGETS, PLAIN).loss, method(model, images, TARGETS, MIXED).loss)


def test_las_trains_smoothed_cross_entropy(model, images):
    output = method_for("las")(model, images, TARGETS, PLAIN)
    smoothing = losses.smoothing_by_count(CLASS_COUNTS, 0.3, 0.0)
    torch.testing.assert_close(output.loss, losses.label_aware_smoothing(output.logits, TARGETS, smoothing))


def test_label_smoothing_needs_images_of_every_class(model, images):
    smoothed = build_method("ce", "batch", CLASS_COUNTS - 1, 0.0, label_smoothing=0.1)(model, images, TARGETS, PLAIN)
    torch.testing.assert_close(smoothed.loss, F.cross_entropy(smoothed.logits, TARGETS, label_smoothing=0.1))
    for loss in ("arb", "logit_adjustment"):
        assert build_method(loss, "global", CLASS_COUNTS, 0.0, label_smoothing=0.1)
        with pytest.raises(InputError, match=r"^label_smoothing: classes without a training image \(1 here\)"):
            build_method(loss, "global", CLASS_COUNTS - 1, 0.0, label_smoothing=0.1)


def test_buffers_travel_with_the_method():
    method = method_for("las").to(torch.float64)
    assert method.criterion.smoothing.dtype == torch.float64
    assert set(dict(method.named_buffers())) == {"class_counts", "criterion.smoothing"}
    assert not method.state_dict()  # they follow from data and configuration


@pytest.mark.parametrize(
    ("loss", "counts", "named"), [("arbb", "batch", "ce, arb, focal_arb"), ("arb", "local", "global, batch")]
)
def test_unknown_names_list_the_known_ones(loss, counts, named):
    with pytest.raises(InputError, match=named):
        method_for(loss, counts)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("logit_adjustment", lambda z, y: F.cross_entropy(z + (CLASS_COUNTS / 100).log() * 1.5, y)),
        ("arb", lambda z, y: F.cross_entropy(z + 1.5 * torch.tensor([3.0, 2, 1, 0]).log(), y)),
        ("ldam", lambda z, y: F.cross_entropy(z - 8 * F.one_hot(y, 4) * (0.2 * CLASS_COUNTS**-0.25)[y][:, None], y)),
        ("dot_regression", lambda z, y: 0.5 * (z[range(6), y] - 1).square().mean()),
    ],
)
def test_the_registry_gives_each_baseline_its_numbers(model, images, loss, expected):
    """The rarest class has one image, so its margin is the largest."""
    method = build_method(loss, "batch", CLASS_COUNTS, 0.0, tau=1.5, max_margin=0.2, cosine_scale=8.0)
    output = method(model, images, TARGETS, PLAIN)
    torch.testing.assert_close(output.loss, expected(output.logits, TARGETS))


# ---------------------------------------------------------------------------------------------------------------------
# What sets in later


WEIGHTS = losses.drw_weights(CLASS_COUNTS, 0.99)


@pytest.mark.parametrize("loss", LOSSES)
def test_from_its_epoch_on_drw_is_the_weighted_mean_of_any_loss(loss, model, images):
    numbers = {"smooth_head": 0.3, "smooth_tail": 0.0}
    plain = build_method(loss, "global", CLASS_COUNTS, 1.0, **numbers)
    deferred = build_method(loss, "global", CLASS_COUNTS, 1.0, drw_epoch=3, drw_beta=0.99, **numbers)
    assert [deferred.start_epoch(epoch) for epoch in (0, 1, 2, 3, 4)] == [False, False, False, True, False]
    logits = deferred(model, images, TARGETS, MIXED).logits
    expected = 0.0
    for share, targets in ((0.3, TARGETS), (0.7, TARGETS[MIXED.partner])):
        each = plain.criterion(logits, CLASS_COUNTS)(targets[None])[0]
        expected += share * (WEIGHTS[targets] * each).sum() / WEIGHTS[targets].sum()
    torch.testing.assert_close(deferred(model, images, TARGETS, MIXED).loss, expected)
    assert deferred.start_epoch(2)
    assert torch.equal(deferred(model, images, TARGETS, MIXED).loss, plain(model, images, TARGETS, MIXED).loss)


def test_weighted_cross_entropy_is_torch_s(model, images):
    method = build_method("ce", "global", CLASS_COUNTS, 0.0, drw_epoch=0, drw_beta=0.99)
    output = method(model, images, TARGETS, PLAIN)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, TARGETS, weight=WEIGHTS))


def test_components_are_of_the_weighted_loss(model, images):
    """Their sums over the batch are the gradient of the classifier's rows, times the number of images."""
    method = build_method("ce", "global", CLASS_COUNTS, 1.0, drw_epoch=0, drw_beta=0.99)
    output = method(model, images, TARGETS, MIXED)
    output.loss.backward()
    found = method.components(output.logits, output.features.detach(), TARGETS, MIXED)
    bias = 6 * model.classifier.fc.bias.grad.double()
    torch.testing.assert_close(found.repulsion_mass - found.attraction_mass, bias, rtol=1e-4, atol=1e-5)


def regularized(start: int = 0, mixup_alpha: float = 1.0, **numbers):
    numbers = {"nc_within": 0.02, "nc_between": 0.3, "feature_width": 64, "nc_start_epoch": start, **numbers}
    return build_method("ce", "global", CLASS_COUNTS, mixup_alpha, **numbers)


@pytest.mark.parametrize(("alpha", "draws"), [(0.0, PLAIN), (1.0, MIXED)], ids=["plain", "mixup"])
def test_from_its_epoch_on_the_regularizer_is_added(alpha, draws, model, images):
    method, plain = regularized(2, alpha), method_for("ce", mixup_alpha=alpha)
    before = method(model, images, TARGETS, draws)
    assert torch.equal(before.loss, plain(model, images, TARGETS, draws).loss)
    before.loss.backward()
    assert method.regularizer.means.grad is None
    assert [method.start_epoch(epoch) for epoch in (1, 2, 3)] == [False, True, False]
    output, means = method(model, images, TARGETS, draws), method.regularizer.means
    lam = float(draws.lam)
    pull = lam * within_class(output.features, TARGETS, means)
    pull = pull + (1 - lam) * within_class(output.features, TARGETS[draws.partner], means)
    torch.testing.assert_close(output.loss, before.loss + 0.02 * pull + 0.3 * between_class(means))


def test_means_train_by_plain_sgd_with_their_gradient_divided_by_lambda1(model, images):
    method = regularized(nc_means_lr=0.4)
    (group,) = method.parameter_groups()
    optimizer = torch.optim.SGD(
        [{"params": list(model.parameters())}, group], lr=0.1, momentum=0.9, weight_decay=0.5, fused=True
    )
    means = method.regularizer.means
    for _ in range(2):
        before = means.detach().clone()
        loss = method(model, images, TARGETS, MIXED).loss
        loss.backward()
        expected = before - 0.4 * means.grad / 0.02
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(means.detach(), expected)
    assert method_for("ce").parameter_groups() == []
    assert set(method.state_dict()) == {"regularizer.means"}


def test_terms_of_moving_means_and_alignment_set_in_with_their_epoch(model, images):
    method = build_method(
        "ce", "global", CLASS_COUNTS, 1.0, feature_width=64, nc_start_epoch=2, nc_dual=0.5, spa="slerp"
    )
    plain, before = method_for("ce", mixup_alpha=1.0), model.classifier.fc.weight.detach().clone()
    for epoch, on in ((1, False), (2, True)):
        assert method.start_epoch(epoch) == on
        output = method(model, images, TARGETS, MIXED)
        method.adjust_gradients(model)
        method.adjust_weights(model)
        assert torch.equal(output.loss, plain(model, images, TARGETS, MIXED).loss) != on
        assert method.geometry.moving.seen.any() == on
        assert torch.equal(model.classifier.fc.weight, before) != on


def assert_same_draws(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.lam, b.lam)
        assert torch.equal(a.partner, b.partner)


def test_the_passes_of_a_step_draw_as_processes_with_their_batches_would():
    sizes = [6, 5, 7, 6, 6, 6, 1, 2, 1]  # three steps of three passes
    passes = method_for("arb", "batch", 1.0).draws(sizes, seed=5, epoch=2, accumulate=3)
    assert [len(table.partner) for table in passes] == sizes
    for n in range(3):
        assert_same_draws(passes[n::3], draw(1.0, sizes[n::3], seed=5, epoch=2))
    lams = [float(table.lam) for table in passes]
    assert lams[0::3] == lams[1::3] == lams[2::3]
    assert len(set(lams)) == 3
    assert not torch.equal(passes[3].partner, passes[0].partner)  # another step, another permutation
    ours = method_for("arb", "global", 1.0).draws([6, 5, 7], seed=5, epoch=2)  # one pass per step
    theirs = method_for("ce", "batch", 1.0).draws([6, 5, 7], seed=5, epoch=2)
    for draws in (ours, theirs):
        assert_same_draws(draws, draw(1.0, [6, 5, 7], seed=5, epoch=2))
    plain = method_for("arb").draws([3, 2, 3, 2], seed=0, epoch=0, accumulate=2)
    assert [float(table.lam) for table in plain] == [1.0] * 4


def test_mixup_of_many_classes_is_composed_of_arb_losses():
    """One pass over the logits for both labels, batch counts of the unmixed ones."""
    classes = 1001
    random = torch.Generator().manual_seed(0)
    logits = (12 * torch.randn(6, classes, generator=random)).requires_grad_()
    targets = torch.randint(0, classes, (6,), generator=random)
    method = build_method("arb", "batch", torch.ones(classes, dtype=torch.int64), 1.0)
    output = method(lambda images, with_features: (logits, images), torch.randn(6, 3), targets, MIXED)
    (gradient,) = torch.autograd.grad(output.loss, logits)
    n = torch.bincount(targets, minlength=classes)
    own, partners = (F.cross_entropy(logits.clamp(-30, 30) + n.log(), y) for y in (targets, targets[MIXED.partner]))
    expected = 0.3 * own + 0.7 * partners
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-8)
    composed = [losses.arb_loss(logits, y, n) for y in (targets, targets[MIXED.partner])]
    torch.testing.assert_close(output.loss, 0.3 * composed[0] + 0.7 * composed[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_method_knows_what_its_loss_clamps_to(loss):
    method = build_method(loss, "batch", torch.tensor([3, 2]), 0.0, clamp=7.0, smooth_head=0.3, smooth_tail=0.0)
    assert method.clamp == (7.0 if "arb" in loss else None)


def test_options_go_to_the_parameters_of_their_names():
    method = build_method("focal_arb", "batch", CLASS_COUNTS, 0.0, focal_gamma=3.0, tau=2.0, max_margin=0.1)
    assert method.criterion.options == {"clamp": 30.0, "focal_alpha": 1.0, "focal_gamma": 3.0}
    with pytest.raises(TypeError, match="no loss has the option focal_gama"):
        build_method("focal_arb", "batch", CLASS_COUNTS, 0.0, focal_gama=3.0)
