"""models/resnet_cifar.py: He et al.'s CIFAR ResNets."""

import math
import pickle

import pytest
import torch
from torch import nn

from models.resnet_cifar import DEPTHS, PadShortcut, build

# He et al. 2016, table 6, in millions; their figure counts the classifier (650 weights for 10 classes).
PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_are_as_published(depth):
    millions = (sum(p.numel() for p in build(depth).parameters()) + 650) / 1e6
    assert abs(millions - PARAMETERS[depth]) < (0.05 if depth == 110 else 0.01)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_network_of_twice_the_width_has_twice_the_channels_everywhere(depth):
    narrow, wide = (build(depth, width).state_dict() for width in (1, 2))
    assert narrow.keys() == wide.keys()
    for name, value in narrow.items():
        channels = [2 * n if n >= 16 else n for n in value.shape]  # all but the colours and the kernel's sides
        assert list(wide[name].shape) == channels, name
    assert build(depth, 2).out_features == 128
    assert build(depth).out_features == 64


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_counts_convolutions_and_the_classifier(depth):
    assert sum(isinstance(m, nn.Conv2d) for m in build(depth).modules()) + 1 == depth


def test_the_shortcut_takes_every_second_pixel_and_pads_channels():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    out = PadShortcut(2)(x)
    assert out.shape == (1, 4, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert (out[:, [0, 3]] == 0).all()


def test_features_follow_the_image_size():
    model = build(20).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert model(torch.zeros(2, 3, 48, 40)).shape == (2, 64)
    assert build(20, width=2).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


def test_convolutions_start_he_normal():
    torch.manual_seed(0)
    weight = build(32).layer3[1].conv1.weight.detach()  # [64, 64, 3, 3]
    assert abs(float(weight.std()) / math.sqrt(2 / (64 * 9)) - 1) < 0.02


def test_the_module_can_be_pickled():
    model = build(20).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
