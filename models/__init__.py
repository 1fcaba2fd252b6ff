"""Models: CIFAR ResNets, torchvision's ResNets, and the Places arrangement of them."""

from models import resnet, resnet_cifar
from models.classifier import CLASSIFIERS
from models.model import Model
from models.places import PlacesModel
from utils.errors import InputError

# Name -> (depth, width); resnet32x2 has twice the channels of resnet32, and 128 features.
CIFAR_BACKBONES = {
    f"resnet{depth}{suffix}": (depth, width) for suffix, width in (("", 1), ("x2", 2)) for depth in resnet_cifar.DEPTHS
}
# The data sets of this project. Only places has an arrangement of its own; a name is checked against slips.
DATASETS = ("cifar10", "cifar100", "digits", "folder", "imagenet", "ina2018", "places")
BACKBONES = (*CIFAR_BACKBONES, *resnet.CONSTRUCTORS)


def find_backbone(name: str) -> str:
    """``name`` without MiSLAS's suffix ``_fe``; raises :class:`InputError` that lists the backbones there are."""
    if name.removesuffix("_fe") not in BACKBONES:
        raise InputError(f"backbone: {name!r} is unknown; known are {', '.join(BACKBONES)} (also with _fe)")
    return name.removesuffix("_fe")


def build_model(
    dataset: str,
    backbone: str,
    num_classes: int,
    pretrained: bool | str | None = None,
    classifier: str = "linear",
    cosine_scale: float = 30.0,
) -> Model:
    """A :class:`Model` with fresh weights from torch's default generator.

    ``backbone``: a name of ``BACKBONES``, with or without MiSLAS's suffix ``_fe``. ``pretrained``: None for the data
    set's habit (True for places, else False), True, False or the path of a weights file; torchvision backbones only.
    ``classifier``: a name of ``CLASSIFIERS``; ``cosine_scale``: what the cosine one multiplies cosines by. Raises
    ``ValueError`` (:class:`InputError`) that lists what is known.
    """
    name = find_backbone(backbone)
    if dataset not in DATASETS:
        raise InputError(f"dataset: {dataset!r} is unknown; known are {', '.join(DATASETS)}")
    if classifier not in CLASSIFIERS:
        raise InputError(f"classifier: {classifier!r} is unknown; known are {', '.join(CLASSIFIERS)}")
    if pretrained is None:
        pretrained = dataset == "places"
    if name in CIFAR_BACKBONES:
        if pretrained or dataset == "places":
            raise InputError(f"backbone: there are no pretrained weights for the CIFAR model {backbone!r}")
        features = resnet_cifar.build(*CIFAR_BACKBONES[name])
    else:
        features = resnet.build(name, pretrained)
    if dataset == "places" and features.out_features != 2048:
        raise InputError(f"backbone: places needs one with bottleneck blocks (resnet50, ...), not {backbone!r}")
    head = CLASSIFIERS[classifier](features.out_features, num_classes, cosine_scale)
    return (PlacesModel if dataset == "places" else Model)(features, head)
