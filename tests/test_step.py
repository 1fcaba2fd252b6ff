"""The step: against one written out by hand, in every precision, compiled, recorded and resumed."""

import copy

import pytest
import torch
import torch.nn.functional as F

from datasets import build_data
from methods import build_method
from methods.losses import arb_loss
from methods.mixup import mix
from models import build_model
from utils.build import set_lr
from utils.checkpoint import TrainState, read_checkpoint, restore, save_checkpoint
from utils.config import load_config
from utils.cuda_graph import GraphedStep
from utils.errors import InputError
from utils.precision import autocast, matmul_precision, new_scaler
from utils.seed import seeded_weights
from utils.step import ProfiledStep, Step, compile_model

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = [CPU, pytest.param("cuda", marks=CUDA)]
LR = 1e-3  # differences in the last bits grow a hundredfold per step at 0.02 and fresh weights


@pytest.fixture(scope="module")
def digits():
    """477 images of 8 pixels: 15 steps an epoch, the last one smaller."""
    return build_data("digits", "", imb_factor=0.05, image_size=8)


def new_parts(data, precision="fp32", device=CPU, counts="batch", mixup=1.0, seed=0, **terms):
    """Model, method, optimizer and scaler, the same each time; ``terms``: of :class:`CollapseGeometry`."""
    with seeded_weights(seed):
        model = build_model("digits", "resnet8", 10)
    model = model.to(memory_format=torch.channels_last).to(device)
    method = build_method("arb", counts, data.class_counts, mixup, feature_width=64, **terms).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3, fused=True)
    return model, method, optimizer, new_scaler(precision, torch.device(device))


def new_step(data, precision="fp32", device=CPU, compiled=False, keep_outputs=False, **options) -> Step:
    model, *parts = new_parts(data, precision, device, **options)
    if compiled:
        compile_model(model, torch.device(device))
    return Step(model, *parts, torch.device(device), precision, compiled, keep_outputs=keep_outputs)


def batches_and_draws(data, step, epoch, accumulate=1, device=CPU, batch_size=32):
    loader = data.train_loader(batch_size, 0, torch.device(device), accumulate=accumulate)
    draws = step.method.draws(loader.batch_sizes, 0, epoch, accumulate, torch.device(device))
    return zip(loader.epoch(epoch), draws, strict=True)


def run(data, step, epochs=1, steps=None, device=CPU, **options):
    for epoch in range(epochs):
        step.start_epoch(epoch)
        for number, (batch, draw) in enumerate(batches_and_draws(data, step, epoch, device=device, **options)):
            if number == steps:
                break
            step(batch, draw)
    return step


def state(step):
    model = {key: value.cpu() for key, value in step.model.state_dict().items()}
    optimizer = (step if isinstance(step, Step) else step.step).optimizer
    momentum = [optimizer.state[p]["momentum_buffer"].cpu() for p in step.model.parameters()]
    return model | {f"momentum {n}": value for n, value in enumerate(momentum)}


