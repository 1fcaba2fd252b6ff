"""Every number in tests/goldens, computed once with the published reference code, is reproduced here."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from datasets.class_order import legacy_order, stable_order
from datasets.long_tail import long_tail_counts, long_tail_indices
from methods import build_method
from methods.gradients import component_norms
from methods.losses import arb_loss, label_aware_smoothing, smoothing_by_count
from methods.mixup import StepDraws
from models import build_model
from models.resnet import feature_maps
from tests.goldens.fill import fill_state_dict, wave_images
from utils.metrics import calibration_error
from utils.schedule import lr_at

FOLDER = Path(__file__).parent / "goldens"


@cache
def golden(name: str) -> dict:
    return dict(np.load(FOLDER / f"{name}.npz"))


def tensors(name: str, *keys: str) -> list[torch.Tensor]:
    return [torch.from_numpy(golden(name)[key]) for key in keys]


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The deterministic weights of the goldens: each part is filled by itself."""
    for part in (model.backbone, model.block, model.classifier):
        if part is not None:
            fill_state_dict(part.state_dict())
    return model


ARB_CASES = ("small", "wide", "large_logits", "thousand")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("counts", ["global", "batch"])
@pytest.mark.parametrize("case", ARB_CASES)
def test_arb_loss_and_its_gradient(case, counts, reduction):
    logits, labels, class_counts = tensors("arb_loss", f"{case}.logits", f"{case}.labels", f"{case}.{counts}_counts")
    logits = logits.clone().requires_grad_()
    loss = arb_loss(logits, labels, class_counts, reduction)
    loss.backward()
    stored = golden("arb_loss")
    assert_allclose(loss.item(), stored[f"{case}.{counts}.{reduction}.loss"], rtol=2e-6)
    assert_allclose(logits.grad, stored[f"{case}.{counts}.{reduction}.grad"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", ["global", "batch"])
@pytest.mark.parametrize("case", ARB_CASES)
def test_arb_loss_under_mixup_through_the_method_that_trains(case, counts):
    """The golden's second labels stand for a partner; batch counts come from the first, unmixed ones.

    The tolerance is the reference's own noise: it sums exp(z) up to e^30 in float32, and is off by 1.6e-6 from float64
    in one entry of ``large_logits``, where this code is off by 3e-9.
    """
    stored = golden("arb_loss")
    logits, labels, mixed, class_counts = tensors(
        "arb_loss", f"{case}.logits", f"{case}.labels", f"{case}.labels_mixed", f"{case}.{counts}_counts"
    )
    logits = logits.clone().requires_grad_()
    lam = float(stored[f"{case}.lam"])
    terms = arb_method(counts, class_counts).criterion(logits, class_counts)
    own, partners = terms(torch.stack([labels, mixed])).mean(dim=1)
    loss = lam * own + (1 - lam) * partners
    loss.backward()
    assert_allclose(loss.item(), stored[f"{case}.{counts}.mixup.loss"], rtol=2e-6)
    assert_allclose(logits.grad, stored[f"{case}.{counts}.mixup.grad"], rtol=1e-5, atol=2e-6)


def arb_method(counts: str, class_counts: torch.Tensor, loss: str = "arb"):
    return build_method(loss, counts, class_counts, mixup_alpha=0.0)


@pytest.mark.parametrize("shape", ["concave", "linear", "convex", "exp"])
def test_label_aware_smoothing(shape):
    stored = golden("label_aware_smoothing")
    logits, labels, counts = tensors("label_aware_smoothing", "logits", "labels", "counts")
    power = 2.0 if shape == "exp" else None
    smoothing = smoothing_by_count(counts, float(stored["smooth_head"]), float(stored["smooth_tail"]), shape, power)
    assert_allclose(smoothing, stored[f"{shape}.smooth"], rtol=1e-6)
    assert_allclose(label_aware_smoothing(logits, labels, smoothing), stored[f"{shape}.loss"], rtol=1e-6)


@pytest.mark.parametrize("factor", ["0.1", "0.02", "0.01"])
@pytest.mark.parametrize("profile", ["exp", "step"])
@pytest.mark.parametrize(("labels", "classes"), [("ten", 10), ("hundred", 100)])
def test_the_very_images_of_the_long_tailed_cut(labels, classes, profile, factor):
    stored = golden("long_tail_subset")
    targets = stored[f"{labels}.targets"]
    counts = long_tail_counts(len(targets) // classes, classes, profile, float(factor))
    assert_array_equal(counts, stored[f"{labels}.{profile}.{factor}.counts"])
    assert_array_equal(long_tail_indices(targets, counts), stored[f"{labels}.{profile}.{factor}.indices"])


@pytest.mark.parametrize("name", ["step", "cosine", "cosine90", "step300"])
def test_learning_rate_of_every_epoch(name):
    stored = golden("learning_rate")
    epochs, base = len(stored[name]), float(stored[f"{name}.base_lr"])
    rates = [lr_at(e, base, epochs, name.startswith("cosine"), (160, 240)) for e in range(epochs)]
    assert_allclose(rates, stored[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss", ["ce", "batch", "global"])
@pytest.mark.parametrize("case", ["small", "mid"])
def test_attraction_and_repulsion_table(case, loss):
    logits, features, labels = tensors("gradient_table", f"{case}.logits", f"{case}.features", f"{case}.labels")
    counts = None if loss == "ce" else tensors("gradient_table", f"{case}.{loss}_counts")[0]
    table = component_norms(logits, features, labels, counts)
    assert_allclose(table, golden("gradient_table")[f"{case}.table.{loss}"], rtol=1e-5, atol=2e-6)


def test_calibration():
    stored = golden("calibration")
    result = calibration_error(*tensors("calibration", "confidence", "predicted", "true"))
    assert_array_equal(result["bin_count"], stored["bin_count"])
    for key in ("ece", "mce", "bin_accuracy", "bin_confidence"):
        assert_allclose(result[key], stored[key], rtol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("dataset", "backbone", "classes", "golden_name", "images"),
    [
        ("cifar10", "resnet32_fe", 10, "resnet32", (4, 32)),
        ("imagenet", "resnet10_fe", 50, "resnet10", (2, 64)),
        ("imagenet", "resnet50_fe", 50, "resnet50", (2, 64)),
        ("places", "resnet152_fe", 365, "places152", (2, 64)),
    ],
)
def test_forward_and_key_names(dataset, backbone, classes, golden_name, images):
    stored = golden("forward")
    model = filled(build_model(dataset, backbone, classes, pretrained=False)).eval()
    logits, features = model(wave_images(*images, int(stored["seed"])), with_features=True)
    compared = [kind for kind in ("logits", "features") if f"{golden_name}.{kind}" in stored]
    assert compared
    for kind in compared:
        value, expected = {"logits": logits, "features": features}[kind], stored[f"{golden_name}.{kind}"]
        assert_allclose(value.detach(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert set(model.classifier.state_dict()) == set(stored["keys.classifier"])
    if golden_name != "resnet10":  # the goldens have no names for this one
        assert set(model.backbone.state_dict()) == set(stored[f"keys.{golden_name}"])
    if golden_name == "places152":
        assert set(model.block.state_dict()) == set(stored["keys.places_block"])
        maps = feature_maps(model.backbone, wave_images(*images, int(stored["seed"])))
        assert list(maps.shape) == list(stored["places152.backbone_shape"])


@pytest.mark.parametrize("name", ["places", "random0", "random1", "random2", "random3"])
def test_legacy_class_order(name):
    assert_array_equal(
        legacy_order(golden("class_order")[f"{name}.counts"]), golden("class_order")[f"{name}.legacy_order"]
    )


def test_stable_class_order():
    stored = golden("class_order")
    assert_array_equal(stable_order(stored["places.counts"]), stored["places.stable_order"])
    assert (stored["places.stable_order"] != stored["places.legacy_order"]).sum() == 153


@pytest.mark.parametrize("name", ["ce", "arb_batch", "arb_global"])
def test_trajectory_of_sgd(name):
    """Float noise grows from step to step: six are compared closely, the ten of them and where they lead loosely."""
    stored = golden("trajectory")
    seed = int(stored["seed"])
    counts = torch.tensor([500, 300, 180, 108, 65, 39, 23, 14, 8, 5])
    model = filled(build_model("cifar10", "resnet32", 10)).train()
    method = arb_method(name.removeprefix("arb_"), counts, "arb") if name != "ce" else arb_method("batch", counts, "ce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    draws = StepDraws(torch.ones(()), torch.arange(16))
    losses = []
    for step in range(10):
        images = wave_images(16, 32, seed + step) * (1 + 0.1 * step)
        labels = (torch.arange(16) * (step + 3) + seed) % 10
        optimizer.zero_grad()
        output = method(model, images, labels, draws)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert_allclose(losses[:6], stored[f"{name}.losses"][:6], rtol=2e-3)
    assert_allclose(losses, stored[f"{name}.losses"], rtol=0.05, atol=0.02)
    assert_allclose(model.classifier.fc.weight.detach(), stored[f"{name}.fc_weight"], atol=0.02)


def test_no_golden_is_left_out():
    """A file that is added to the folder has to be read by a test above."""
    source = Path(__file__).read_text()
    for file in FOLDER.glob("*.npz"):
        assert f'"{file.stem}"' in source
