"""Components against autograd, class by class, and against loops over samples; their time and memory."""

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from datasets.loaders import Batch
from methods import build_method
from methods.component_meter import ComponentMeter
from methods.gradients import component_norms, components
from methods.losses import arb_loss
from methods.mixup import StepDraws
from models import build_model
from models.classifier import LinearClassifier
from models.model import Model
from tests.conftest import ROOT
from utils.precision import new_scaler
from utils.step import Step

CLASSES, FEATURES, BATCH = 6, 5, 14
CPU = torch.device("cpu")


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(CLASSES, FEATURES, generator=random, dtype=torch.float64)
    features = torch.randn(BATCH, FEATURES, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 4, (BATCH,), generator=random)  # classes 4 and 5 are absent
    partners = targets[torch.randperm(BATCH, generator=random)]
    return weight, features, targets, partners


def vectors_by_autograd(weight, features, counts, parts) -> torch.Tensor:
    """``parts``: (share of the loss, targets) pairs; entry [i, j] is class j's part of row i's gradient, [C, C, D]."""
    columns = []
    for label in range(CLASSES):
        weight = weight.detach().requires_grad_()
        logits = features @ weight.T
        total = sum(
            share * (arb_loss(logits, targets, counts, "none", clamp=None) * (targets == label)).sum()
            for share, targets in parts
        )
        columns.append(torch.autograd.grad(total, weight)[0])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("counts", [None, [4, 5, 3, 2, 0, 0], [500, 200, 70, 30, 10, 3]], ids=["ce", "batch", "global"])
def test_true_rows_equal_autograd(batch, counts):
    weight, features, targets, _ = batch
    n = None if counts is None else torch.tensor(counts)
    table = component_norms(features @ weight.T, features, targets, n, absent_rows="true")
    expected = vectors_by_autograd(weight, features, torch.ones(CLASSES) if n is None else n, [(1.0, targets)])
    torch.testing.assert_close(table, expected.norm(dim=2))


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_under_mixup_components_are_those_of_the_mixed_loss(batch, lam):
    weight, features, targets, partners = batch
    n = torch.tensor([500, 200, 70, 30, 10, 3])
    table = component_norms(features @ weight.T, features, targets, n, "true", mixed=(partners, lam))
    expected = vectors_by_autograd(weight, features, n, [(0.3, targets), (0.7, partners)])
    torch.testing.assert_close(table, expected.norm(dim=2))


def test_under_mixup_the_columns_add_up_to_the_step_s_gradient(batch):
    """The gradient that the method itself leaves on the classifier; the loss is a mean, components are sums."""
    weight, features, targets, _ = batch
    classifier = LinearClassifier(FEATURES, CLASSES).double()
    classifier.fc.weight.data = weight.clone()
    classifier.fc.bias.data.zero_()
    method = build_method("arb", "global", torch.tensor([500, 200, 70, 30, 10, 3]), mixup_alpha=1.0, clamp=None)
    draws = StepDraws(torch.tensor(0.3, dtype=torch.float64), torch.randperm(BATCH))
    output = method(Model(torch.nn.Identity(), classifier), features, targets, draws)
    output.loss.backward()
    mixed = 0.3 * features + 0.7 * features[draws.partner]
    parts = [(0.3, targets), (0.7, targets[draws.partner])]
    vectors = vectors_by_autograd(weight, mixed, method.class_counts, parts)
    torch.testing.assert_close(vectors.sum(dim=1), classifier.fc.weight.grad * BATCH, rtol=1e-5, atol=1e-6)
    arguments = (output.logits, output.features, targets, method.class_counts, "true")
    table = component_norms(*arguments, mixed=(targets[draws.partner], 0.3))
    torch.testing.assert_close(table, vectors.norm(dim=2), rtol=1e-5, atol=1e-6)


def test_zero_rows_leave_out_classes_absent_from_the_batch(batch):
    weight, features, targets, _ = batch
    logits = features @ weight.T
    true = component_norms(logits, features, targets, absent_rows="true")
    zero = component_norms(logits, features, targets)
    assert (zero[4:] == 0).all()
    assert (true[4:, :4] > 0).all()
    assert (true[:, 4:] == 0).all()  # the columns of absent classes
    torch.testing.assert_close(zero[:4], true[:4])
    with pytest.raises(ValueError, match="known are zero, true"):
        component_norms(logits, features, targets, absent_rows="skip")


