"""Evaluation: the model's predictions against a direct computation, and what is printed and written."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from utils.errors import DivergenceError, InputError, Interrupted
from utils.evaluation import feature_batches, gather_outputs, predict
from utils.metrics import Predictions, report, shot_groups
from utils.report.text import (
    NPZ_LIMIT,
    calibration_line,
    class_table,
    details,
    group_line,
    mislas_lines,
    percent,
    save_predictions,
    table,
    write_report,
)

METRICS = {"top1": 85.25, "top5": 99.5, "many": 95.0, "medium": 86.0, "few": 74.0, "ece": 3.21}


class TinyModel(nn.Module):
    """Dropout and batch norm tell eval mode from training mode; without ``C > 5`` top-5 would always hit."""

    def __init__(self, num_classes=8):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, num_classes)
        self.norm(3 * torch.randn(64, 4) + 1)

    def forward(self, images):
        return self.fc(self.drop(self.norm(images.flatten(1))))


@pytest.fixture
def samples():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(23, 1, 2, 2, generator=draw), torch.randint(8, (23,), generator=draw)


def batches(images, targets, size=10):
    return list(zip(images.split(size), targets.split(size), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def test_predictions_agree_with_a_direct_computation(samples):
    model, (images, targets) = TinyModel(), samples
    norm = model.norm
    with torch.no_grad():
        x = images.flatten(1).double()
        x = (x - norm.running_mean.double()) / (norm.running_var.double() + norm.eps).sqrt()
        logits = x @ model.fc.weight.double().T + model.fc.bias.double()
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    result = predict(model, batches(images, targets))
    assert torch.equal(result.classes, shares.argmax(1))
    assert torch.equal(result.targets, targets)
    torch.testing.assert_close(result.confidences.double(), shares.max(1).values, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.nll.double(), -shares[range(23), targets].log(), rtol=1e-5, atol=1e-6)
    rank = (shares > shares[range(23), targets][:, None]).sum(1)
    assert torch.equal(result.top5_hits, rank < 5)
    assert 0 < int(result.top5_hits.sum()) < 23
    assert not any(field.requires_grad for field in result)


def test_a_shift_is_subtracted_from_the_logits(samples):
    model, (images, targets) = TinyModel(), samples
    shift = torch.linspace(-3, 3, 8)
    found = predict(model, batches(images, targets), shift=shift)
    with torch.no_grad():
        model.fc.bias -= shift
    expected = predict(model, batches(images, targets))
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.nll, expected.nll)
    with torch.no_grad():
        model.fc.bias += shift
    assert not torch.equal(found.classes, predict(model, batches(images, targets)).classes)


def test_the_size_of_the_batches_does_not_matter(samples):
    model = TinyModel()
    for size in (1, 23, 100):
        parts, whole = predict(model, batches(*samples, size)), predict(model, batches(*samples))
        assert torch.equal(parts.classes, whole.classes)
        torch.testing.assert_close(parts.nll, whole.nll)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was(samples, training):
    model = TinyModel().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (predict(model, batches(*samples)) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training is training
    assert model.drop.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_top_5_of_three_classes_is_always_a_hit(samples):
    images, targets = samples
    assert predict(TinyModel(num_classes=3), batches(images, targets % 3)).top5_hits.all()


def test_half_precision_logits_are_raised_first():
    logits = torch.tensor([[300.0, 299.0, 0.0]]).half()
    result = predict(nn.Identity(), [(logits, torch.tensor([2]))])
    assert result.nll.dtype == result.confidences.dtype == torch.float32
    assert float(result.nll) == pytest.approx(300 + np.log1p(np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_the_mode_is_restored(samples, bad):
    model = TinyModel().train()
    with torch.no_grad():
        model.fc.bias[3] = bad
    with pytest.raises(DivergenceError, match="not finite"):
        predict(model, batches(*samples))
    assert model.training


def test_an_empty_test_set_is_refused():
    model = TinyModel().train()
    with pytest.raises(InputError, match="empty"):
        predict(model, [])
    assert model.training


def test_a_signal_ends_the_evaluation_after_the_batch_and_leaves_the_mode(samples):
    seen = []

    class Counting(TinyModel):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    model = Counting().train()
    with pytest.raises(Interrupted) as stop:
        predict(model, batches(*samples), signal=lambda: 10 * (len(seen) == 2))
    assert (stop.value.number, len(seen), model.training) == (10, 2, True)


# ---------------------------------------------------------------------------------------------------------------------
# Features


class TinyFeatures(TinyModel):
    """The same, in the manner of the project's models."""

    def forward(self, images, with_features=False):
        features = self.drop(self.norm(images.flatten(1)))
        return (self.fc(features), features) if with_features else self.fc(features)


