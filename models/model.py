"""Backbone and classifier as one module."""

import torch
from torch import Tensor, nn

from utils.precision import at_least_float32


class Model(nn.Module):
    """Images [B, 3, H, W] -> features [B, D] -> logits [B, C].

    Features are what the classifier's rows multiply: the backbone's pooled output, after the classifier's ``neck``.
    Training calls ``forward`` only, since that is where DDP synchronises gradients.
    """

    pretrained = False  # whether the backbone's weights are pretrained by default

    def __init__(self, backbone: nn.Module, classifier: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.block: nn.Module | None = None  # of PlacesModel

    def features(self, images: Tensor) -> Tensor:
        return self.classifier.neck(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """Pooled output of the convolutions, [B, D]."""
        return self.backbone(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, C], in at least float32: in half precision many of thousands of classes would be equal."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(at_least_float32(features))

    def forward(self, images: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features)."""
        features = self.features(images)
        logits = self.classify(features)
        return (logits, features) if with_features else logits
