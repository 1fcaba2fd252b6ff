"""Models of timm (PyTorch Image Models, an optional package) without their classifier: ``backbone: timm:NAME``."""

import difflib
from types import ModuleType

import torch
from torch import Tensor, nn

from models.resnet import load_features, read_weights
from utils import distributed
from utils.errors import InputError

PREFIX = "timm:"


def check_name(name: str) -> None:
    """Raise :class:`InputError` if timm is not installed, or has no model ``name`` (without the prefix)."""
    timm = _timm()
    known = [*timm.list_models(), *timm.list_pretrained()]  # "resnet18", "resnet18.a1_in1k"
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; near are {', '.join(near)}" if near else ", see timm.list_models()"
        raise InputError(f"backbone: timm has no model {name!r}{hint}")


def build(name: str, pretrained: bool | str, image_size: int | None = None) -> nn.Module:
    """Build a backbone whose output is [B, ``out_features``], for images of ``image_size`` (None: its default) pixels.

    Args:
        name: Without the prefix.
        pretrained: True for timm's weights, or the path of a file that fits.

    Dropout and stochastic depth are off, since their draws would not be functions of seed and epoch.
    """
    timm = _timm()
    config = timm.get_pretrained_cfg(name)
    size = image_size or config.input_size[-1]
    options = {"num_classes": 0, **({"img_size": size} if config.fixed_input_size else {})}
    try:
        backbone = timm.create_model(name, **options).eval()
        with torch.no_grad():
            features = backbone(torch.zeros(2, 3, size, size))
    except Exception as error:  # models refuse an image size in many ways
        raise InputError(
            f"image_size: {PREFIX}{name} does not take images of {size} pixels ({_brief(error)})"
        ) from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(f"backbone: {PREFIX}{name} gives no flat features [B, D]; choose one that does")
    if pretrained is True:
        backbone = _download(timm, name, options)
    elif pretrained:
        classifiers = config.classifier if isinstance(config.classifier, tuple) else (config.classifier,)
        load_features(backbone, read_weights(pretrained), PREFIX + name, pretrained, classifiers)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    backbone.out_features = features.shape[1]
    return backbone.train()


def _download(timm: ModuleType, name: str, options: dict) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    if not config.has_weights:
        raise InputError(f"pretrained: True, but timm has no weights for {name}")
    with distributed.main_first():
        try:
            return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub's client and its connections raise many types
            raise InputError(
                f"pretrained: cannot download {config.hf_hub_id or config.url} ({_brief(error)}); fetch its weights by "
                "other means and give the file's path as pretrained"
            ) from None


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise InputError(f"backbone: {PREFIX}NAME needs timm: pip install timm") from None
    return timm


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
