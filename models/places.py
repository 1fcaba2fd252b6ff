"""The Places protocol of MiSLAS: a frozen backbone without its last block, a new bottleneck and a classifier."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from models.model import Model
from models.resnet import feature_maps
from utils.errors import InputError


class PlacesModel(Model):
    """Only ``block`` and ``classifier`` learn; the backbone stays in eval mode, batch-norm statistics included."""

    pretrained = True

    def __init__(self, backbone: nn.Module, classifier: nn.Module):
        """``backbone``: a torchvision ResNet of bottlenecks. Raises :class:`InputError` for any other."""
        if not isinstance(backbone, ResNet) or backbone.out_features != 2048:
            raise InputError(
                "backbone: places needs torchvision's with bottleneck blocks (2,048 features), such as resnet152; "
                f"this one has {backbone.out_features} features"
            )
        super().__init__(backbone, classifier)
        self.backbone.layer4 = self.backbone.layer4[:-1]
        self.backbone.requires_grad_(False)
        self.block = Bottleneck(backbone.out_features, backbone.out_features // Bottleneck.expansion)

    def pooled(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = feature_maps(self.backbone, images)  # [B, 2048, H / 32, W / 32]
        return self.block(maps).mean(dim=(2, 3))

    def train(self, mode: bool = True) -> "PlacesModel":
        super().train(mode)
        self.backbone.eval()
        return self
