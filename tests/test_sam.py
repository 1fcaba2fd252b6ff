"""Sharpness-aware steps: against a loop written out, with overflows, recorded, and resumed."""

import copy

import pytest
import torch

from methods import build_method
from methods.losses import arb_loss
from methods.mixup import mix
from tests.conftest import TWO_EPOCHS, assert_same_run, current, log_of, stop_before, train
from tests.test_step import (  # noqa: F401
    CPU,
    LR,
    Recorder,
    batches_and_draws,
    compile_model,
    digits,
    new_parts,
    run,
    state,
)
from utils.cuda_graph import GraphedStep
from utils.errors import Interrupted
from utils.step import ProfiledStep, Step

RHO = 0.5


def sharp_step(data, precision="fp32", rho=RHO, compiled=False, **options) -> Step:
    parts = new_parts(data, precision)
    if compiled:
        compile_model(parts[0], CPU)
    return Step(*parts, CPU, precision, compiled, sam=rho, **options)


def loss_of(model, batch, draw) -> torch.Tensor:
    mixed, a, b = mix(batch.augment(), batch.targets, draw.lam, draw.partner)
    logits, counts = model(mixed), torch.bincount(a, minlength=10)
    return draw.lam * arb_loss(logits, a, counts) + (1 - draw.lam) * arb_loss(logits, b, counts)


def test_a_step_is_that_of_a_loop_written_out(digits):  # noqa: F811
    """Batch-norm statistics are those of the first pass alone, and the metrics too."""
    step = sharp_step(digits)
    chosen = list(batches_and_draws(digits, step, 0))[:3]
    step.start_epoch(0)
    for batch, draw in chosen:
        step(batch, draw)
    model, *_ = new_parts(digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3, foreach=False)
    losses = []
    for batch, draw in chosen:
        there = copy.deepcopy(model).train()
        loss = loss_of(model.train(), batch, draw)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        length = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        with torch.no_grad():
            for weight, gradient in zip(there.parameters(), gradients, strict=True):
                weight += RHO * gradient / length
        for weight, sharp in zip(
            model.parameters(), torch.autograd.grad(loss_of(there, batch, draw), there.parameters()), strict=True
        ):
            weight.grad = sharp
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(step.model.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert step.meter.averages()["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


@pytest.mark.parametrize("terms", [{"nc_means": 10.0}, {"nc_dual": 10.0}, {"nc_dual": 1.0, "spa": "proj"}])
def test_both_passes_have_the_same_class_means(digits, terms):  # noqa: F811
    """So at a tiny rho the steps are plain ones."""
    steps = []
    for rho in (0.0, 1e-9):
        model, _, *rest = new_parts(digits)
        method = build_method("ce", "global", digits.class_counts, feature_width=64, **terms)
        steps.append(run(digits, Step(model, method, *rest, CPU, sam=rho), steps=3))
    for key, value in state(steps[0]).items():
        torch.testing.assert_close(state(steps[1])[key], value, rtol=1e-3, atol=1e-5)
    for plain, sharp in zip(*(step.method.buffers() for step in steps), strict=True):
        torch.testing.assert_close(sharp, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at", [1, 2], ids=["first pass", "second pass"])
def test_an_overflow_in_either_pass_skips_the_step(digits, at):  # noqa: F811
    """Weights and momentum stay; batch-norm statistics are those of the first pass, and finite."""
    step = sharp_step(digits, "fp16")
    before, passes, method = copy.deepcopy(state(step)), [], step.method.forward

    def overflowing(*arguments):
        output = method(*arguments)
        passes.append(output.loss)
        return output._replace(loss=output.loss * (torch.inf if len(passes) == at else 1))

    step.method.forward = overflowing
    run(digits, step, steps=1)
    assert len(passes) == 2
    assert at == 2 or not passes[1].isfinite()
    for (key, value), old in zip(state(step).items(), before.values(), strict=True):
        assert torch.equal(value, old) or "running" in key or "tracked" in key, key
        assert value.isfinite().all(), key
    assert step.meter.counts()["skipped_steps"] == 1
    assert step.scaler.get_scale() == 2.0**15
    plain = run(digits, Step(*new_parts(digits, "fp16"), CPU, "fp16"), steps=1)
    for key, value in step.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[key]) or "running" not in key, key


def test_recorded_steps_are_eager_ones_and_diagnostics_see_the_first_pass(digits):  # noqa: F811
    seen = []
    eager = sharp_step(digits, keep_outputs=True)
    recorded = GraphedStep(sharp_step(digits, keep_outputs=True), Recorder())
    watched = ProfiledStep(recorded, lambda logits, *_: seen.append(logits.clone()), every=1)
    for step in (eager, watched):
        step.start_epoch(0)
    chosen = [list(batches_and_draws(digits, step, 0))[:3] for step in (eager, watched)]
    for (batch, draw), again in zip(*chosen, strict=True):
        model = copy.deepcopy(eager.model)
        expected = eager.method(model, batch.augment(), batch.targets, draw, batch.step_targets).logits
        eager(batch, draw)
        watched(*again)
        torch.testing.assert_close(seen[-1], expected.detach(), rtol=1e-3, atol=1e-3)
    for (key, value), other in zip(state(eager).items(), state(recorded).values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.slow
def test_both_passes_run_through_the_compiled_model(digits):  # noqa: F811
    torch.compiler.reset()
    compiled, eager = sharp_step(digits, compiled=True), sharp_step(digits)
    run(digits, compiled, steps=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(digits, compiled, steps=1)
    for _ in range(2):
        run(digits, eager, steps=1)
    for (key, a), b in zip(state(compiled).items(), state(eager).values(), strict=True):
        assert torch.dist(a.double(), b.double()) <= 1e-2 * b.double().norm(), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_within_an_epoch_goes_on_inside_it(tmp_path, monkeypatch, precision):
    options = [*TWO_EPOCHS, "sam", 0.05, "ema", 0.9, "nesterov", True, "precision", precision]
    whole = train(tmp_path / "whole", *options)
    assert ", sharpness-aware with rho 0.05, weights averaged with decay 0.9;" in log_of(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_before(patch, 11)
        train(tmp_path / "part", *options)
    (folder,) = (tmp_path / "part").iterdir()
    train(tmp_path / "part", *options, "resume", current(folder))
    assert_same_run(folder, whole)
