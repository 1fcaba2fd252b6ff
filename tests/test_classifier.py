"""models/classifier.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.classifier import CosineClassifier, LinearClassifier, SimplexClassifier, UnitLength, simplex
from utils.errors import InputError


def test_linear_classifier_is_affine_with_the_references_key_names():
    classifier = LinearClassifier(4, 3)
    features = torch.randn(5, 4)
    assert set(classifier.state_dict()) == {"fc.weight", "fc.bias"}
    torch.testing.assert_close(classifier(features), features @ classifier.fc.weight.T + classifier.fc.bias)


def test_weights_start_he_normal():
    torch.manual_seed(0)
    weight = LinearClassifier(64, 1000).fc.weight.detach()
    assert abs(float(weight.std()) / math.sqrt(2 / 64) - 1) < 0.02
    assert abs(float(weight.mean())) < 0.005


# ---------------------------------------------------------------------------------------------------------------------
# Cosine


def test_cosine_logits_are_scaled_cosines_with_the_raw_features():
    torch.manual_seed(0)
    classifier, raw = CosineClassifier(4, 3, scale=16.0).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        classifier.fc.weight.mul_(torch.tensor([[0.1], [2.0], [30.0]]))  # lengths do not matter
    logits = classifier(classifier.neck(raw))
    for h, row in zip(raw, logits, strict=True):
        for w, z in zip(classifier.fc.weight, row, strict=True):
            cosine = sum(a * b for a, b in zip(w.tolist(), h.tolist(), strict=True)) / (math.hypot(*w) * math.hypot(*h))
            assert float(z) == pytest.approx(16 * cosine, abs=1e-12)
    assert set(classifier.state_dict()) == {"fc.weight"}
    assert classifier.fc.bias is None


def test_cosine_rows_start_as_uniform_numbers_of_length_one():
    torch.manual_seed(0)
    weight = CosineClassifier(64, 2000).fc.weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(2000))
    spread = weight * math.sqrt(64 / 3)  # uniform in (-1, 1), but for the lengths, which vary little
    assert abs(float(spread.std()) * math.sqrt(3) - 1) < 0.02
    assert float(spread.abs().max()) < 1.5  # a normal draw would reach 2.6 deviations of 0.58
    assert abs(float(spread.mean())) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Simplex


@pytest.mark.parametrize(("width", "classes"), [(64, 10), (128, 100), (5, 5), (7, 2)])
def test_simplex_is_its_formula(width, classes):
    torch.manual_seed(0)
    rows = simplex(width, classes)
    torch.manual_seed(0)
    orthonormal = torch.linalg.qr(torch.randn(width, classes, dtype=torch.float64))[0]
    torch.testing.assert_close(orthonormal.T @ orthonormal, torch.eye(classes, dtype=torch.float64))
    centring = torch.eye(classes, dtype=torch.float64) - 1 / classes
    torch.testing.assert_close(rows, (math.sqrt(classes / (classes - 1)) * orthonormal @ centring).T)
    cosines = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(rows @ rows.T, cosines)


def test_the_simplex_never_trains_and_is_in_checkpoints():
    torch.manual_seed(0)
    classifier = SimplexClassifier(8, 4)
    before = classifier.fc.weight.clone()
    learning = [p for p in classifier.parameters() if p.requires_grad]
    assert len(learning) == 2  # batch norm's
    optimizer = torch.optim.SGD(learning, lr=1.0, weight_decay=0.1)
    classifier(classifier.neck(torch.randn(6, 8))).square().sum().backward()
    optimizer.step()
    assert torch.equal(classifier.fc.weight, before)
    assert set(classifier.state_dict()) >= {"fc.weight", "neck.norm.weight", "neck.norm.running_mean"}
    torch.manual_seed(1)
    other = SimplexClassifier(8, 4)
    assert not torch.equal(other.fc.weight, before)
    other.load_state_dict(classifier.state_dict())
    assert torch.equal(other.fc.weight, before)


def test_simplex_features_are_normalised_by_the_batch_then_of_length_one():
    torch.manual_seed(0)
    classifier, raw = SimplexClassifier(8, 4).double(), 3 * torch.randn(6, 8, dtype=torch.float64) + 1
    normed = (raw - raw.mean(0)) / (raw.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(classifier.neck(raw), F.normalize(normed, dim=1))


@pytest.mark.parametrize("classes", [1, 65])
def test_a_simplex_that_does_not_exist_is_refused(classes):
    with pytest.raises(InputError, match=f"simplex of {classes} classes .* 64 features .*resnet32x2 has 128"):
        SimplexClassifier(64, classes)


def test_the_length_of_nothing_is_no_division_by_zero():
    features = torch.zeros(2, 3, requires_grad=True)
    unit = UnitLength()(features)
    unit.sum().backward()
    assert (unit == 0).all()
    assert features.grad.isfinite().all()
