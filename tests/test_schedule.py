"""The learning rate as a function of the epoch."""

import math

import pytest

from utils.schedule import lr_at, step_epochs


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.02), (1, 0.04), (4, 0.1), (5, 0.1), (159, 0.1), (160, 0.01), (179, 0.01), (180, 0.001), (999, 0.001)],
)
def test_warm_up_then_the_steps_of_the_paper(epoch, expected):
    assert lr_at(epoch, 0.1, 200, cos=False) == pytest.approx(expected, rel=1e-12)


def test_factors_multiply_the_base_rate():
    rates = [lr_at(epoch, 2.0, 10, False, [3, 6], [0.5, 0.5], 0) for epoch in (2, 3, 5, 6, 9)]
    assert rates == [2.0, 1.0, 1.0, 1.0, 1.0]


def test_a_step_beyond_the_end_is_legal_and_never_reached():
    rates = [lr_at(epoch, 0.1, 200, False, (160, 240)) for epoch in range(160, 200)]
    assert rates == pytest.approx([0.01] * 40)


def test_steps_below_1_are_fractions_of_the_training():
    assert step_epochs([0.8, 0.9], 30) == [24, 27]
    assert step_epochs([0, 0.5, 7], 10) == [0, 5, 7]
    for epoch in range(200):
        assert lr_at(epoch, 0.1, 200, False, (0.8, 0.9)) == lr_at(epoch, 0.1, 200, False, (160, 180))


def test_no_steps_and_no_warm_up_leave_the_rate_constant():
    assert {lr_at(epoch, 0.3, 5, False, [], [], 0) for epoch in range(5)} == {0.3}


def test_a_step_within_the_warm_up_applies_after_it():
    assert [lr_at(epoch, 1.0, 9, False, [1], [0.1], 4) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 0.1, 0.1]


@pytest.mark.parametrize(
    ("epoch", "share"), [(0, 1.0), (50, 0.5 + math.sqrt(0.125)), (100, 0.5), (150, 0.5 - math.sqrt(0.125)), (200, 0.0)]
)
def test_cosine_falls_from_the_base_rate_to_zero_without_warm_up(epoch, share):
    assert lr_at(epoch, 0.2, 200, cos=True) == pytest.approx(0.2 * share, abs=1e-15)


def test_cosine_reads_neither_steps_nor_warm_up():
    assert lr_at(3, 0.2, 10, True, [1, 2], [0.1], 9) == lr_at(3, 0.2, 10, True)


def test_cosine_after_a_warm_up_takes_the_epochs_that_are_left():
    rates = [lr_at(epoch, 0.2, 13, cos=True, warmup_epochs=5, cos_warmup=True) for epoch in range(14)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5:] == pytest.approx([0.2 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(9)])
    assert rates[9] == pytest.approx(0.1)
    assert lr_at(1, 0.2, 2, cos=True, warmup_epochs=5, cos_warmup=True) == pytest.approx(0.08)  # never beyond it


@pytest.mark.parametrize(("steps", "factors"), [([3], [0.1, 0.01]), ([3, 6], [0.1]), ([], [0.1])])
def test_unequal_numbers_of_steps_and_factors_are_refused(steps, factors):
    with pytest.raises(ValueError, match="zip"):
        lr_at(8, 0.1, 10, False, steps, factors)
