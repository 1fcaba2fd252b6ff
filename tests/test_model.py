"""models/model.py: backbone and classifier as one module."""

import pytest
import torch

from models import build_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("cifar10", "resnet8", 10).eval()


def test_forward_is_features_then_classify(model):
    images = torch.randn(3, 3, 8, 8)
    logits, features = model(images, with_features=True)
    assert torch.equal(features, model.features(images))
    assert torch.equal(logits, model.classify(features))
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("classifier", ["linear", "cosine", "simplex"])
def test_features_are_what_the_classifier_s_rows_multiply(classifier):
    torch.manual_seed(0)
    model = build_model("cifar10", "resnet8", 10, classifier=classifier)
    images = torch.randn(5, 3, 8, 8)
    logits, features = model(images, with_features=True)
    bias = 0 if model.classifier.fc.bias is None else model.classifier.fc.bias
    torch.testing.assert_close(logits, features @ model.classifier.rows().T + bias)
    unit = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(features, unit) is (classifier != "linear")


@pytest.mark.parametrize("classifier", ["cosine", "simplex"])
def test_a_neck_computes_in_float32_under_autocast(classifier):
    model = build_model("cifar10", "resnet8", 10, classifier=classifier)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = model(torch.randn(4, 3, 8, 8), with_features=True)
    assert logits.dtype == features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_a_model_without_a_block_has_none_in_its_state(model):
    assert model.block is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "classifier"}