@pytest.mark.parametrize("training", [True, False])
def test_features_and_logits_come_batch_by_batch_in_eval_mode(samples, training):
    model, (images, targets) = TinyFeatures().train(training), samples
    with torch.no_grad():
        expected = TinyFeatures().eval()(images, with_features=True)
    found = list(feature_batches(model, batches(images, targets)))
    assert [len(part[0]) for part in found] == [10, 10, 3]
    features, logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close((logits, features), expected)
    assert torch.equal(labels, targets)
    assert torch.equal(logits.argmax(1), predict(model, batches(images, targets)).classes)
    assert not logits.requires_grad
    assert model.training is training
    assert model.drop.training is training


def test_the_mode_is_restored_and_gradients_return_where_somebody_stops_early_or_fails(samples):
    model = TinyFeatures().train()
    stopped = feature_batches(model, batches(*samples))
    next(stopped)
    assert not model.training
    assert torch.is_grad_enabled()
    stopped.close()
    assert model.training
    with pytest.raises(RuntimeError):
        list(feature_batches(model, [(torch.zeros(2, 7), torch.zeros(2))]))
    assert model.training


@pytest.mark.parametrize(("precision", "kept"), [("fp32", torch.float64), ("bf16", torch.float32)])
def test_half_precision_is_raised_and_float64_stays(samples, precision, kept):
    class Halved(TinyFeatures):
        def forward(self, images, with_features):
            logits, features = super().forward(images, with_features)
            return (logits.bfloat16(), features.bfloat16()) if precision == "bf16" else (logits, features)

    model = Halved().double() if precision == "fp32" else Halved()
    batch = (samples[0].double() if precision == "fp32" else samples[0], samples[1])
    ((features, logits, _),) = feature_batches(model, [batch], precision)
    assert features.dtype == logits.dtype == kept


def test_outputs_are_whole_and_their_logits_may_be_left_behind(samples):
    model = TinyFeatures()
    whole = gather_outputs(model, batches(*samples))
    features, logits, _ = next(feature_batches(model, [samples]))
    torch.testing.assert_close((whole.features, whole.logits), (features, logits))
    assert torch.equal(whole.targets, samples[1])
    without = gather_outputs(model, batches(*samples), with_logits=False)
    assert torch.equal(without.features, whole.features)
    assert without.logits is None


def test_features_that_are_not_finite_are_an_error(samples):
    images = samples[0].clone()
    images[7] = torch.inf
    with pytest.raises(DivergenceError, match="features or logits are not finite"):
        gather_outputs(TinyFeatures(), batches(images, samples[1]), with_logits=False)


# ---------------------------------------------------------------------------------------------------------------------
# On paper


def test_the_two_lines_that_scripts_of_the_field_parse():
    assert mislas_lines(METRICS) == (
        "* Acc@1 85.250% Acc@5 99.500% HAcc 95.000% MAcc 86.000% TAcc 74.000%.",
        "* ECE   3.210%.",
    )


def test_an_empty_group_is_a_dash():
    some = {key: value for key, value in METRICS.items() if key not in ("many", "few")}
    assert mislas_lines(some)[0] == "* Acc@1 85.250% Acc@5 99.500% HAcc - MAcc 86.000% TAcc -."
    assert table({"x": some}).splitlines()[1] == "x    85.25        -    86.00        -     3.21"


def test_percent_rounds_and_knows_zero_from_nothing():
    assert [percent(v) for v in (0.0, 12.345678, None)] == ["0.00", "12.35", "-"]
    assert percent(1.23456, 3) == "1.235"


def test_the_table_is_aligned_under_its_head():
    text = table({"last epoch": METRICS, "best": {"top1": 100.0}})
    assert text.splitlines() == [
        "              top-1     many   medium      few      ECE",
        "last epoch    85.25    95.00    86.00    74.00     3.21",
        "best         100.00        -        -        -        -",
    ]


