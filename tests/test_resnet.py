"""models/resnet.py: torchvision's ResNets without their classifier."""

import pytest
import torch
import torchvision

from models import build_model, resnet
from utils.errors import InputError

FEATURES = {
    "resnet10": 512,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
    "resnext50_32x4d": 2048,
    "resnext101_32x8d": 2048,
}


def test_every_constructor_is_tested():
    assert set(FEATURES) == set(resnet.CONSTRUCTORS)


@pytest.mark.parametrize("name", FEATURES)
def test_width_of_the_features(name):
    with torch.device("meta"):
        backbone = resnet.build(name, pretrained=False)
        assert backbone.out_features == FEATURES[name]
        assert backbone(torch.empty(2, 3, 64, 64)).shape == (2, FEATURES[name])


def test_features_are_those_of_torchvisions_model_before_its_classifier(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = build_model("imagenet", "resnet18", 5, pretrained=str(tmp_path / "weights.pth")).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.fc(ours.features(images)), theirs(images))


def test_a_weights_file_of_another_network_is_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights.pth: does not fit resnet18"):
        build_model("imagenet", "resnet18", 5, pretrained=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_a_missing_or_broken_weights_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"weights.pth: (no such|is no readable) weights file"):
        build_model("imagenet", "resnet18", 5, pretrained=str(tmp_path / "weights.pth"))


def test_there_are_no_published_weights_for_resnet10():
    with pytest.raises(InputError, match="no IMAGENET1K_V1 weights for resnet10"):
        build_model("imagenet", "resnet10", 5, pretrained=True)


def test_a_download_that_fails_says_what_to_fetch(monkeypatch, tmp_path):
    """A proxy that refuses every connection stands for the missing network, wherever the test runs."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot download https://\S+resnet18\S+.*give its path as pretrained"):
        build_model("imagenet", "resnet18", 5, pretrained=True)
