"""torchvision's ResNets and ResNeXts without their classifier."""

import importlib
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from utils import distributed
from utils.errors import InputError

# resnet10, usual for ImageNet-LT, has no constructor in torchvision.
CONSTRUCTORS = {
    "resnet10": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
    **{
        name: torchvision.models.get_model_builder(name)
        for name in [
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x8d",
        ]
    },
}


def build(name: str, pretrained: bool | str) -> ResNet:
    """Build the backbone ``name``; ``pretrained``: True for torchvision's IMAGENET1K_V1 weights, or a file's path."""
    backbone = CONSTRUCTORS[name]()
    if pretrained:
        _load_pretrained(backbone, name, pretrained)
    backbone.out_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone


def feature_maps(backbone: ResNet, images: Tensor) -> Tensor:
    """Output of the last stage, before pooling, [B, D, H / 32, W / 32]."""
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
    return backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x))))


def _load_pretrained(backbone: ResNet, name: str, pretrained: bool | str) -> None:
    state = _download(name) if pretrained is True else read_weights(pretrained)
    load_features(backbone, state, name, pretrained, ["fc"])


def read_weights(path: str) -> dict:
    """Read a file of weights by name, of PyTorch or ``.safetensors``, without running code that it may carry."""
    if not os.path.isfile(path):
        raise InputError(f"pretrained: {path}: no such weights file")
    try:
        if path.endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a plain pickle, which is an error as well
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(key, str) for key in state):
            raise TypeError("a weight's name is not a string")
    except Exception as error:  # torch and pickle raise many types for a damaged file
        raise InputError(f"pretrained: {path}: is no readable weights file ({type(error).__name__})") from None
    return state


def load_features(
    backbone: nn.Module, state: Mapping, name: str, pretrained: bool | str, classifiers: Sequence[str]
) -> None:
    """Load all weights but those of ``classifiers``, names of modules, which may have any number of classes."""
    unused = tuple(f"{classifier}." for classifier in classifiers)
    stripped = {key.removeprefix("module."): value for key, value in state.items()}
    features = {key: value for key, value in stripped.items() if not key.startswith(unused)}
    try:
        problems = backbone.load_state_dict(features, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"pretrained: {pretrained}: does not fit {name}: {' '.join(str(error).split())[:160]}"
        ) from None
    missing = [key for key in problems.missing_keys if not key.startswith(unused)]
    if missing or problems.unexpected_keys:
        raise InputError(f"pretrained: {pretrained}: does not fit {name}: {(missing + problems.unexpected_keys)[0]}")


def _download(name: str) -> dict:
    try:
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        raise InputError(f"pretrained: True, but torchvision has no IMAGENET1K_V1 weights for {name}") from None
    with distributed.main_first():
        try:
            return weights.get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"pretrained: cannot download {weights.url} ({' '.join(str(error).split())}); "
                "fetch that file by other means and give its path as pretrained"
            ) from None