def test_a_table_without_calibration_has_no_column_for_it():
    text = table({"x": {"top1": 50.0, "few": 25.0}})
    assert text.splitlines() == ["     top-1     many   medium      few", "x    50.00        -        -    25.00"]


def test_calibration_per_group_in_words():
    errors = {"index": {"many": 4.1, "medium": 7.254}, "count": {"few": 0.0}}
    assert calibration_line(errors) == (
        "ECE by index: many 4.10, medium 7.25, few -; ECE by count: many -, medium -, few 0.00"
    )


def test_macro_accuracy_is_shown_where_it_differs():
    metrics = METRICS | {"macro": 80.0, "worst_class": 4, "worst_class_top1": 31.0, "nll": 1.5, "mce": 20.0}
    metrics["samples"] = 77
    assert details(metrics) == (
        "top-5 99.50, macro top-1 80.00, worst class 4 (31.00), NLL 1.5000, MCE 20.00; 77 images"
    )
    assert "macro" not in details(metrics | {"macro": 85.25})


def test_group_sizes_in_words():
    sizes = {"index": {"many": 3, "medium": 4, "few": 3}, "count": {"many": 0, "medium": 10, "few": 0}}
    assert group_line(sizes) == (
        "classes by index: many 3, medium 4, few 3; classes by count: many 0, medium 10, few 0"
    )


# ---------------------------------------------------------------------------------------------------------------------
# On disk

COUNTS = torch.tensor([120, 30, 0])
NAMES = ["cat, wild", "Hündin", "yak"]
PREDICTIONS = Predictions(
    classes=torch.tensor([0, 1, 0, 1, 0]),
    confidences=torch.tensor([0.5, 0.75, 1.0, 0.25, 0.125]),
    top5_hits=torch.tensor([True, True, True, False, True]),
    nll=torch.ones(5),
    targets=torch.tensor([0, 0, 0, 1, 1]),
)


def test_the_class_table_has_a_dash_for_a_class_without_test_images():
    assert class_table(PREDICTIONS, COUNTS, NAMES).splitlines() == [
        "class           train    test    top-1",
        "  0 cat, wild     120       3    66.67",
        "  1 Hündin         30       2    50.00",
        "  2 yak             0       0        -",
    ]
    assert class_table(PREDICTIONS, COUNTS, NAMES, most=2) == "3 classes: accuracy per class is in per_class.csv"


def test_the_report_on_disk(tmp_path):
    metrics = report(PREDICTIONS, COUNTS, shot_groups(None, None, COUNTS))
    folder = tmp_path / "eval" / "model_best"
    for _ in range(2):  # a second report replaces the first
        write_report(folder, metrics, PREDICTIONS, COUNTS, NAMES)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "per_class.csv"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    with (folder / "per_class.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "name", "train_images", "test_images", "top1_percent"],
            ["0", "cat, wild", "120", "3", "66.6667"],
            ["1", "Hündin", "30", "2", "50.0000"],
            ["2", "yak", "0", "0", ""],
        ]


def test_predictions_are_kept_per_epoch_and_targets_once(tmp_path):
    folder = tmp_path / "predictions"
    save_predictions(folder, 0, PREDICTIONS)
    written = (folder / "targets.npz").stat()
    save_predictions(folder, 12, PREDICTIONS._replace(classes=torch.tensor([364, 1, 0, 1, 0])))
    assert sorted(path.name for path in folder.iterdir()) == ["0.npz", "12.npz", "targets.npz"]
    assert (folder / "targets.npz").stat() == written
    with np.load(folder / "12.npz") as kept, np.load(folder / "targets.npz") as truth:
        assert (kept["classes"].dtype, kept["confidences"].dtype) == (np.int16, np.float32)
        assert kept["classes"].tolist() == [364, 1, 0, 1, 0]
        assert kept["confidences"].tolist() == PREDICTIONS.confidences.tolist()
        assert kept["top5_hits"].tolist() == PREDICTIONS.top5_hits.tolist()
        assert truth["targets"].tolist() == PREDICTIONS.targets.tolist()


@pytest.mark.parametrize(("size", "kept"), [(NPZ_LIMIT, True), (NPZ_LIMIT + 1, False)])
def test_predictions_of_very_large_test_sets_are_not_kept(tmp_path, size, kept):
    save_predictions(tmp_path / "predictions", 0, PREDICTIONS.select(torch.zeros(size, dtype=torch.long)))
    assert (tmp_path / "predictions").exists() is kept
