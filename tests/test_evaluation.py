"""Predictions and features of a model, against a direct computation."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.errors import DivergenceError, InputError, Interrupted
from utils.evaluation import feature_batches, gather_outputs, predict


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
    shift[2] = 1000  # never predicted
    found = predict(model, batches(images, targets), shift=shift)
    assert not (found.classes == 2).any()
    with torch.no_grad():
        model.fc.bias -= shift
    expected = predict(model, batches(images, targets))
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.nll, expected.nll)


def test_predictions_do_not_depend_on_the_batch_size_and_may_be_of_three_classes(samples):
    model = TinyModel()
    whole = predict(model, batches(*samples))
    for size in (1, 100):
        parts = predict(model, batches(*samples, size))
        assert torch.equal(parts.classes, whole.classes)
        torch.testing.assert_close(parts.nll, whole.nll)
    images, targets = samples
    assert predict(TinyModel(num_classes=3), batches(images, targets % 3)).top5_hits.all()


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_used_and_the_mode_restored(samples, training):
    model = TinyModel().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (predict(model, batches(*samples)) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training is model.drop.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_logits_become_float32():
    logits = torch.tensor([[300.0, 299.0, 0.0]]).half()
    result = predict(nn.Identity(), [(logits, torch.tensor([2]))])
    assert result.nll.dtype == result.confidences.dtype == torch.float32
    assert float(result.nll) == pytest.approx(300 + np.log1p(np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_and_an_empty_test_set_are_errors_and_the_mode_is_restored(samples, bad):
    model = TinyModel().train()
    with torch.no_grad():
        model.fc.bias[3] = bad
    with pytest.raises(DivergenceError, match="not finite"):
        predict(model, batches(*samples))
    with pytest.raises(InputError, match="empty"):
        predict(model, [])
    assert model.training


def test_a_signal_stops_the_evaluation_and_the_mode_is_restored(samples):
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
    assert not logits.requires_grad
    assert model.training is model.drop.training is training


def test_mode_and_gradients_are_restored_after_an_early_stop_or_an_error(samples):
    model = TinyFeatures().train()
    stopped = feature_batches(model, batches(*samples))
    next(stopped)
    assert torch.is_grad_enabled() and not model.training
    stopped.close()
    assert model.training
    with pytest.raises(RuntimeError):
        list(feature_batches(model, [(torch.zeros(2, 7), torch.zeros(2))]))
    assert model.training


@pytest.mark.parametrize(("precision", "kept"), [("fp32", torch.float64), ("bf16", torch.float32)])
def test_half_precision_becomes_float32_and_float64_stays(samples, precision, kept):
    class Halved(TinyFeatures):
        def forward(self, images, with_features):
            logits, features = super().forward(images, with_features)
            return (logits.bfloat16(), features.bfloat16()) if precision == "bf16" else (logits, features)

    model = Halved().double() if precision == "fp32" else Halved()
    batch = (samples[0].double() if precision == "fp32" else samples[0], samples[1])
    ((features, logits, _),) = feature_batches(model, [batch], precision)
    assert features.dtype == logits.dtype == kept


def test_gathered_outputs_with_and_without_logits(samples):
    model = TinyFeatures()
    whole = gather_outputs(model, batches(*samples))
    features, logits, _ = next(feature_batches(model, [samples]))
    torch.testing.assert_close((whole.features, whole.logits), (features, logits))
    assert torch.equal(whole.targets, samples[1])
    without = gather_outputs(model, batches(*samples), with_logits=False)
    assert torch.equal(without.features, whole.features)
    assert without.logits is None


def test_non_finite_features_are_an_error(samples):
    images = samples[0].clone()
    images[7] = torch.inf
    with pytest.raises(DivergenceError, match="features or logits are not finite"):
        gather_outputs(TinyFeatures(), batches(images, samples[1]), with_logits=False)