def take_over(step, other):
    """``other`` goes on from the weights and the momentum of ``step``."""
    other.model.load_state_dict(step.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def assert_close(one, other, **tolerance):
    for (key, a), b in zip(state(one).items(), state(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Against a loop written out


def test_a_step_is_that_of_a_loop_written_out(digits):
    """Mixup, batch counts, torch's plain SGD: weights and metrics of three steps, the last one the smaller batch."""
    step = new_step(digits)
    everything = list(batches_and_draws(digits, step, 0))
    chosen = [everything[0], everything[1], everything[-1]]
    step.start_epoch(0)
    for batch, draw in chosen:
        step(batch, draw)
    model, *_ = new_parts(digits)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3, foreach=False)
    losses, hits, sizes = 0.0, 0, []
    for batch, draw in chosen:
        mixed, a, b = mix(batch.augment(), batch.targets, draw.lam, draw.partner)
        logits = model(mixed)
        counts = torch.bincount(a, minlength=10)
        loss = draw.lam * arb_loss(logits, a, counts) + (1 - draw.lam) * arb_loss(logits, b, counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item() * len(a)
        hits += int((logits.argmax(1) == a).sum())
        sizes.append(len(a))
    assert len(set(sizes)) == 2  # the last batch is smaller
    ours = step.model.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    averages = step.meter.averages()
    assert averages["loss"] == pytest.approx(losses / sum(sizes), rel=1e-5)
    assert averages["top1"] == pytest.approx(100 * hits / sum(sizes))


def test_passes_add_up_to_a_step(digits):
    """With batch norm in eval mode and global counts nothing belongs to a pass alone."""
    steps = []
    for accumulate in (1, 2, 3):
        step = new_step(digits, counts="global", mixup=0.0)
        step.model.eval()
        for number, (batch, draw) in enumerate(batches_and_draws(digits, step, 0, accumulate)):
            if number < accumulate:
                step(batch, draw)
        steps.append(step)
    assert [int(step.meter.steps) for step in steps] == [1, 1, 1]
    for other in steps[1:]:
        assert_close(steps[0], other, rtol=1e-3, atol=1e-4)


def test_momentum_is_there_before_the_first_step_and_changes_nothing(digits):
    """Zeros make the same first step as none, bit for bit."""
    step, (model, method, optimizer, scaler) = new_step(digits), new_parts(digits)
    late = Step(model, method, optimizer, scaler, CPU)
    optimizer.state.clear()
    assert all((s["momentum_buffer"] == 0).all() for s in step.optimizer.state.values())
    assert len(step.optimizer.state) == len(list(model.parameters()))
    for one in (step, late):
        run(digits, one, steps=3)
    for (key, a), b in zip(state(step).items(), state(late).values(), strict=True):
        assert torch.equal(a, b), key


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.fixture
def deterministic():
    """On CUDA: kernels whose sums do not depend on what runs first."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def first_loss(data, precision, device=CPU, compiled=False, steps=1):
    with matmul_precision(precision):
        step = run(data, new_step(data, precision, device, compiled), steps=steps, device=device)
    return step, step.meter.last_step()["loss"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", pytest.param("tf32", marks=CUDA)])
def test_one_step_in_another_precision_has_nearly_the_loss_of_fp32(digits, precision, device):
    step, loss = first_loss(digits, precision, device)
    strict, strict_loss = first_loss(digits, "fp32", device)
    with autocast(precision, torch.device(device)):  # convolutions are in half precision, logits are not
        logits, features = step.model(torch.zeros(2, 3, 8, 8, device=device), with_features=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    assert (features.dtype, logits.dtype) == (half.get(precision, torch.float32), torch.float32)
    assert loss == pytest.approx(strict_loss, abs=2e-2)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state(step).values())
    start = state(new_step(digits))
    moves = [
        torch.cat([(value - start[key]).flatten() for key, value in state(one).items() if key.endswith("weight")])
        for one in (step, strict)
    ]
    assert F.cosine_similarity(*moves, dim=0) > 0.9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [None, 2.0**20])
@pytest.mark.parametrize("spa", [None, "proj"])
def test_fp16_skips_and_counts_a_step_whose_gradients_overflow_and_lowers_the_scale(digits, device, limit, spa):
    step = new_step(digits, "fp16", device, spa=spa)
    step.max_grad_norm = limit
    before = copy.deepcopy(state(step))
    step.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**40)
    run(digits, step, steps=1, device=device)
    for (key, value), old in zip(state(step).items(), before.values(), strict=True):
        assert torch.equal(value, old) or "running" in key or "tracked" in key, key
    assert (step.scaler.get_scale(), step.meter.counts()["skipped_steps"]) == (2.0**39, 1)
    step.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**10)
    run(digits, step, steps=1, device=device)  # the count begins anew
    assert step.meter.counts()["skipped_steps"] == 0
    assert all((value != 0).any() for key, value in state(step).items() if "momentum" in key)
    assert all(value.isfinite().all() for value in state(step).values())


def norm_and_gradient(data, precision, limit, **terms):
    """Of what the optimizer is given in the first step; the scale of fp16 does not count."""
    step = new_step(data, precision, **terms)
    step.max_grad_norm = limit
    scale, seen = step.scaler.get_scale(), []

    def look(optimizer, *_):
        still_scaled = getattr(optimizer, "grad_scale", None) is not None
        gradient = torch.cat([p.grad.flatten() for p in step.model.parameters()])
        seen.append(gradient / (scale if still_scaled else 1))

    step.optimizer.register_step_pre_hook(look)
    run(data, step, steps=1)
    return float(seen[0].norm()), seen[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_longer_gradients_are_scaled_to_the_limit_and_shorter_ones_stay(digits, precision):
    norm, plain = norm_and_gradient(digits, precision, None)
    for limit, factor in ((norm / 2, 0.5), (2 * norm, 1.0)):
        _, limited = norm_and_gradient(digits, precision, limit)
        torch.testing.assert_close(limited, factor * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_projected_before_they_are_limited(digits, precision):
    norm, projected = norm_and_gradient(digits, precision, None, spa="proj")
    assert norm < 0.999 * norm_and_gradient(digits, precision, None)[0]
    _, limited = norm_and_gradient(digits, precision, norm / 2, spa="proj")
    torch.testing.assert_close(limited, projected / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clamp", [30.0, None])
def test_the_meter_counts_what_the_loss_clamps(digits, clamp):
    model, _, optimizer, scaler = new_parts(digits)
    method = build_method("arb", "batch", digits.class_counts, 0.0, clamp=clamp)
    step = Step(model, method, optimizer, scaler, CPU)
    with torch.no_grad():
        model.classifier.fc.bias[3] = 1e4
    run(digits, step, steps=2)
    assert step.meter.counts()["clamped_logits"] == (0 if clamp is None else 64)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.soak
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_compiled_step_has_nearly_the_loss_of_an_eager_one(digits, precision, tolerance):
    torch.compiler.reset()
    compiled, loss = first_loss(digits, precision, compiled=True)
    assert loss == pytest.approx(first_loss(digits, "fp32")[1], abs=tolerance)
    assert list(compiled.model.state_dict()) == list(new_parts(digits)[0].state_dict())


@pytest.mark.slow
def test_compiling_is_done_once_and_the_smaller_batch_is_not_compiled(digits):
    torch.compiler.reset()
    step = new_step(digits, compiled=True)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        run(digits, step, steps=1)  # such a batch would be compiled
    run(digits, step, steps=2)
    step.start_epoch(0)
    everything = list(batches_and_draws(digits, step, 0))
    assert not everything[-1][0].full
    eager = new_step(digits)
    take_over(step, eager)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(*everything[0])
        eager(*everything[0])
        for (key, a), b in zip(state(step).items(), state(eager).values(), strict=True):
            assert torch.dist(a.double(), b.double()) <= 1e-2 * b.double().norm(), key
        take_over(step, eager)
        step(*everything[-1])
        eager(*everything[-1])
    for (key, a), b in zip(state(step).items(), state(eager).values(), strict=True):
        assert torch.equal(a, b), key  # both eager, from the same weights


def test_compiling_without_a_compiler_is_refused(monkeypatch, digits):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"^compile: True needs a C\+\+ compiler"):
        compile_model(new_parts(digits)[0], CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Recorded. The CPU has no graphs: there a recording runs the function as warm-up does, and replays by calling it.


class Recorder:
    """Counts; ``capture_cuda_graph`` with a CPU's means."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, function):
        self.recordings += 1
        for _ in range(3):
            function()

        def replay():
            self.replays += 1
            function()

        return replay


def recorded(data, device, precision="fp32", recorder=None, **options):
    step = new_step(data, precision, device, **options)
    return GraphedStep(step, (recorder or Recorder()) if torch.device(device) == CPU else None)


RECORDED = [(CPU, "fp32"), *(pytest.param("cuda", p, marks=CUDA) for p in ("fp32", "bf16", "fp16"))]


@pytest.mark.parametrize(("device", "precision"), RECORDED)
def test_twenty_recorded_steps_are_twenty_eager_ones(digits, device, precision, deterministic):
    """More than one epoch of 15: smaller batches come in between, and the learning rate changes."""
    steps = [new_step(digits, precision, device), recorded(digits, device, precision)]
    for step in steps:
        optimizer = getattr(step, "step", step).optimizer
        for epoch, lr in ((0, 1e-3), (1, 2e-4)):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            step.start_epoch(epoch)
            for number, (batch, draw) in enumerate(batches_and_draws(digits, step, epoch, device=device)):
                if epoch == 0 or number < 6:
                    step(batch, draw)
    assert_close(*steps, rtol=1e-4, atol=1e-6 if precision == "fp32" else 1e-4)
    eager, replayed = (step.meter for step in steps)
    assert eager.averages() == pytest.approx(replayed.averages(), rel=1e-4)
    assert eager.last_step() == pytest.approx(replayed.last_step(), rel=1e-4)
    assert int(replayed.steps) == 6


def test_recording_is_done_once_and_the_smaller_batch_runs_as_it_is(digits):
    recorder = Recorder()
    step = run(digits, recorded(digits, CPU, recorder=recorder), epochs=2)
    loader = digits.train_loader(32, 0, CPU)
    assert len(loader.targets) % 32  # there is a smaller one
    assert (recorder.recordings, recorder.replays) == (1, 2 * (len(loader) - 1))
    assert int(step.meter.steps) == len(loader)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spa", ["proj", "slerp"])
def test_recorded_steps_move_class_means_and_rows_as_eager_ones_do(digits, device, spa, deterministic):
    """Recorded once: what slerp changes from epoch to epoch is on the device."""
    terms = {"nc_rows": 1.0, "nc_means": 1.0, "nc_dual": 1.0, "spa": spa, "spa_step": 0.5, "num_epochs": 2}
    recorder = Recorder()
    eager, graphed = new_step(digits, device=device, **terms), recorded(digits, device, recorder=recorder, **terms)
    for step in (eager, graphed):
        run(digits, step, epochs=2, steps=3, device=device)
    assert_close(eager, graphed, rtol=1e-4, atol=1e-6)
    for a, b in zip(eager.method.buffers(), graphed.method.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (recorder.recordings, recorder.replays) == ((1, 6) if device == CPU else (0, 0))
    still = new_step(digits, device=device, **terms | {"spa": None})
    run(digits, still, epochs=2, steps=3, device=device)
    assert torch.dist(still.model.classifier.fc.weight, eager.model.classifier.fc.weight) > 1e-3


def test_recording_changes_nothing(digits):
    """Warm-up steps leave no trace in weights, statistics, momentum, scaler or meter."""
    step = new_step(digits, "fp16")
    run(digits, step, steps=2)
    before, scaling = copy.deepcopy(state(step)), step.scaler.state_dict()
    meter = [tensor.clone() for tensor in step.meter.tensors()]

    def no_replay(function):
        Recorder()(function)
        return lambda: None

    recording = GraphedStep(step, no_replay)
    recording(*next(iter(batches_and_draws(digits, step, 0))))
    assert recording.replay is not None
    for (key, value), old in zip(state(step).items(), before.values(), strict=True):
        assert torch.equal(value, old), key
    assert step.scaler.state_dict() == scaling
    for tensor, old in zip(step.meter.tensors(), meter, strict=True):
        assert torch.equal(tensor, old)


def checkpoint(step, path) -> dict:
    """What a file holds after it was written."""
    step = getattr(step, "step", step)
    parts = {"model": step.model, "method": step.method, "optimizer": step.optimizer, "scaler": step.scaler}
    save_checkpoint(path, **parts, state=TrainState(1), config={}, selected_on="test set")
    return read_checkpoint(path)


@pytest.mark.parametrize(("device", "precision"), RECORDED)
def test_steps_recorded_after_a_resume_are_eager_ones(digits, tmp_path, device, precision, deterministic):
    """Momentum and scale are the file's; it was written without fused, as files once were."""
    content = checkpoint(run(digits, new_step(digits, precision, device), steps=4, device=device), tmp_path / "a")
    content["optimizer"]["param_groups"][0] |= {"fused": None, "lr": 7.0, "weight_decay": 7.0}
    steps = []
    for kind in (Step, GraphedStep):
        parts = new_parts(digits, precision, device, seed=1)
        restore(copy.deepcopy(content), "a", *parts)  # it hands its tensors over
        step = Step(*parts, torch.device(device), precision)
        if kind is GraphedStep:
            step = GraphedStep(step, Recorder() if device == CPU else None)
        group = parts[2].param_groups[0]
        assert (group["fused"], float(group["lr"]), group["weight_decay"]) == (True, pytest.approx(LR), 1e-3)
        steps.append(run(digits, step, epochs=2, steps=10, device=device))
    assert_close(*steps, rtol=1e-4, atol=1e-6 if precision == "fp32" else 1e-4)


def test_what_a_recording_reads_stays_where_it_is(digits, tmp_path):
    """Learning rate, momentum and weights, over a change of the rate and a smaller batch."""
    recorder = Recorder()
    step = recorded(digits, CPU, recorder=recorder)
    optimizer = step.step.optimizer
    rate, places = optimizer.param_groups[0]["lr"], [tensor.data_ptr() for tensor in step.step.tensors()]
    assert rate.ndim == 0
    run(digits, step)
    set_lr(optimizer, load_config("config/digits/digits_imb005.yaml", ["lr", "0.5", "warmup_epochs", "0"]), 0)
    run(digits, step, steps=1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.5
    assert [tensor.data_ptr() for tensor in step.step.tensors()] == places
    stored = checkpoint(step, tmp_path / "a")["optimizer"]["param_groups"][0]["lr"]
    assert (type(stored), stored) == (float, 0.5)
    assert recorder.recordings == 1
    step.step.method.start_epoch = lambda epoch: epoch == 1  # something sets in
    run(digits, step, epochs=3, steps=2)
    assert recorder.recordings == 2


def test_a_step_of_another_optimizer_cannot_be_recorded(digits):
    model, method, _, scaler = new_parts(digits)
    plain = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="needs a fused optimizer"):
        GraphedStep(Step(model, method, plain, scaler, CPU))


def test_a_recorded_step_that_diverges_is_found(digits):
    step = recorded(digits, CPU)
    run(digits, step, steps=3)
    with torch.no_grad():
        step.model.classifier.fc.bias[0] = torch.nan
    run(digits, step, steps=2)
    assert step.meter.first_bad_step() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Watched


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recording", [False, True])
def test_a_watched_step_shows_each_pass_s_own_output(digits, device, recording):
    """Also where the recording has gone on in between, and in an epoch's smaller batch; against an eager twin."""
    seen = []

    def watch(logits, features, batch, draw):
        seen.append((batch.number, logits.clone(), features.clone()))

    make = recorded if recording else new_step
    watched = ProfiledStep(make(digits, device=device, keep_outputs=True), watch, every=1)
    twin = new_step(digits, device=device)
    for step in (watched, twin):
        step.start_epoch(0)
    expected = []
    for (batch, draw), (same, same_draw) in zip(
        batches_and_draws(digits, watched, 0, device=device),
        batches_and_draws(digits, twin, 0, device=device),
        strict=True,
    ):
        model = copy.deepcopy(twin.model).train()
        expected.append(twin.method(model, same.augment(), same.targets, same_draw, same.step_targets))
        watched(batch, draw)
        twin(same, same_draw)
    assert [number for number, *_ in seen] == list(range(15))
    for (_, logits, features), output in zip(seen, expected, strict=True):
        torch.testing.assert_close(logits, output.logits.detach(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features, output.features.detach(), rtol=1e-3, atol=1e-3)


def test_watching_changes_nothing(digits):
    """Every so many steps are watched, with all their passes."""
    numbers = []
    watched = ProfiledStep(new_step(digits, keep_outputs=True), lambda *seen: numbers.append(seen[2].number), every=4)
    one, other = (state(run(digits, step, accumulate=2)) for step in (new_step(digits), watched))
    assert numbers == [0, 0, 4, 4, 8, 8, 12, 12]
    assert all(torch.equal(one[name], other[name]) for name in one)
