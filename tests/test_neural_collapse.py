"""Neural collapse on geometries whose numbers are known, against a dense reference, in batches and in two processes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import neural_collapse
from methods.neural_collapse import balance_metrics, measure, nc_metrics, seli_grams
from tests.conftest import in_ranks
from utils import distributed
from utils.errors import DivergenceError, InputError

STEP = [40, 40, 40, 4, 4, 4]
EXPONENTIAL = [50, 27, 15, 8, 4, 2]
SCALARS = {
    *("nc1", "nc1_pooled", "nc2_equinorm", "nc2_equiangle", "nc2_equinorm_weights", "nc2_equiangle_weights"),
    *("nc3", "nc3_uncentred", "nc4", "b_l", "b_a", "b_d", "b_l_relative", "b_d_relative"),
    *("b_a_as_printed", "b_d_as_printed"),
    *("simplex_weights", "simplex_means", "seli_weights", "seli_means"),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=0):
    return torch.linalg.qr(draw(width, width, seed=seed)).Q


def labels(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def simplex_vertices(classes, width):
    """[C, D] in a random position; D >= C - 1."""
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    vertices = torch.linalg.svd(centred).U[:, : classes - 1]  # their Gram matrix is ``centred``
    return torch.nn.functional.pad(vertices, (0, width - classes + 1)) @ rotation(width)


def noisy(counts, width=7, spread=0.6, seed=1):
    """Features, targets in random order, a classifier and its bias."""
    targets = labels(counts)[torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))]
    means = draw(len(counts), width, seed=seed)
    features = means[targets] + spread * draw(len(targets), width, seed=seed + 1)
    return features, targets, means + 0.5 * draw(len(counts), width, seed=seed + 2), draw(len(counts), seed=seed + 3)


def assert_same(found, expected, rtol=1e-9, leave=()):
    assert found.keys() == expected.keys() == SCALARS | {"nc1_per_class"}
    for key in sorted(found.keys() - set(leave)):
        np.testing.assert_allclose(found[key], expected[key], rtol=rtol, atol=1e-12, err_msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# A dense reference, for every class present


def gram_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def dense_seli(n):
    centring, d = np.eye(len(n)) - 1 / len(n), np.diag(np.asarray(n, dtype=float))
    weights = gram_root(centring @ d @ centring)
    half = 1 / np.sqrt(np.diag(d))
    means = np.outer(half, half) * gram_root(np.sqrt(d) @ centring @ np.sqrt(d))
    return [gram / np.linalg.norm(gram) for gram in (weights, means)]


def pairs(vectors):
    return np.array([a @ b for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j])


def units(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reference_balance(w):
    c, lengths, found = len(w), np.linalg.norm(w, axis=1), {"b_l": np.linalg.norm(w, axis=1).std()}
    for key, values in (("b_a", pairs(units(w))), ("b_d", pairs(w))):
        found[key] = values.std()
        printed_mean = values.sum() / (c - 1) ** 2
        found[f"{key}_as_printed"] = np.sqrt(((values - printed_mean) ** 2).sum() / (c - 1) ** 2)
    relative = {"b_l_relative": found["b_l"] / lengths.mean(), "b_d_relative": found["b_d"] / (lengths**2).mean()}
    return found | relative


def reference(features, targets, weight, bias):
    h, y, w, b = (np.asarray(tensor) for tensor in (features, targets, weight, bias))
    c = len(w)
    means = np.stack([h[y == k].mean(axis=0) for k in range(c)])
    m = means - means.mean(axis=0)
    inverse = np.linalg.pinv(m.T @ m / c, rcond=1e-10, hermitian=True)
    within = [np.trace(np.cov(h[y == k].T, bias=True) @ inverse) / c for k in range(c)]
    nearest = [np.linalg.norm(means - row, axis=1).argmin() for row in h]
    found = {
        "nc1_per_class": np.array(within),
        "nc1": np.mean(within),
        "nc1_pooled": np.mean([within[k] for k in y]),
        "nc3": np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m)) ** 2,
        "nc3_uncentred": np.mean([1 - a @ b for a, b in zip(units(w), units(means), strict=True)]),
        "nc4": np.mean((h @ w.T + b).argmax(axis=1) != nearest),
    }
    seli = dense_seli(np.bincount(y))
    simplex = (np.eye(c) - 1 / c) / np.sqrt(c - 1)
    for vectors, ending, nc2, target in ((m, "means", "", seli[1]), (w, "weights", "_weights", seli[0])):
        lengths, gram = np.linalg.norm(vectors, axis=1), vectors @ vectors.T / np.linalg.norm(vectors @ vectors.T)
        found[f"nc2_equinorm{nc2}"] = lengths.std() / lengths.mean()
        found[f"nc2_equiangle{nc2}"] = np.abs(pairs(units(vectors)) + 1 / (c - 1)).mean()
        found[f"simplex_{ending}"] = np.linalg.norm(gram - simplex)
        found[f"seli_{ending}"] = np.linalg.norm(gram - target)
    return found | reference_balance(w)


@pytest.mark.parametrize("width", [3, 7], ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [2, 1024])
def test_all_numbers_equal_a_dense_reference(monkeypatch, width, rows):
    monkeypatch.setattr(neural_collapse, "ROWS", rows)
    case = noisy(EXPONENTIAL, width)
    found = nc_metrics(*case)
    assert_same(found, reference(*case), rtol=1e-7)
    assert 0 < found["nc4"] < 1
    assert all(type(found[key]) is float for key in SCALARS)
    assert found["nc1_per_class"].dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Perfect geometries


@pytest.mark.parametrize("width", [5, 20])
def test_a_perfect_simplex_gives_0(width):
    vertices = simplex_vertices(6, width)
    targets = labels([7] * 6)
    found = nc_metrics(5 * vertices[targets] + draw(width), targets, 0.3 * vertices)
    per_class = found.pop("nc1_per_class")
    assert per_class.abs().max() < 1e-24
    printed = {key: found.pop(key) for key in ("b_a_as_printed", "b_d_as_printed")}
    assert printed["b_a_as_printed"] ** 2 == pytest.approx(6 / 5**5)
    assert printed["b_d_as_printed"] ** 2 == pytest.approx(6 / 5**5 * (0.09 * 5 / 6) ** 2)
    assert found.keys() == SCALARS - printed.keys()
    assert found.pop("nc3_uncentred") > 0
    assert nc_metrics(vertices[targets], targets, vertices)["nc3_uncentred"] == pytest.approx(0, abs=1e-12)
    assert {key: value for key, value in found.items() if abs(value) > 1e-12} == {}


def test_only_what_compares_classifier_and_means_sees_a_rotation_between_them():
    vertices = simplex_vertices(6, 8)
    targets = labels([7] * 6)
    found = nc_metrics(vertices[targets], targets, vertices @ rotation(8, seed=5))
    seen = {key for key, value in found.items() if key in SCALARS and abs(value) > 1e-12}
    assert seen == {"nc3", "nc3_uncentred", "nc4", "b_a_as_printed", "b_d_as_printed"}
    opposite = nc_metrics(vertices[targets], targets, -vertices)
    assert (opposite["nc3"], opposite["nc3_uncentred"]) == (pytest.approx(4), pytest.approx(2))
    assert opposite["nc4"] == 1


@pytest.mark.parametrize("classes", [2, 100])
def test_balance_of_a_simplex_as_the_paper_prints_it(classes):
    found = balance_metrics(simplex_vertices(classes, classes))
    assert found["b_a_as_printed"] ** 2 == pytest.approx(classes / (classes - 1) ** 5)
    assert max(found[key] for key in ("b_l", "b_a", "b_d", "b_l_relative", "b_d_relative")) < 1e-12


def test_balance_of_three_rows_by_hand():
    """Lengths 1, 1, 2; dot products 0, 0, 2; cosines 0, 0, 1; each pair twice."""
    found = balance_metrics(torch.tensor([[1, 0], [0, 1], [0, 2]], dtype=torch.float32))
    expected = {"b_l": 2 / 9, "b_a": 2 / 9, "b_d": 8 / 9, "b_l_relative": 1 / 8, "b_d_relative": 2 / 9}
    # Printed: the means are 2/4 and 4/4, and the sums of squares are divided by 4.
    expected |= {"b_a_as_printed": (4 / 4 + 2 / 4) / 4, "b_d_as_printed": (4 * 1 + 2 * 1) / 4}
    assert {key: value**2 for key, value in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("counts", [STEP, EXPONENTIAL], ids=["step", "exponential"])
def test_a_perfect_seli_geometry_gives_0_and_is_no_simplex(counts):
    """Thrampoulidis et al.: with (I - 11'/C) Y = V S U', Y one-hot [C, N], W = V S^(1/2) R and H = U S^(1/2) R."""
    targets = labels(counts)
    one_hot = torch.eye(6, dtype=torch.float64)[:, targets]
    left, values, right = torch.linalg.svd(one_hot - one_hot.mean(dim=0), full_matrices=False)
    turn = rotation(9)[:6]
    weight, features = left * values.sqrt() @ turn, right.T * values.sqrt() @ turn
    found = nc_metrics(features, targets, 2 * weight)
    assert max(found[key] for key in ("nc1", "nc1_pooled", "nc4", "seli_weights", "seli_means")) < 1e-12
    assert min(found[key] for key in ("simplex_weights", "simplex_means", "b_l", "b_a", "nc2_equinorm", "nc3")) > 0.01


@pytest.mark.parametrize("counts", [STEP, [3, 900, 3, 41, 900, 3, 7], [1, 1]])
def test_seli_equals_the_dense_formula(counts):
    grams = seli_grams(torch.tensor(counts))
    for gram, expected in zip(grams, dense_seli(counts), strict=True):
        assert gram.dtype == torch.float64
        np.testing.assert_allclose(gram, expected, atol=1e-7)  # the dense root of a rounded 0 is some 1e-8
        assert gram.norm() == pytest.approx(1)
        assert torch.linalg.eigvalsh(gram)[0].abs() < 1e-15


def test_seli_of_equal_counts_is_the_simplex():
    expected = (torch.eye(5, dtype=torch.float64) - 1 / 5) / 2
    for gram in seli_grams(torch.tensor([17] * 5)):
        torch.testing.assert_close(gram, expected)


@pytest.mark.parametrize("counts", [[3, 0, 2], [4], []])
def test_seli_needs_two_classes_and_samples_of_each(counts):
    with pytest.raises(InputError, match="at least one sample of each"):
        seli_grams(torch.tensor(counts))


# ---------------------------------------------------------------------------------------------------------------------
# Noise around the class means


def white_rows(number, width, seed):
    """[n, D] with mean exactly 0 and covariance exactly I, n > D."""
    columns = torch.cat([torch.ones(number, 1, dtype=torch.float64), draw(number, width, seed=seed)], dim=1)
    return torch.linalg.qr(columns).Q[:, 1:] * math.sqrt(number)


def inverse_eigenvalues(means):
    """Sum over the directions in which the class means differ."""
    centred = means - means.mean(dim=0)
    values = torch.linalg.svdvals(centred) ** 2 / len(means)
    return (1 / values[: min(len(means) - 1, means.shape[1])]).sum().item()


@pytest.mark.parametrize("width", [3, 8], ids=["narrow", "wide"])
def test_nc1_of_isotropic_noise_is_its_closed_form(width):
    """sigma_k^2 tr(pinv(S_B)) / C for class k; the classes' mean, and the samples' mean."""
    counts, sigmas = [90, 40, 20, 10, 10], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    means, targets = draw(5, width), labels(counts)
    noise = torch.cat([s * white_rows(n, width, seed) for seed, (n, s) in enumerate(zip(counts, sigmas, strict=True))])
    found = nc_metrics(means[targets] + noise, targets, means)
    expected = sigmas**2 * inverse_eigenvalues(means) / 5
    np.testing.assert_allclose(found["nc1_per_class"], expected, rtol=1e-9)
    assert found["nc1"] == pytest.approx((0.01 + 0.04 + 0.09 + 0.16 + 0.25) / 5 * inverse_eigenvalues(means) / 5)
    pooled = (0.01 * 90 + 0.04 * 40 + 0.09 * 20 + 0.16 * 10 + 0.25 * 10) / 170
    assert found["nc1_pooled"] == pytest.approx(pooled * inverse_eigenvalues(means) / 5)


def test_directions_in_which_no_means_differ_do_not_count():
    """Four means on a line in five dimensions: S_B has rank 1, not 3."""
    positions, targets = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64), labels([9] * 4)
    means = 3 + positions[:, None] * rotation(5)[:1]
    noise = torch.cat([0.1 * white_rows(9, 5, seed) for seed in range(4)])
    found = nc_metrics(means[targets] + noise, targets, means)
    assert found["nc1"] == pytest.approx(0.01 / 3.5 / 4)  # 3.5: the positions' population variance


def test_rounding_opens_no_direction_beyond_the_number_of_classes():
    """The means leave at most C - 1; at this offset rounding leaves S_B an eigenvalue of some 1e-12 in one more."""
    means, targets = draw(5, 8), labels([30] * 5)
    noise = torch.cat([0.5 * white_rows(30, 8, seed) for seed in range(5)])
    found = nc_metrics(means[targets] + noise + 1e10, targets, means)
    assert found["nc1"] == pytest.approx(0.25 * inverse_eigenvalues(means) / 5, rel=1e-4)


def test_nc4_counts_the_samples_of_two_swapped_classes():
    vertices, targets = simplex_vertices(4, 4), labels([5, 3, 8, 4])
    found = nc_metrics(vertices[targets], targets, vertices[[0, 2, 1, 3]])
    assert found["nc4"] == pytest.approx(11 / 20)
    biased = nc_metrics(vertices[targets], targets, vertices, bias=torch.tensor([0.0, 0, 0, 10]))
    assert biased["nc4"] == pytest.approx(16 / 20)  # all are called the last class


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


def test_scales_shifts_and_a_common_rotation_do_not_matter():
    features, targets, weight, bias = noisy(EXPONENTIAL)
    turn, shift = rotation(7), draw(7, seed=8)
    plain = nc_metrics(features, targets, weight, bias)
    moved_bias = 0.3 * bias - 0.3 * weight @ shift  # the same decisions
    moved = nc_metrics(4 * (features + shift) @ turn, targets, 0.3 / 4 * weight @ turn, moved_bias)
    scaled = {"b_l", "b_d", "b_d_as_printed"}
    assert_same(moved, plain, leave={*scaled, "nc3_uncentred"})
    factors = {"b_l": 0.075, "b_d": 0.075**2, "b_d_as_printed": 0.075**2}
    for key in scaled:
        assert moved[key] == pytest.approx(factors[key] * plain[key]), key


def test_classes_without_samples_are_left_out():
    features, targets, weight, bias = noisy(EXPONENTIAL)
    plain = nc_metrics(features, targets, weight, bias)
    wider = draw(8, 7, seed=20) / 100
    place = torch.tensor([0, 2, 3, 5, 6, 7])
    wider[place] = weight
    wide_bias = torch.full((8,), -1e3, dtype=torch.float64)
    wide_bias[place] = bias
    found = nc_metrics(features, place[targets], wider, wide_bias)
    assert found["nc1_per_class"][[1, 4]].isnan().all()
    of_rows = {key for key in SCALARS if key.startswith("b_") or (key.startswith("nc2") and key.endswith("_weights"))}
    expected = {"nc1_per_class": found["nc1_per_class"][place]}
    assert_same(found | expected, plain, leave=of_rows)
    rows = balance_metrics(wider)
    assert {key: found[key] for key in rows} == rows
    assert rows["b_l"] != pytest.approx(plain["b_l"])
    angles = np.abs(pairs(units(wider.numpy())) + 1 / 7).mean()
    assert found["nc2_equiangle_weights"] == pytest.approx(angles)


# ---------------------------------------------------------------------------------------------------------------------
# Where little can be measured


def test_equal_features_and_zeros_in_the_classifier_give_no_nan():
    found = nc_metrics(draw(4).expand(12, 4), labels([3, 4, 5]), draw(3, 4))
    assert {found[key] for key in ("nc1", "nc1_pooled", "nc2_equinorm")} == {math.inf}  # no collapse
    assert found["nc1_per_class"].tolist() == [math.inf] * 3
    assert found["nc2_equiangle"] == pytest.approx(1 / 2)  # cosines 0 instead of -1/2
    assert [found[key] for key in ("nc3", "simplex_means", "seli_means")] == pytest.approx([1, 1, 1])
    assert not any(math.isnan(found[key]) for key in SCALARS)
    features, targets, weight, bias = noisy(EXPONENTIAL)
    found = nc_metrics(features, targets, torch.zeros_like(weight), bias)
    assert {found[key] for key in ("nc2_equinorm_weights", "b_l_relative", "b_d_relative")} == {math.inf}
    assert [found[key] for key in ("b_l", "b_a", "b_d", "seli_weights")] == pytest.approx([0, 0, 0, 1])
    assert not any(math.isnan(found[key]) for key in SCALARS)


def test_too_few_classes_are_refused():
    with pytest.raises(InputError, match=r"^1 classes have samples"):
        nc_metrics(draw(5, 3), torch.full((5,), 2), draw(4, 3))
    with pytest.raises(InputError, match=r"^0 classes have samples"):
        measure(lambda: [], draw(4, 3))
    with pytest.raises(InputError, match="at least two classes"):
        balance_metrics(draw(1, 3))


@pytest.mark.parametrize("which", [0, 2, 3], ids=["features", "weight", "bias"])
def test_numbers_that_are_not_finite_are_refused(which):
    case = noisy(EXPONENTIAL)
    case[which][-1] = math.nan
    with pytest.raises(DivergenceError, match="not finite"):
        nc_metrics(*case)


def test_batches_that_are_used_up_after_one_pass_are_noticed():
    features, targets, weight, _ = noisy(EXPONENTIAL)
    once = iter([(features, targets)])
    with pytest.raises(ValueError, match="second call"):
        measure(lambda: once, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and processes


def in_batches(features, targets, size):
    return lambda: zip(features.split(size), targets.split(size), strict=True)


@pytest.mark.parametrize("size", [1, 7])
def test_batches_of_any_size_give_the_same(monkeypatch, size):
    features, targets, weight, bias = noisy(EXPONENTIAL)
    whole = nc_metrics(features, targets, weight, bias)
    assert_same(measure(in_batches(features, targets, size), weight, bias), whole)
    monkeypatch.setattr(neural_collapse, "ROWS", size)
    assert_same(nc_metrics(features, targets, weight, bias), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_are_raised_to_float64_first(dtype):
    features, targets, weight, bias = noisy(EXPONENTIAL)
    features, weight = (3 * features).to(dtype), torch.nn.Parameter(weight.float())
    found = nc_metrics(features, targets, weight, bias)
    assert_same(found, nc_metrics(features.double(), targets, weight.double(), bias), rtol=0)


def measure_parts(rank: int, case: Path, out: Path) -> None:
    """In shares of one and two thirds, and with no batch in process 0."""
    features, targets, weight, bias = torch.load(case)
    third, found = len(features) // 3, {}
    with distributed.processes("cpu"):
        uneven = [slice(third, None), slice(0, third)][rank]
        for name, share in (("uneven", uneven), ("idle", [slice(0, 0), slice(None)][rank])):
            parts = list(zip(features[share].split(9), targets[share].split(9), strict=True))
            held = [part for part in parts if len(part[0])]
            found[name] = measure(lambda held=held: held, weight, bias)
    torch.save(found, out / f"{rank}.pt")


def test_two_processes_give_the_numbers_of_one(tmp_path):
    case = noisy(EXPONENTIAL)
    torch.save(case, tmp_path / "case.pt")
    in_ranks(tmp_path, measure_parts, tmp_path / "case.pt", tmp_path)
    one = nc_metrics(*case)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            assert_same(found, one)
