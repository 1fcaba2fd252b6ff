"""The optimizer that a configuration builds, against its formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_stage1
from tests.conftest import (
    ARB,
    CE,
    SHORT,
    TWO_EPOCHS,
    assert_same_run,
    content,
    current,
    failure,
    log_of,
    stop_before,
    train,
)
from tests.test_step import CPU, Recorder, digits, new_parts, run  # noqa: F401
from utils import build
from utils.config import load_config
from utils.cuda_graph import GraphedStep
from utils.errors import Interrupted
from utils.run.describe import describe_schedule
from utils.step import Step

COUNTS = torch.tensor([9, 4, 2])


def built(*overrides: object, cfg: str = CE) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A weight [2] of 1 and -2 and the optimizer of a network that has no other."""
    cfg = load_config(cfg, [str(value) for value in overrides])
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    model.classifier = SimpleNamespace(rows=lambda: torch.zeros(3, 5))
    method = build.new_method(cfg, SimpleNamespace(image_size=8, class_counts=COUNTS), model)
    return model.weight, build.new_optimizer(cfg, model, method)


def stepped(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: torch.Tensor) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


GRADIENTS = torch.tensor([[1.0, -3.0], [0.5, 2.0], [-4.0, 0.25]])


def test_nesterov_looks_ahead_by_the_momentum():
    weight, optimizer = built("nesterov", True, "momentum", 0.8, "lr", 0.1, "weight_decay", 0.01)
    w, speed = weight.detach().double(), 0.0
    for gradient in GRADIENTS.double():
        gradient = gradient + 0.01 * w
        speed = 0.8 * speed + gradient
        w = w - 0.1 * (gradient + 0.8 * speed)
    torch.testing.assert_close(stepped(weight, optimizer, GRADIENTS).double(), w)


def test_adamw_is_its_formula():
    """Algorithm 2 of Loshchilov and Hutter, with eps 1e-8."""
    options = ["optimizer", "adamw", "betas", [0.8, 0.9], "lr", 0.1, "weight_decay", 0.5]
    weight, optimizer = built(*options)
    w, first, second = weight.detach().double(), 0.0, 0.0
    for step, gradient in enumerate(GRADIENTS.double(), 1):
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        direction = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        w = w - 0.1 * (direction + 0.5 * w)
    torch.testing.assert_close(stepped(weight, optimizer, GRADIENTS).double(), w)


def adamw_step(data, precision="fp32") -> Step:
    model, method, _, scaler = new_parts(data, precision)
    return Step(model, method, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), scaler, CPU, precision)


def states(step: Step) -> list[torch.Tensor]:
    return [value for state in step.optimizer.state.values() for value in state.values()]


def test_adamw_s_state_is_there_before_the_first_step(digits):  # noqa: F811
    """Under torch's names: it adds none. A step that fp16 skips does not count."""
    step = adamw_step(digits, "fp16")
    before = [value.data_ptr() for value in states(step)]
    assert len(before) == 3 * len(list(step.model.parameters()))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    run(digits, step, steps=1)
    assert step.meter.counts()["skipped_steps"] == 1
    assert not any(value.any() for value in states(step))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run(digits, step, steps=1)
    assert [value.data_ptr() for value in states(step)] == before
    assert all(float(state["step"]) == 1 for state in step.optimizer.state.values())


def test_recorded_steps_of_adamw_are_eager_ones(digits):  # noqa: F811
    eager, recorded = adamw_step(digits), GraphedStep(adamw_step(digits), Recorder())
    for step in (eager, recorded):
        run(digits, step, steps=4)
    for one, other in zip(eager.tensors(), recorded.step.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_with_adamw_stopped_within_an_epoch_goes_on_inside_it(tmp_path, monkeypatch, capsys):
    options = [*TWO_EPOCHS, "optimizer", "adamw", "lr", 1e-3, "max_grad_norm", 1.0]
    whole = train(tmp_path / "whole", *options)
    assert "AdamW for 2 epochs" in log_of(whole) and "betas 0.9 and 0.999, weight decay" in log_of(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_before(patch, 11)
        train(tmp_path / "part", *options)
    (folder,) = (tmp_path / "part").iterdir()
    assert content(folder)["step"] == 4
    code = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, "resume", current(folder))
    assert code.code == 2 and "was trained with optimizer adamw, but optimizer is sgd" in code.said
    train(tmp_path / "part", *options, "resume", current(folder))
    assert_same_run(folder, whole)


def test_class_means_stay_without_momentum():
    _, optimizer = built("nesterov", True, "nc_within", 0.01)
    assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(True, 0.9), (False, 0.0)]


def test_the_log_names_the_optimizer():
    assert "Nesterov momentum 0.9" in describe_schedule(load_config(CE, ["nesterov", "True"]))
    assert "Nesterov" not in describe_schedule(load_config(CE))
    assert "5 warm-up epochs, cosine" in describe_schedule(load_config(CE, ["cos", "True", "cos_warmup", "True"]))
