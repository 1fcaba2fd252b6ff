"""methods/space_alignment.py: both ways of turning rows against their formulas, and what they leave alone."""

import math

import pytest
import torch

from methods.regularizers import CollapseGeometry, centred
from methods.space_alignment import project, slerp_amount, slerp_rows

SEEN = torch.tensor([True, True, False, True, True, True])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def less(a, factor, b) -> list:
    return [x - factor * y for x, y in zip(a, b, strict=True)]


def unit(a) -> list:
    return [x / math.hypot(*a) for x in a]


def naive_project(g, w, mean, gamma) -> tuple[list, bool]:
    """One row in plain numbers, and whether a part was dropped."""
    w, mean = unit(w), unit(mean)
    tangent, towards = less(g, dot(g, w), w), unit(less(mean, dot(mean, w), w))
    away = dot(tangent, towards) > 0
    if away:
        tangent = less(tangent, dot(tangent, towards), towards)
    return [(1 - gamma) * t + gamma * x for t, x in zip(tangent, g, strict=True)], away


def naive_slerp(w, mean, amount) -> list:
    a, b = unit(w), unit(mean)
    angle = math.acos(dot(a, b))
    share, other = (math.sin(t * angle) / math.sin(angle) for t in (1 - amount, amount))
    return [math.hypot(*w) * (share * x + other * y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_projection_is_its_formula(gamma):
    gradient, rows, means = (drawn(6, 5, seed=seed) for seed in range(3))
    found = project(gradient, rows, means, SEEN, gamma).tolist()
    cases = [naive_project(*case, gamma) for case in zip(*(x.tolist() for x in (gradient, rows, means)), strict=True)]
    assert {away for _, away in cases} == {True, False}
    for row, (expected, _), g, seen in zip(found, cases, gradient.tolist(), SEEN, strict=True):
        assert row == (pytest.approx(expected, rel=1e-12) if seen else g)


def test_a_step_along_the_projected_gradient_turns_no_row_away_from_its_mean():
    rows, means, everyone = drawn(50, 8), drawn(50, 8, seed=1), torch.ones(50, dtype=torch.bool)
    gradient = drawn(50, 8, seed=2)

    def turned(step) -> torch.Tensor:
        cosines = [torch.cosine_similarity(w, means, dim=1) for w in (rows, rows - 1e-6 * step)]
        return cosines[1] - cosines[0]

    assert turned(project(gradient, rows, means, everyone, 0.0)).min() > -1e-10
    assert turned(gradient).min() < -1e-8
    assert torch.equal(project(gradient, rows, means, everyone, 1.0), gradient)


def test_a_scale_comes_out_of_the_projection():
    """So gradients that fp16 has scaled, by a power of two, need not be unscaled before."""
    gradient, rows, means = (drawn(6, 5, seed=seed).float() for seed in range(3))
    scaled = project(2.0**16 * gradient, rows, means, SEEN, 0.6)
    assert torch.equal(scaled, 2.0**16 * project(gradient, rows, means, SEEN, 0.6))
    gradient[0, 2] = torch.inf
    assert not project(gradient, rows, means, SEEN, 0.6)[0].isfinite().all()  # the overflow is still to be seen


@pytest.mark.parametrize("amount", [0.0, 0.02, 0.5, 1.0])
def test_slerp_is_its_formula(amount):
    rows, means = drawn(6, 5), drawn(6, 5, seed=1)
    means[1] = rows[1] + 0.1 * means[1]
    aligned = torch.cosine_similarity(rows, means, dim=1) > 0.95
    assert aligned.tolist() == [False, True, False, False, False, False]
    found = slerp_rows(rows, means, SEEN, torch.tensor(amount, dtype=torch.float64))
    for row, w, mean, moves in zip(found.tolist(), rows.tolist(), means.tolist(), SEEN & ~aligned, strict=True):
        assert row == (pytest.approx(naive_slerp(w, mean, amount), rel=1e-9) if moves else w)


def test_rows_without_a_direction_to_turn_to_stay_finite():
    rows = torch.tensor([[1.0, 0, 0], [0, 0, 0], [2, 0, 0], [1, 0, 0]])
    means = torch.tensor([[1.0, 0, 0], [1, 2, 3], [-1, 0, 0], [0, 0, 0]])
    everyone = torch.ones(4, dtype=torch.bool)
    assert slerp_rows(rows, means, everyone, 0.02).isfinite().all()
    assert project(torch.ones(4, 3), rows, means, everyone, 0.6).isfinite().all()


def test_the_amount_grows_from_0_as_half_a_cosine():
    amounts = [slerp_amount(epoch, 0.02, 100) for epoch in (0, 25, 50, 75, 100)]
    assert amounts == pytest.approx([0, 0.01 - 0.01 / math.sqrt(2), 0.01, 0.01 + 0.01 / math.sqrt(2), 0.02])


def aligned(spa: str) -> tuple[CollapseGeometry, torch.nn.Parameter]:
    geometry = CollapseGeometry(6, 5, spa=spa, spa_gamma=0.3, spa_step=0.5, num_epochs=4)
    geometry.start_epoch(2)
    with torch.no_grad():
        geometry.moving.means.copy_(drawn(6, 5, seed=1))
        geometry.moving.seen.copy_(SEEN)
    weight = torch.nn.Parameter(drawn(6, 5).float())
    weight.grad = drawn(6, 5, seed=2).float()
    return geometry, weight


def test_projection_changes_gradients_and_slerp_weights():
    """The first with centred means, the second with the means as they are."""
    before = aligned("proj")[1]
    for spa in ("proj", "slerp"):
        geometry, weight = aligned(spa)
        means = geometry.moving.means
        geometry.adjust_gradients(weight)
        geometry.adjust_weights(weight)
        if spa == "proj":
            expected = project(before.grad, before, centred(means, SEEN), SEEN, 0.3), before
        else:
            expected = before.grad, slerp_rows(before, means, SEEN, 0.25)
        torch.testing.assert_close((weight.grad, weight), expected)
