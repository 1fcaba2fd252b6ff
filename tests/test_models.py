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
    assert features.shape == (2, 128 if backbone.endswith("x2") else 64)


def test_every_classifier_by_name():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for name, scale in (("linear", 30.0), ("cosine", 16.0), ("simplex", 30.0)):
        model = build_model("cifar10", "resnet20", 10, classifier=name, cosine_scale=scale)
        logits, features = model(images, with_features=True)
        assert type(model.classifier).__name__.lower().startswith(name)
        bias = 0 if model.classifier.fc.bias is None else model.classifier.fc.bias
        torch.testing.assert_close(logits, features @ model.classifier.rows().T + bias)
    model = build_model("cifar10", "resnet20", 10, classifier="cosine", cosine_scale=16.0)
    torch.testing.assert_close(model.classifier.rows().norm(dim=1), torch.full((10,), 16.0))


def test_a_simplex_of_more_classes_than_features_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"100 classes .* has 64 features \(resnet32x2 has 128\)"):
        build_model("cifar100", "resnet32", 100, classifier="simplex")
    assert build_model("cifar100", "resnet32x2", 100, classifier="simplex").classifier.fc.weight.shape == (100, 128)
    with pytest.raises(InputError, match="at least two classes"):
        build_model("cifar10", "resnet32", 1, classifier="simplex")


def test_find_backbone_strips_the_suffix():
    assert {find_backbone(f"{name}_fe") for name in BACKBONES} == set(BACKBONES)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"'resnet33' is unknown; known are resnet8, resnet20, resnet32"):
        build_model("cifar10", "resnet33", 10)
    with pytest.raises(InputError, match=r"'mnist' is unknown; known are cifar10, cifar100"):
        build_model("mnist", "resnet32", 10)
    with pytest.raises(InputError, match=r"'sine' is unknown; known are linear, cosine, simplex"):
        build_model("cifar10", "resnet32", 10, classifier="sine")


def test_cifar_models_have_no_pretrained_weights():
    with pytest.raises(InputError, match="pretrained: the CIFAR model"):
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
