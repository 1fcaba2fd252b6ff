"""Classifiers: from features [B, D] to logits [B, C].

Each has a ``neck``, applied to the backbone's output to give the model's features, and ``rows()`` [C, D] and
``fc.bias`` (None: 0), so that logits are ``features @ rows.T + bias`` for every kind. Measures of features and rows,
such as gradient components and neural collapse, therefore mean the same for all of them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.precision import at_least_float32


class LinearClassifier(nn.Module):
    """``W h + b``, with the reference's initialisation (He normal for W) and name of the layer, ``fc``."""

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        self.neck = nn.Identity()
        self.fc = nn.Linear(in_features, num_classes)
        nn.init.kaiming_normal_(self.fc.weight)

    def rows(self) -> Tensor:
        return self.fc.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


class CosineClassifier(nn.Module):
    """``scale * cos(w_k, h)``, without bias: LDAM's normalised classifier (Cao et al., NeurIPS 2019).

    The neck scales features to length 1. Weights start as LDAM's, uniform in (-1, 1), with rows scaled to length 1.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0):
        super().__init__()
        self.scale = scale
        self.neck = UnitLength()
        self.fc = nn.Linear(in_features, num_classes, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(F.normalize(self.fc.weight.uniform_(-1, 1), dim=1))

    def rows(self) -> Tensor:
        return cosine_rows(self.fc.weight, self.scale)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.rows())


def cosine_rows(weight: Tensor, scale: float) -> Tensor:
    """Rows of a cosine classifier with ``weight [C, D]``, all of length ``scale``."""
    return scale * F.normalize(weight, dim=1)


class SimplexClassifier(nn.Module):
    """A fixed simplex; only the features learn (Yang et al., NeurIPS 2022).

    The rows are the columns of ``M = sqrt(C / (C - 1)) P (I - 11'/C)``, P [D, C] with P'P = I from the QR decomposition
    of a random matrix: unit vectors with cosine -1 / (C - 1) between any two. Features: BatchNorm1d, then length 1.
    """

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        if not 2 <= num_classes <= in_features:
            raise InputError(
                f"classifier: a simplex of {num_classes} classes needs at least two classes, and as many features as "
                f"classes; this backbone has {in_features} features (resnet32x2 has 128)"
            )
        self.neck = UnitLength(nn.BatchNorm1d(in_features))
        self.fc = nn.Linear(in_features, num_classes, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.fc.weight.copy_(simplex(in_features, num_classes))

    def rows(self) -> Tensor:
        return self.fc.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


class UnitLength(nn.Module):
    """Scale features to length 1, in at least float32, after ``norm`` if there is one."""

    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            return F.normalize(features if self.norm is None else self.norm(features), dim=1)


def simplex(in_features: int, num_classes: int) -> Tensor:
    """Draw the rows of a :class:`SimplexClassifier`, float64 [C, D]."""
    orthonormal, _ = torch.linalg.qr(torch.randn(in_features, num_classes, dtype=torch.float64))  # P [D, C]
    centred = orthonormal - orthonormal.mean(dim=1, keepdim=True)  # P (I - 11'/C)
    return math.sqrt(num_classes / (num_classes - 1)) * centred.T


# Name -> classifier of (features, classes, scale of cosines).
CLASSIFIERS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "linear": lambda width, classes, scale: LinearClassifier(width, classes),
    "cosine": CosineClassifier,
    "simplex": lambda width, classes, scale: SimplexClassifier(width, classes),
}
