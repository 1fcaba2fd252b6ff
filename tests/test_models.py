"""models/__init__.py: building by name."""

import pytest
import torch

from models import BACKBONES, CIFAR_BACKBONES, build_model, find_backbone
from utils.errors import InputError


@pytest.mark.parametrize("backbone", CIFAR_BACKBONES)
@pytest.mark.parametrize("suffix", ["", "_fe"])
def test_every_cifar_backbone_with_and_without_the_suffix(backbone, suffix):
    model = build_model("cifar10", backbone + suffix, 7).eval()
    logits, features = model(torch.zeros(2, 3, 32, 32), with_features=True)
    assert logits.shape == (2, 7)
    assert features.shape == (2, 64)


def test_find_backbone_strips_the_suffix():
    assert {find_backbone(f"{name}_fe") for name in BACKBONES} == set(BACKBONES)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"'resnet33' is unknown; known are resnet20, resnet32"):
        build_model("cifar10", "resnet33", 10)
    with pytest.raises(InputError, match=r"'mnist' is unknown; known are cifar10, cifar100"):
        build_model("mnist", "resnet32", 10)
    with pytest.raises(InputError, match=r"'sine' is unknown; known are linear"):
        build_model("cifar10", "resnet32", 10, classifier="sine")


def test_cifar_models_have_no_pretrained_weights():
    with pytest.raises(InputError, match="no pretrained weights"):
        build_model("cifar10", "resnet32", 10, pretrained=True)


def test_the_same_seed_gives_the_same_weights():
    first, second = (_seeded(0), _seeded(0))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.classifier.fc.weight, _seeded(1).classifier.fc.weight)


def _seeded(seed):
    torch.manual_seed(seed)
    return build_model("cifar10", "resnet20", 10)
