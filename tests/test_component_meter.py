"""Sums of components over an epoch: against tables made one by one."""

import numpy as np
import pytest
import torch

from methods import component_meter
from methods.component_meter import ComponentMeter, chosen_rows
from methods.gradients import component_norms, components
from utils.errors import InputError

CPU = torch.device("cpu")
CLASSES = 5


def some_batches(number=3, size=9):
    random = torch.Generator().manual_seed(0)
    for _ in range(number):
        features = torch.rand(size, 4, generator=random, dtype=torch.float64)
        logits = torch.randn(size, CLASSES, generator=random, dtype=torch.float64)
        yield logits, features, torch.randint(0, 3, (size,), generator=random)


def parts_of(logits, features, targets):
    residuals = logits.softmax(1) - torch.nn.functional.one_hot(targets, CLASSES)
    return components(residuals[None], features, targets[None], torch.ones(1))


@pytest.fixture
def tables():
    return torch.stack([component_norms(*batch, absent_rows="true") for batch in some_batches()])


@pytest.fixture
def meter():
    meter = ComponentMeter(CLASSES, [4, 1], last_epoch=0, device=CPU)
    for batch in some_batches():
        meter.update(parts_of(*batch))
    return meter


def assert_close(array, tensor):
    assert array.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(array), tensor.float())


def test_means_over_batches(meter, tables):
    means, mean = meter.averages(), tables.mean(dim=0)
    assert means["batches"] == 3
    assert_close(means["table"], mean)
    assert_close(means["diagonal"], mean.diagonal())
    assert_close(means["row_sums"], mean.sum(dim=1))
    assert_close(means["column_sums"], mean.sum(dim=0))
    assert_close(means["row_norms"], mean[[4, 1]])
    parts = [parts_of(*batch) for batch in some_batches()]
    for name in ("attraction_mass", "repulsion_mass", "repulsion_cosine"):
        assert_close(means[name], torch.stack([getattr(p, name) for p in parts]).mean(dim=0))


def test_a_cosine_counts_the_batches_that_have_one():
    meter = ComponentMeter(CLASSES, [0], 0, CPU)
    one_class = (torch.zeros(2, CLASSES), torch.ones(2, 4), torch.tensor([1, 1]))
    meter.update(parts_of(*one_class))
    assert np.isnan(meter.averages()["repulsion_cosine"]).all()
    several = next(some_batches())
    meter.update(parts_of(*several))
    assert_close(meter.averages()["repulsion_cosine"], parts_of(*several).repulsion_cosine)


def test_the_table_is_kept_in_the_last_epoch_and_up_to_a_number_of_classes(monkeypatch):
    meter = ComponentMeter(CLASSES, [0], last_epoch=2, device=CPU)
    kept = []
    for epoch in range(3):
        meter.start_epoch(epoch)
        meter.update(parts_of(*next(some_batches())))
        kept.append("table" in meter.averages())
    assert kept == [False, False, True]
    monkeypatch.setattr(component_meter, "TABLE_CLASSES", CLASSES - 1)
    assert "table" not in ComponentMeter(CLASSES, [0], 0, CPU).averages()


@pytest.mark.parametrize("last_epochs", [(0, 0), (0, 1), (1, 0)])
def test_an_interrupted_epoch_goes_on_to_the_last_bit(meter, last_epochs):
    """Without the table where the epoch was not the last one at first, or is not any more."""
    first, second = (ComponentMeter(CLASSES, [4, 1], epoch, CPU) for epoch in last_epochs)
    batches = list(some_batches())
    for part in (first, second):
        part.start_epoch(0)
    for batch in batches[:2]:
        first.update(parts_of(*batch))
    assert second.load_rows(first.rows())
    second.update(parts_of(*batches[2]))
    found, expected = second.averages(), meter.averages()
    assert found.keys() == expected.keys() - ({"table"} if any(last_epochs) else set())
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("rows", [[4], [4, 2], []])
def test_sums_of_other_rows_are_of_no_use(meter, rows):
    other = ComponentMeter(CLASSES, rows, 0, CPU)
    assert not other.load_rows(meter.rows())
    assert not other.load_rows(None)
    assert other.averages()["batches"] == 0


def test_the_sums_of_two_processes_go_on_in_one(meter):
    alone = ComponentMeter(CLASSES, [4, 1], 0, CPU)
    alone.load_rows(torch.cat([meter.rows(), meter.rows()]))
    assert alone.averages()["batches"] == 6
    np.testing.assert_allclose(alone.averages()["table"], meter.averages()["table"])
    alone.start_epoch(1)
    assert alone.averages()["batches"] == 0 and not alone.averages()["row_sums"].any()


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ([50, 30, 20, 10, 5], [4, 2, 0]),
        ([5, 0, 10, 50, 0, 20], [0, 2, 3]),  # classes without images are no rows
        ([7, 7, 7], [2, 1, 0]),
        ([3, 9], [0, 1]),
    ],
)
def test_the_rarest_the_median_and_the_most_frequent_class_are_chosen(counts, rows):
    assert chosen_rows(torch.tensor(counts)) == rows


def test_rows_can_be_asked_for():
    counts = torch.tensor([5, 3, 2])
    assert (chosen_rows(counts, [2, 0, 2]), chosen_rows(counts, [])) == ([2, 0], [])
    with pytest.raises(InputError, match="diagnostics_rows: 3, but the classes are 0 to 2"):
        chosen_rows(counts, [0, 3])
