"""The Places protocol of MiSLAS: a frozen backbone without its last block, one new bottleneck, a classifier."""

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from models.model import Model
from models.resnet import feature_maps


class PlacesModel(Model):
    """Only ``block`` and ``classifier`` learn; the backbone stays in eval mode, batch-norm statistics included."""

    def __init__(self, backbone: ResNet, classifier):
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
