"""Neural collapse: distances of features and classifier from the geometries in which training ends.

NC1-NC4 follow Papyan, Han, Donoho (PNAS 2020), the balance metrics B_L, B_A, B_D the ARB-Loss paper, SELI, the limit
of cross-entropy under imbalance, Thrampoulidis et al. (NeurIPS 2022). Standard deviations are the population's, and
everything is computed in float64.

Legend: N samples, B of them in a batch, C classes, D features; c <= C classes have samples, n_k each. mu_k is the mean
of class k, mu_G the mean of the class means, M [c, D] the centred means mu_k - mu_G, W [C, D] the classifier.

Metrics of class means are over the c classes that have samples: c replaces C in the formulas, and NC3 and the distances
take these classes' rows of W. NC2 of the classifier and the balance metrics take all rows.

Degenerate cases: a vector of length 0 has cosine 0 with all others, a Gram matrix of zeros is not normalised (its
distance to the others is 1), and a ratio with denominator 0 is infinite, such as NC1 if all class means are equal. No
scalar is NaN.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import all_reduce_sum, broadcast_buffers
from utils.errors import DivergenceError, InputError
from utils.evaluation import feature_batches, stop_on_signal
from utils.metrics import shot_accuracy

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

ROWS = 1024  # of samples or of a Gram matrix at a time
ROUNDING = 1e-12  # relative to the longest class mean; a shorter centred mean is rounding of float64 sums


def nc_metrics(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict:
    """:func:`measure` of this process's features in memory, ``features [N, D]``, ``targets`` int64 [N]."""
    return measure(lambda: [(features, targets)], weight, bias)


def collapse(
    model: nn.Module,
    batches: Collection[tuple[Tensor, Tensor]],
    groups: Mapping[str, Mapping[str, Tensor]],
    precision: str,
    signal: Callable[[], int],
) -> dict[str, float]:
    """:func:`measure` a model on images, adding the mean NC1 of each group of classes; finite numbers only.

    Args:
        model: a :class:`models.model.Model`.
        batches: (images, targets), without augmentation.
        groups: rule -> group -> mask [C], see :func:`utils.metrics.shot_groups`; the first rule counts.
        precision, signal: see :func:`utils.evaluation.predict`.
    """
    broadcast_buffers(model)
    # Features stay in host memory, since a second pass of all images through the network would take longer.
    features = [(h.cpu(), y.cpu()) for h, _, y in feature_batches(model, batches, precision, signal)]
    rows, bias = model.classifier.rows(), model.classifier.fc.bias
    measured = measure(lambda: stop_on_signal(features, signal), rows.detach(), bias)
    per_class = measured.pop("nc1_per_class")
    by_group = shot_accuracy(per_class, ~per_class.isnan(), next(iter(groups.values())))  # means over each group
    measured |= {f"nc1_{name}": value for name, value in by_group.items()}
    return {key: value for key, value in measured.items() if math.isfinite(value)}