def test_components_equal_loops_over_classes_and_samples(batch):
    """Of a mixed batch; the cosine is the mean over pairs of repelling classes."""
    weight, features, targets, partners = batch
    probs = F.softmax(features @ weight.T, dim=1)
    labels, shares = torch.stack([targets, partners]), torch.tensor([0.3, 0.7])
    residuals = torch.stack([probs - F.one_hot(y, CLASSES) for y in labels])
    vectors = torch.zeros(CLASSES, CLASSES, FEATURES, dtype=torch.float64)  # [i, j]
    attraction, repulsion = torch.zeros(2, CLASSES, dtype=torch.float64)
    for y, share in zip(labels, shares.double(), strict=True):
        for s in range(BATCH):
            for i in range(CLASSES):
                vectors[i, y[s]] += share * (probs[s, i] - (y[s] == i).double()) * features[s]
                if y[s] == i:
                    attraction[i] += share * (1 - probs[s, i])
                else:
                    repulsion[i] += share * probs[s, i]
    parts = components(residuals, features, labels, shares)
    torch.testing.assert_close(parts.attraction_mass, attraction)
    torch.testing.assert_close(parts.repulsion_mass, repulsion)
    assert sorted(parts.labels[parts.first].tolist()) == sorted(set(torch.cat(batch[2:]).tolist()))
    torch.testing.assert_close(parts.norms, vectors.norm(dim=2).T[parts.labels])
    for i in range(CLASSES):
        repelling = [v for j, v in enumerate(vectors[i]) if j != i and v.norm() > 0]
        cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(repelling, 2)]
        assert float(parts.repulsion_cosine[i]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-9)


def test_parallel_repulsion_has_cosine_one_and_opposite_repulsion_minus_one():
    residuals = torch.tensor([[[0.5, -0.5, 0.0], [0.2, 0.0, -0.2]]])
    for second, cosine in ((2.0, 1.0), (-2.0, -1.0)):
        features = torch.tensor([[1.0, 1.0], [second, second]])
        parts = components(residuals, features, torch.tensor([[1, 2]]), torch.ones(1))
        assert float(parts.repulsion_cosine[0]) == pytest.approx(cosine)
    residuals = torch.tensor([[[-0.4, 0.4], [0.3, -0.3]]])  # on each row only the other class repels
    parts = components(residuals, torch.eye(2), torch.tensor([[0, 1]]), torch.ones(1))
    assert parts.repulsion_cosine.isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Cost


LARGE = """
import resource, sys, time
import torch
from methods.gradients import component_norms
torch.manual_seed(0)
features = torch.rand(128, 2048)
logits = features @ torch.randn(8142, 2048).T / 45
targets, partner = torch.randint(0, 8142, (128,)), torch.randperm(128)
mixed = (targets[partner], 0.3) if sys.argv[1] == "mixed" else None
component_norms(logits[:8, :50], features[:8], targets[:8] % 50)  # what the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
table = component_norms(logits, features, targets, torch.arange(8142) + 1, "true", mixed)
seconds = time.process_time() - began
table.sum()  # written in full
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(seconds, used - table.numel() * table.element_size())
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["mixed", "plain"])
def test_8142_classes_take_less_than_two_seconds_and_a_gibibyte(mixing):
    """Processor time of all threads, which a busy machine does not change; memory as the system sees it."""
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # one that waits takes no processor time
    command, environment = [sys.executable, "-c", LARGE, mixing], {**os.environ, **threads}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seconds, beyond_output = map(float, done.stdout.split())
    assert seconds < 2
    assert beyond_output < 2**30


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_at_100_classes_they_cost_less_than_5_percent_of_a_step(one_thread):
    """Of the very step that is trained, watched in every step; the fastest of turns taken in one run.

    On one thread: several that share busy cores wait for one another, in small operations above all.
    """
    torch.manual_seed(0)
    model = build_model("cifar100", "resnet32", 100)
    method = build_method("arb", "batch", torch.arange(100, 0, -1), mixup_alpha=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    step = Step(model, method, optimizer, new_scaler("fp32", CPU), CPU, keep_outputs=True)
    images, targets = torch.randn(128, 3, 32, 32), torch.randint(0, 100, (128,))
    draws = StepDraws(torch.tensor(0.3), torch.randperm(128))
    batch = Batch((images,), lambda held: held, targets, targets, targets, targets[:0], 1.0, True, True, 0)
    meter = ComponentMeter(100, [0, 50, 99], 0, CPU)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        step(batch, draws)
        between = time.perf_counter()
        meter.update(method.components(*step.outputs[128], targets, draws, targets))
        times.append((between - began, time.perf_counter() - between))
    steps, watched = (min(column) for column in zip(*times[1:], strict=True))
    assert watched < 0.05 * steps
