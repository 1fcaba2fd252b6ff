"""Running sums of training."""

import math

import pytest
import torch

from utils.errors import DivergenceError
from utils.meter import SUMS, TrainMeter, check_weights


@pytest.fixture
def meter():
    return TrainMeter(torch.device("cpu"))


def one_hot(classes, num_classes=6):
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def test_the_meter_weighs_batches_by_their_size(meter):
    meter.update(torch.tensor(2.0), one_hot([0, 1, 2], 5), torch.tensor([0, 1, 1]))
    meter.update(torch.tensor(1.0), one_hot([4], 5), torch.tensor([0]))
    assert meter.averages() == {"loss": pytest.approx(1.75), "top1": 50.0, "top5": 100.0}
    assert meter.last_step() == {"loss": 1.0, "top1": 0.0, "top5": 100.0}
    assert meter.averages()["loss"] == pytest.approx(1.75)  # reading changes nothing


def test_the_sixth_class_is_no_top_5_hit(meter):
    logits = torch.arange(6.0).repeat(6, 1)
    meter.update(torch.tensor(0.0), logits, torch.arange(6))
    assert meter.averages() == pytest.approx({"loss": 0.0, "top1": 100 / 6, "top5": 500 / 6})


def test_with_three_classes_every_sample_is_a_top_5_hit(meter):
    meter.update(torch.tensor(0.0), one_hot([0, 1], 3), torch.tensor([1, 2]))
    assert meter.averages() == {"loss": 0.0, "top1": 0.0, "top5": 100.0}


def test_an_empty_meter_is_zero(meter):
    assert meter.averages() == {"loss": 0.0, "top1": 0.0, "top5": 0.0}
    assert meter.first_bad_step() is None
    assert meter.counts() == {"clamped_logits": 0, "skipped_steps": 0}


def test_the_meter_sums_in_double_precision(meter):
    for _ in range(200):
        meter.update(torch.tensor(0.1, dtype=torch.float64), one_hot([0] * 999), torch.zeros(999).long())
    assert meter.averages()["loss"] == pytest.approx(0.1, rel=1e-12)
    assert not meter.sums.requires_grad


def test_the_meter_takes_half_precision_and_losses_that_carry_a_gradient(meter):
    loss = torch.tensor(3.0, requires_grad=True) * 1
    meter.update(loss, one_hot([0, 1]).bfloat16(), torch.tensor([0, 0]))
    assert meter.averages() == {"loss": 3.0, "top1": 50.0, "top5": 100.0}
    assert not meter.sums.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "logits"])
def test_the_first_step_with_a_non_finite_value_is_recorded(meter, bad, where):
    targets = torch.tensor([0, 1])
    for step in range(5):
        loss, logits = torch.tensor(1.0), one_hot([0, 1])
        if step in (2, 4) and where == "loss":
            loss = torch.tensor(bad)
        if step in (2, 4) and where == "logits":
            logits[1, 3] = bad
        meter.update(loss, logits, targets)
        assert meter.first_bad_step() == (None if step < 2 else 2)


def test_micro_batches_of_a_step_count_as_one(meter):
    targets = torch.tensor([0, 1])
    for number in range(6):  # three steps of two micro-batches
        loss = torch.tensor(math.nan if number == 3 else 1.0)
        meter.update(loss, one_hot([0, 1]), targets, ends_step=number % 2 == 1)
    assert meter.first_bad_step() == 1


def test_reset_keeps_the_memory(meter):
    """A CUDA graph writes to fixed addresses."""
    addresses = [tensor.data_ptr() for tensor in meter.tensors()]
    meter.update(torch.tensor(math.inf), one_hot([0, 1]), torch.tensor([0, 0]))
    assert meter.last_step()["top1"] == 50
    meter.reset()
    assert meter.first_bad_step() is None
    assert meter.averages() == meter.last_step() == {"loss": 0.0, "top1": 0.0, "top5": 0.0}
    meter.update(torch.tensor(2.0), one_hot([0, 1]), torch.tensor([0, 1]))
    assert meter.averages() == {"loss": 2.0, "top1": 100.0, "top5": 100.0}
    assert [tensor.data_ptr() for tensor in meter.tensors()] == addresses


@pytest.mark.parametrize("clamp", [None, 2.0])
def test_logits_beyond_the_clamp_are_counted(clamp):
    meter = TrainMeter(torch.device("cpu"), clamp)
    logits = torch.tensor([[2.0, -2.0, 0.0], [2.5, -9.0, math.inf]])
    for weight in (1.0, 0.5, 0.0):  # weight 0 is not counted
        meter.update(torch.tensor(1.0), logits, torch.tensor([0, 1]), weight)
    assert meter.counts() == {"clamped_logits": 0 if clamp is None else 6, "skipped_steps": 0}


def test_skipped_steps_are_counted(meter):
    for overflow in (0.0, 1.0, 1.0):
        meter.skipped(torch.tensor(overflow))
    assert meter.counts()["skipped_steps"] == 2
    meter.reset()
    assert meter.counts()["skipped_steps"] == 0


@pytest.mark.parametrize("processes", [1, 3])
def test_restored_sums_continue(meter, processes):
    """With another number of processes, rank 0 takes the total."""
    targets = torch.tensor([0, 1])
    whole, later = TrainMeter(torch.device("cpu"), 0.5), TrainMeter(torch.device("cpu"), 0.5)
    for loss in (0.1, 0.2, 0.7):
        whole.update(torch.tensor(loss), one_hot([0, 3]), targets)
    rows = whole.rows()
    assert rows.shape == (1, len(SUMS))
    rows = torch.cat([rows, *[torch.zeros_like(rows)] * (processes - 1)])
    later.update(torch.tensor(99.0), one_hot([0, 3]), targets)
    later.reset()
    later.load_rows(rows, 3)
    for one in (whole, later):
        one.update(torch.tensor(0.3), one_hot([0, 1]), targets)
    assert torch.equal(whole.sums, later.sums)
    assert int(later.steps) == 4
    assert later.counts() == whole.counts() == {"clamped_logits": 8, "skipped_steps": 0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_weight_is_found(bad):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_weights(model, epoch=3)
    with torch.no_grad():
        model[1].bias[1] = bad
    with pytest.raises(DivergenceError, match="epoch 3"):
        check_weights(model, epoch=3)