@torch.no_grad()
def measure(batches: Batches, weight: Tensor, bias: Tensor | None = None) -> dict:
    """Compute all metrics from a stream of features.

    Args:
        batches: returns this process's (features [B, D], targets int64 [B]), possibly none. It is called twice and has
            to give the same samples, in any order and any batches, without gradients.
        weight: [C, D], the same in all processes; everything is computed on its device.
        bias: [C].

    Returns floats, and ``nc1_per_class`` float64 [C] on the CPU, NaN for classes without samples:
        nc1: tr(S_W pinv(S_B)) / c, S_W the mean of the classes' covariances; also the mean of ``nc1_per_class``.
        nc1_pooled: the same with S_W the mean over samples.
        nc2_equinorm, nc2_equiangle: of the rows of M; ``..._weights``: of W.
        nc3: || W / ||W||_F - M / ||M||_F ||_F^2.
        nc3_uncentred: mean over k of 1 - cos(w_k, mu_k), with the means as they are.
        nc4: fraction of samples for which the classifier (argmax of W h + b in float64, over all classes) and the
            nearest class mean disagree.
        b_...: see :func:`balance_metrics`.
        simplex_weights, simplex_means, seli_weights, seli_means: Frobenius distance of W W' and M M' to the simplex and
            to SELI at the counts n_k, all four of unit Frobenius norm.

    Sums are over all processes, which all return the same numbers. Raises :class:`InputError` if fewer than two classes
    have samples, :class:`DivergenceError` if features or classifier are not finite.
    """
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    counts, means = _class_means(batches, weight)
    present = counts.nonzero().squeeze(1)
    if len(present) < 2:
        raise InputError(f"{len(present)} classes have samples; neural collapse is measured between at least two")
    means = means[present]
    if not all(tensor.isfinite().all() for tensor in (means, weight, bias)):
        raise DivergenceError("the features or the classifier are not finite; neural collapse cannot be measured")
    center = means.mean(dim=0)
    centred = _without_rounding(means - center, means)
    traces, nc4 = _second_pass(batches, counts, center, centred, weight, bias)
    per_class = traces.new_full((len(weight),), math.nan)
    per_class[present] = traces / len(present)
    share = counts[present] / counts.sum()  # of the samples
    own = weight[present]
    (simplex, _), (seli_weights, seli_means) = _seli(torch.ones_like(present)), _seli(counts[present])
    return {
        "nc1": float(per_class[present].mean()),
        "nc1_pooled": float((share * per_class[present]).sum()),
        "nc1_per_class": per_class.cpu(),
        "nc2_equinorm": _equinorm(centred),
        "nc2_equiangle": _equiangle(centred),
        "nc2_equinorm_weights": _equinorm(weight),
        "nc2_equiangle_weights": _equiangle(weight),
        "nc3": float((_unit_frobenius(own) - _unit_frobenius(centred)).square().sum()),
        "nc3_uncentred": 1 - float((_unit_rows(own) * _unit_rows(means)).sum(dim=1).mean()),
        "nc4": nc4,
        **balance_metrics(weight),
        **_distances(own, {"simplex_weights": simplex, "seli_weights": seli_weights}),
        **_distances(centred, {"simplex_means": simplex, "seli_means": seli_means}),
    }


