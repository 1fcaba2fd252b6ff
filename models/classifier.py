"""Classifiers: from features [B, D] to logits [B, C]."""

from torch import Tensor, nn


class LinearClassifier(nn.Module):
    """``W h + b`` with the reference's initialisation (He normal for W); its checkpoints call the layer ``fc``."""

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(in_features, num_classes)
        nn.init.kaiming_normal_(self.fc.weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


CLASSIFIERS = {"linear": LinearClassifier}
