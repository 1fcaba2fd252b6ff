"""Backbone and classifier as one module."""

from torch import Tensor, nn


class Model(nn.Module):
    """Images [B, 3, H, W] -> features [B, D] -> logits [B, C].

    Training calls ``forward`` only: a parallel wrapper synchronises gradients there and nowhere else.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.block: nn.Module | None = None  # PlacesModel has one

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features)

    def forward(self, images: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, features)."""
        features = self.features(images)
        logits = self.classify(features)
        return (logits, features) if with_features else logits