@torch.no_grad()
def balance_metrics(weight: Tensor) -> dict[str, float]:
    """Balance of the rows of ``weight [C, D]`` (ARB-Loss, Fig. 4); the ideal is 0.

    ``b_l``, ``b_a``, ``b_d``: standard deviation of the rows' lengths, and of the cosines and dot products over the
    C (C - 1) pairs. ``b_l_relative``, ``b_d_relative``: divided by the mean length and the mean squared length, so that
    the scale of ``weight`` cancels. ``..._as_printed``: the paper divides by (C - 1)^2 in mean and variance, which
    gives B_A^2 = C / (C - 1)^5 for a perfect simplex.
    """
    if len(weight) < 2:
        raise InputError("the balance metrics compare rows of the classifier, which needs at least two classes")
    weight = weight.double()
    lengths = weight.norm(dim=1)
    b_l = float(lengths.std(unbiased=False))
    b_a, b_a_as_printed = _pair_deviations(_unit_rows(weight))
    b_d, b_d_as_printed = _pair_deviations(weight)
    return {
        "b_l": b_l,
        "b_a": b_a,
        "b_d": b_d,
        "b_l_relative": _ratio(b_l, float(lengths.mean())),
        "b_d_relative": _ratio(b_d, float(lengths.square().mean())),
        "b_a_as_printed": b_a_as_printed,
        "b_d_as_printed": b_d_as_printed,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Two passes over the samples


def _chunks(batches: Batches, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for features, targets in batches():
        for part, labels in zip(features.split(ROWS), targets.split(ROWS), strict=True):
            yield part.to(device, torch.float64), labels.to(device)


def _class_means(batches: Batches, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Samples per class int64 [C] and their means [C, D] (0 without samples), over all processes."""
    counts, sums = class_sums(batches, weight)
    all_reduce_sum(counts)
    all_reduce_sum(sums)
    return counts, sums.div_(counts.clamp(min=1)[:, None])


def class_sums(batches: Batches, like: Tensor) -> tuple[Tensor, Tensor]:
    """This process's samples per class, int64 [C], and the sums of their features, a float64 tensor like ``like``."""
    counts = torch.zeros(len(like), dtype=torch.int64, device=like.device)
    sums = torch.zeros_like(like, dtype=torch.float64)
    for features, targets in _chunks(batches, like.device):
        counts += targets.bincount(minlength=len(like))
        sums.index_add_(0, targets, features)
    return counts, sums


def _second_pass(
    batches: Batches, counts: Tensor, center: Tensor, centred: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, float]:
    """tr(S_k pinv(S_B)) of the classes with samples [c], S_k the covariance of class k; and NC4."""
    present = counts.nonzero().squeeze(1)
    row_of = (counts > 0).cumsum(0) - 1  # class -> its row in ``centred``
    root = _root_of_pinv(centred)
    half_squares = centred.square().sum(dim=1) / 2
    traces, seen, differ = torch.zeros_like(half_squares), torch.zeros_like(counts), torch.zeros_like(counts[:1])
    for features, targets in _chunks(batches, weight.device):
        seen += targets.bincount(minlength=len(weight))
        decided = (features @ weight.T + bias).argmax(dim=1)
        features = features - center
        nearest = (features @ centred.T - half_squares).argmax(dim=1)  # ||h - mu_k||^2 but for ||h||^2
        differ += (decided != present[nearest]).sum()
        rows = row_of[targets]
        traces.index_add_(0, rows, ((features - centred[rows]) @ root).square().sum(dim=1))
    for total in (traces, seen, differ):
        all_reduce_sum(total)
    if not torch.equal(seen, counts):
        raise ValueError("the second call of batches() gave other samples than the first")
    traces /= counts[present]
    if not root.shape[1]:
        traces.fill_(math.inf)
    return traces, int(differ) / int(counts.sum())


def _without_rounding(centred: Tensor, means: Tensor) -> Tensor:
    """``centred``, with means that differ from the overall one by rounding alone set to 0."""
    floor = ROUNDING * means.norm(dim=1).max()
    return torch.where(centred.norm(dim=1, keepdim=True) > floor, centred, 0.0)


def _root_of_pinv(centred: Tensor) -> Tensor:
    """P [D, r] with P P' = pinv(S_B), S_B = M' M / c; r <= min(c - 1, D) is the rank.

    Computed from the smaller of M' M and M M', whose nonzero eigenvalues are the same.
    """
    classes, width = centred.shape
    tall = classes > width
    values, vectors = torch.linalg.eigh((centred.T @ centred if tall else centred @ centred.T) / classes)
    floor = torch.finfo(torch.float64).eps * max(classes, width) * values[-1]
    kept = (values > floor) & (torch.arange(len(values), 0, -1, device=values.device) <= classes - 1)
    values, vectors = values[kept], vectors[:, kept]
    return vectors / values.sqrt() if tall else centred.T @ vectors / (values * math.sqrt(classes))


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and angles


def _equinorm(vectors: Tensor) -> float:
    lengths = vectors.norm(dim=1)
    return _ratio(float(lengths.std(unbiased=False)), float(lengths.mean()))


def _equiangle(vectors: Tensor) -> float:
    """Mean absolute difference of the cosines between ``vectors`` from those of a simplex."""
    ideal = -1 / (len(vectors) - 1)
    return _pair_mean(_unit_rows(vectors), lambda cosines: (cosines - ideal).abs())


def _pair_deviations(vectors: Tensor) -> tuple[float, float]:
    """Standard deviation of the dot products over all pairs, and the same as the paper prints it."""
    number = len(vectors)
    mean = float(vectors.sum(dim=0).square().sum() - vectors.square().sum()) / (number * (number - 1))
    variance = _pair_mean(vectors, lambda products: (products - mean).square())
    # The printed mean is number / (number - 1) times the mean, and misses it by mean / (number - 1).
    printed = number / (number - 1) * (variance + (mean / (number - 1)) ** 2)
    return math.sqrt(variance), math.sqrt(printed)


def _pair_mean(vectors: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    """Mean over all pairs of ``function`` of their dot products."""
    number = len(vectors)
    total = 0.0
    for start in range(0, number, ROWS):
        products = vectors[start : start + ROWS] @ vectors[start:].T
        total += 2 * float(function(products).triu_(1).sum())
    return total / (number * (number - 1))


def _unit_rows(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1, eps=torch.finfo(torch.float64).tiny)


def _unit_frobenius(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm().clamp(min=torch.finfo(torch.float64).tiny)


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale > 0 else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Simplex and SELI


class _Geometry(NamedTuple):
    """A Gram matrix [c, c] that depends on the classes' counts alone; K different counts.

    Entry (i, j) is ``block[group[i], group[j]]``, plus ``diagonal[group[i]]`` if i = j.
    """

    group: Tensor  # int64 [c], in 0..K-1
    block: Tensor  # [K, K]
    diagonal: Tensor  # [K]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the columns from ``start`` on."""
        rows = self.group[start:stop]
        part = self.block[rows][:, self.group[start:]]
        part.diagonal().add_(self.diagonal[rows])
        return part


def seli_grams(class_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of SELI's classifier and class means at ``class_counts [C]``, float64 [C, C], unit Frobenius norm.

    W W' ~ (A D A)^(1/2) and M M' ~ D^(-1/2) (D^(1/2) A D^(1/2))^(1/2) D^(-1/2), A = I - 11'/C, D = diag(n)
    (Thrampoulidis et al., NeurIPS 2022). Equal counts give the simplex, (I - 11'/C) / sqrt(C - 1). Raises
    :class:`InputError` for a count of 0, and for a single class.
    """
    if len(class_counts) < 2 or not (class_counts > 0).all():
        raise InputError("SELI's Gram matrices need two classes, and at least one sample of each")
    weights, means = (geometry.rows(0, len(class_counts)) for geometry in _seli(class_counts))
    return weights, means


def _seli(class_counts: Tensor) -> tuple[_Geometry, _Geometry]:
    """SELI's Gram matrices of the classifier and the class means.

    Both follow exactly from a matrix of size K, the number of different counts, where m_k classes share n_k. On vectors
    that are constant within groups of equal counts, in the basis 1_group / sqrt(m_k), A is I - u u' with
    u_k = sqrt(m_k / C). On vectors that sum to 0 within a group it is I, and the Gram matrices are sqrt(n_k) and
    1 / sqrt(n_k). With A = A^2 and A D^(1/2) = U S V', the two roots are U S U' and V S V', which avoids square roots
    of eigenvalues that are 0 but for rounding.
    """
    n, group, sizes = class_counts.double().unique(return_inverse=True, return_counts=True)
    sizes = sizes.double()
    u = (sizes / len(class_counts)).sqrt()
    projection = torch.eye(len(n), dtype=n.dtype, device=n.device) - torch.outer(u, u)
    left, values, right = torch.linalg.svd(projection * n.sqrt())
    of_weights = left * values @ left.T
    of_means = right.T * values @ right / torch.outer(n, n).sqrt()
    return _geometry(group, sizes, of_weights, n.sqrt()), _geometry(group, sizes, of_means, n.rsqrt())


def _geometry(group: Tensor, sizes: Tensor, between: Tensor, within: Tensor) -> _Geometry:
    """Of unit Frobenius norm, from ``between [K, K]`` in the groups' basis and the eigenvalues ``within [K]``."""
    norm = (between.square().sum() + ((sizes - 1) * within.square()).sum()).sqrt()
    block = between / torch.outer(sizes, sizes).sqrt() - torch.diag(within / sizes)
    return _Geometry(group, block / norm, within / norm)


def _distances(vectors: Tensor, geometries: Mapping[str, _Geometry]) -> dict[str, float]:
    """Frobenius distances from the Gram matrix of ``vectors [c, D]``, scaled to unit norm, to ``geometries``."""
    tall = len(vectors) > vectors.shape[1]
    norm = (vectors.T @ vectors if tall else vectors @ vectors.T).norm()  # equal for both
    vectors = vectors / norm.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    squares = dict.fromkeys(geometries, 0.0)
    for start in range(0, len(vectors), ROWS):
        products = vectors[start : start + ROWS] @ vectors[start:].T
        for name, geometry in geometries.items():
            part = (products - geometry.rows(start, start + ROWS)).square_()
            squares[name] += float(part.diagonal().sum() + 2 * part.triu_(1).sum())
    return {name: math.sqrt(square) for name, square in squares.items()}
