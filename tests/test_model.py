"""models/model.py: backbone and classifier as one module."""

import pytest
import torch

from models import build_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("cifar10", "resnet20", 10).eval()


def test_forward_is_features_then_classify(model):
    images = torch.randn(3, 3, 32, 32)
    logits, features = model(images, with_features=True)
    assert torch.equal(features, model.features(images))
    assert torch.equal(logits, model.classify(features))
    assert torch.equal(logits, model(images))


def test_a_model_without_a_block_has_none_in_its_state(model):
    assert model.block is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "classifier"}
