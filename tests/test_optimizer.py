"""The optimizer that a configuration builds, against its formula."""

from types import SimpleNamespace

import torch
from torch import nn

from tests.conftest import CE
from utils import build
from utils.config import load_config
from utils.run.describe import describe_schedule

COUNTS = torch.tensor([9, 4, 2])


def built(*overrides: object, cfg: str = CE) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A weight [2] of 1 and -2 and the optimizer of a network that has no other."""
    cfg = load_config(cfg, [str(value) for value in overrides])
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    model.classifier = SimpleNamespace(rows=lambda: torch.zeros(3, 5))
    method = build.new_method(cfg, SimpleNamespace(class_counts=COUNTS), model)
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


def test_class_means_stay_without_momentum():
    _, optimizer = built("nesterov", True, "nc_within", 0.01)
    assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(True, 0.9), (False, 0.0)]


def test_the_log_names_the_optimizer():
    assert "Nesterov momentum 0.9" in describe_schedule(load_config(CE, ["nesterov", "True"]))
    assert "Nesterov" not in describe_schedule(load_config(CE))
    assert "5 warm-up epochs, cosine" in describe_schedule(load_config(CE, ["cos", "True", "cos_warmup", "True"]))
