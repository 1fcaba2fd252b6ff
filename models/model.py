"""Backbone and classifier as one module."""

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """Images [B, 3, H, W] -> features [B, D] -> logits [B, C].

    Features are what the classifier's rows multiply: its ``neck`` is applied to what comes out of the backbone.
    Training calls ``forward`` only: a parallel wrapper synchronises gradients there and nowhere else.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.block: nn.Module | None = None  # PlacesModel has one

    def features(self, images: Tensor) -> Tensor:
        return self.classifier.neck(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """What the convolutions make of the images, [B, D]."""
        return self.backbone(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits, never in half precision, whose few digits would make thousands of classes equal."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float() if features.dtype in (torch.float16, torch.bfloat16) else features)

    def forward(self, images: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, features)."""
        features = self.features(images)
        logits = self.classify(features)
        return (logits, features) if with_features else logits
