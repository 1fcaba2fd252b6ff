"""models/classifier.py."""

import math

import torch

from models.classifier import LinearClassifier


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
