"""What one step computes: counts, mixing, and the registry of losses."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from methods import build_method, losses
from methods.method import COUNTS, LOSSES, step_counts
from methods.mixup import StepDraws, draw
from models import build_model
from utils.errors import InputError

CLASS_COUNTS = torch.tensor([60, 30, 9, 1])
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])


def method_for(loss: str, counts: str = "batch", mixup_alpha: float = 0.0):
    return build_method(loss, counts, CLASS_COUNTS, mixup_alpha, smooth_head=0.3, smooth_tail=0.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("cifar10", "resnet20", 4).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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
def test_a_pass_that_counts_nothing_adds_nothing_to_the_gradient(loss, counts, model, images):
    """Weight 0 times a loss that is not finite would be no number."""
    output = method_for(loss, counts, 1.0)(model, images, TARGETS, MIXED, torch.cat([TARGETS, TARGETS]))
    (output.loss * 0.0).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize("counts", ["batch", "global"])
def test_arb_without_mixup(model, images, counts):
    output = method_for("arb", counts)(model, images, TARGETS, PLAIN)
    logits = model(images)
    n = CLASS_COUNTS if counts == "global" else torch.tensor([3, 2, 1, 0])
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.features, model.features(images))
    torch.testing.assert_close(output.loss, losses.arb_loss(logits, TARGETS, n))


def test_arb_with_mixup_reads_both_labels_and_counts_the_unmixed_ones(model, images):
    output = method_for("arb", "batch", 1.0)(model, images, TARGETS, MIXED)
    logits = model(0.3 * images + 0.7 * images[MIXED.partner])
    n = torch.tensor([3, 2, 1, 0])
    expected = 0.3 * losses.arb_loss(logits, TARGETS, n) + 0.7 * losses.arb_loss(logits, TARGETS[MIXED.partner], n)
    torch.testing.assert_close(output.loss, expected)


def test_without_mixup_the_draws_change_nothing(model, images):
    method = method_for("ce")
    assert torch.equal(method(model, images, TARGETS, PLAIN).loss, method(model, images, TARGETS, MIXED).loss)


def test_las_trains_smoothed_cross_entropy(model, images):
    output = method_for("las")(model, images, TARGETS, PLAIN)
    smoothing = losses.smoothing_by_count(CLASS_COUNTS, 0.3, 0.0)
    torch.testing.assert_close(output.loss, losses.label_aware_smoothing(output.logits, TARGETS, smoothing))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_gives_every_parameter_a_finite_gradient(loss, model, images):
    model.train()
    method_for(loss, "batch", 1.0)(model, images, TARGETS, MIXED).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


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


def test_two_methods_with_one_seed_draw_the_same():
    ours = method_for("arb", "global", 1.0).draws([4, 4], seed=5, epoch=2)
    theirs = method_for("ce", "batch", 1.0).draws([4, 4], seed=5, epoch=2)
    assert all(a.lam == b.lam and torch.equal(a.partner, b.partner) for a, b in zip(ours, theirs, strict=True))


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


def test_one_pass_per_step_is_the_habit():
    method = method_for("arb", "batch", 1.0)
    assert_same_draws(method.draws([6, 5, 7], seed=5, epoch=2), draw(1.0, [6, 5, 7], seed=5, epoch=2))


def test_without_mixup_every_pass_keeps_its_images():
    passes = method_for("arb").draws([3, 2, 3, 2], seed=0, epoch=0, accumulate=2)
    assert [float(table.lam) for table in passes] == [1.0] * 4


def test_a_loss_is_added_in_three_places(tmp_path):
    """A function, a line of the registry, a YAML: a temporary copy gets one and trains it."""
    root = Path(__file__).parent.parent
    for name in ("config", "datasets", "methods", "models", "utils"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "train_stage1.py", tmp_path)
    with (tmp_path / "methods" / "losses.py").open("a") as file:
        file.write(
            "\n\ndef hinge_terms(logits, class_counts):\n"
            "    hinge = lambda y: F.multi_margin_loss(logits, y, reduction='none')\n"
            "    return lambda targets: torch.stack([hinge(y) for y in targets])\n"
        )
    registry = tmp_path / "methods" / "method.py"
    line = '"ce": lambda s: Criterion(losses.ce_terms),'
    assert line in registry.read_text()
    registry.write_text(
        registry.read_text().replace(line, line + '\n    "hinge": lambda s: Criterion(losses.hinge_terms),')
    )
    (tmp_path / "config" / "hinge.yaml").write_text("_BASE_: digits/digits_imb005.yaml\nloss: hinge\nnum_epochs: 1\n")
    done = subprocess.run(
        [sys.executable, "train_stage1.py", "--cfg", "config/hinge.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training hinge, no mixup" in done.stdout


def test_criterion_takes_logits_of_any_device_type_without_changing_them(images):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    terms = method_for("arb").criterion(logits, CLASS_COUNTS)
    expected = F.cross_entropy(logits + CLASS_COUNTS.log(), TARGETS, reduction="none")
    torch.testing.assert_close(terms(TARGETS[None]), expected[None])
    assert torch.equal(logits, before)


def test_mixup_of_many_classes_is_composed_of_arb_losses():
    """One pass over the logits for both labels, batch counts of the unmixed ones."""
    classes = losses.FUSED_ABOVE + 1
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


@pytest.mark.parametrize(
    ("loss", "clamp"), [("ce", None), ("arb", 7.0), ("focal_arb", 7.0), ("weighted_arb", 7.0), ("las", None)]
)
def test_a_method_knows_what_its_loss_clamps_to(loss, clamp):
    options = {"smooth_head": 0.3, "smooth_tail": 0.0}
    assert build_method(loss, "batch", torch.tensor([3, 2]), 0.0, clamp=7.0, **options).clamp == clamp
