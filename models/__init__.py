"""Models: CIFAR ResNets, torchvision's ResNets, timm's models, and the Places protocol's arrangement of them."""

from models import resnet, resnet_cifar, timm_backbone
from models.classifier import CLASSIFIERS
from models.model import Model
from models.places import PlacesModel
from utils.errors import InputError

# Name -> (depth, width); resnet32x2 has twice the channels of resnet32, and 128 features.
CIFAR_BACKBONES = {
    f"resnet{depth}{suffix}": (depth, width) for suffix, width in (("", 1), ("x2", 2)) for depth in resnet_cifar.DEPTHS
}
BACKBONES = (*CIFAR_BACKBONES, *resnet.CONSTRUCTORS)
# Data set -> arrangement of backbone and classifier.
MODELS = dict.fromkeys(("cifar10", "cifar100", "digits", "folder", "lists", "imagenet", "ina2018"), Model) | {
    "places": PlacesModel
}


def find_backbone(name: str) -> str:
    """Strip MiSLAS's suffix ``_fe``. Raises :class:`InputError`, listing the known names, for other backbones."""
    if name.startswith(timm_backbone.PREFIX):
        timm_backbone.check_name(name.removeprefix(timm_backbone.PREFIX))
        return name
    if name.removesuffix("_fe") not in BACKBONES:
        raise InputError(f"backbone: {name!r} is unknown; known are {', '.join(BACKBONES)} (also with _fe), timm:NAME")
    return name.removesuffix("_fe")


def build_model(
    dataset: str,
    backbone: str,
    num_classes: int,
    pretrained: bool | str | None = None,
    classifier: str = "linear",
    cosine_scale: float = 30.0,
    image_size: int | None = None,
) -> Model:
    """Build a :class:`Model` with fresh weights from torch's default generator.

    Args:
        dataset: a name of ``MODELS``.
        backbone: a name of ``BACKBONES``, with or without MiSLAS's suffix ``_fe``, or ``timm:NAME``.
        num_classes: C.
        pretrained: True for torchvision's or timm's weights, the path of a weights file, or False; not for CIFAR
            ResNets. None: True for places, False for all others.
        classifier: a name of ``CLASSIFIERS``.
        cosine_scale: factor of a cosine classifier's cosines.
        image_size: pixels per side, for timm's models; None: what they were made for.

    Raises :class:`InputError`, a ``ValueError``, which lists the known names.
    """
    name = find_backbone(backbone)
    for option, value, known in (("dataset", dataset, MODELS), ("classifier", classifier, CLASSIFIERS)):
        if value not in known:
            raise InputError(f"{option}: {value!r} is unknown; known are {', '.join(known)}")
    arrangement = MODELS[dataset]
    if pretrained is None:
        pretrained = arrangement.pretrained
    if name.startswith(timm_backbone.PREFIX):
        features = timm_backbone.build(name.removeprefix(timm_backbone.PREFIX), pretrained, image_size)
    elif name in CIFAR_BACKBONES:
        if pretrained:
            raise InputError(
                f"pretrained: the CIFAR model {backbone!r} has no weights; use False, or a torchvision backbone"
            )
        features = resnet_cifar.build(*CIFAR_BACKBONES[name])
    else:
        features = resnet.build(name, pretrained)
    return arrangement(features, CLASSIFIERS[classifier](features.out_features, num_classes, cosine_scale))
