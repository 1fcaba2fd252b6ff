"""Space alignment: turn the classifier's rows towards the class means of the features (Wang et al., AAAI 2026).

After the authors' code. Legend: C classes, D features, x^ = x / ||x||; w the classifier's row of a class, m the mean of
its features. Rows of classes not ``seen`` (bool [C]) are returned as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 0.95  # rows with a larger cosine are not turned


def project(gradient: Tensor, rows: Tensor, means: Tensor, seen: Tensor, gamma: float) -> Tensor:
    """Drop the part of ``gradient [C, D]`` that would turn ``rows [C, D]`` away from the centred ``means [C, D]``.

    With t the part of the gradient orthogonal to w, and d the unit vector from w^ towards m^ on the sphere: t loses
    (t . d) d if t . d > 0, and the result is (1 - gamma) t + gamma gradient. A factor above 0 on the gradient comes out
    of it.
    """
    unit, _, towards = _angles(rows, means)
    tangent = gradient - _dot(gradient, unit) * unit
    tangent = tangent - _dot(tangent, towards).clamp(min=0) * towards
    return torch.where(seen[:, None], (1 - gamma) * tangent + gamma * gradient, gradient)


def slerp_rows(rows: Tensor, means: Tensor, seen: Tensor, amount: Tensor | float) -> Tensor:
    """``||w|| slerp(w^, m^; amount)``: turn ``rows [C, D]`` by this fraction of their angle to ``means [C, D]``.

    The means are not centred. Rows whose cosine is above 0.95 already stay.
    """
    unit, cosines, towards = _angles(rows, means)
    angles = amount * cosines.clamp(-1, 1).arccos()
    turned = rows.norm(dim=1, keepdim=True) * (angles.cos() * unit + angles.sin() * towards)
    return torch.where(seen[:, None] & (cosines <= ALIGNED), turned, rows)


def slerp_amount(epoch: int, step: float, num_epochs: int) -> float:
    """``step / 2 (1 - cos(pi epoch / num_epochs))``."""
    return step / 2 * (1 - math.cos(math.pi * epoch / num_epochs))


def _angles(rows: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w^ [C, D], the cosine between w and m [C, 1], and the unit vector orthogonal to w in which m lies [C, D]."""
    unit, goal = F.normalize(rows, dim=1), F.normalize(means, dim=1)
    cosines = _dot(unit, goal)
    return unit, cosines, F.normalize(goal - cosines * unit, dim=1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=1, keepdim=True)
