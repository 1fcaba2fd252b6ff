"""CutMix and CMO: boxes and labels, the second draw of images, and a step against one written out."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from datasets import build_data
from methods import build_method
from methods.cutmix import draw, paste
from methods.method import step_counts
from methods.mixing import new_mixing
from tests.test_loaders import CPU, assert_bit_equal, joined
from tests.test_step import new_parts, new_step
from tests.test_streaming import SIZE, folder, train_loader

__all__ = ["folder"]  # a fixture
SIDE = 32


def test_the_weight_is_the_share_of_the_area_that_is_left():
    images, targets = torch.rand(8, 3, SIDE, SIDE), torch.arange(8)
    for draws in draw(1.0, [8] * 50, 0, 0, SIDE, 0.5, second=False):
        mixed, own, pasted = paste(images, targets, *draws)
        top, left, bottom, right = draws.box.tolist()
        expected = images.clone()
        expected[:, :, top:bottom, left:right] = images[draws.partner][:, :, top:bottom, left:right]
        assert torch.equal(mixed, expected)
        assert float(draws.lam) == pytest.approx(1 - (bottom - top) * (right - left) / SIDE**2)
        assert torch.equal(own, targets)
        assert torch.equal(pasted, targets[draws.partner] if draws.lam < 1 else targets)


def test_half_of_the_steps_mix_and_centres_lie_anywhere():
    draws = draw(1.0, [1] * 8000, 0, 3, 1000, 0.5, second=False)
    mixed = torch.stack([row.box for row in draws if row.lam < 1]).double()
    assert 0.47 < len(mixed) / len(draws) < 0.53
    whole = (mixed[:, :2] > 0).all(1) & (mixed[:, 2:] < 1000).all(1)  # not cut off at the border
    sides = (mixed[:, 2:] - mixed[:, :2])[whole]
    assert torch.equal(sides[:, 0], sides[:, 1])
    small = mixed[whole][sides[:, 0] < 300]
    centres = ((small[:, :2] + small[:, 2:]) / 2 - 150) / 700  # boxes of 300 pixels fit there
    inner = centres[(centres > 0).all(1) & (centres < 1).all(1)]
    assert stats.kstest(inner.flatten().numpy(), "uniform").pvalue > 1e-3


def test_a_large_image_shows_the_beta_distribution_of_the_lambdas():
    """Of boxes that the border does not cut: for a given lambda they are a share (1 - sqrt(1 - lambda))^2 of all."""
    side = 10**5
    rows = draw(2.0, [1] * 20_000, 0, 0, side, 1.0, second=False)
    boxes = torch.stack([row.box for row in rows]).double() / side
    inner = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 1).all(1)
    cut = boxes[inner, 2] - boxes[inner, 0]  # sqrt(1 - lambda)
    weights = 1 / (1 - cut).clamp(min=0.05) ** 2
    mean = float((weights * (1 - cut**2) * (cut < 0.95)).sum() / (weights * (cut < 0.95)).sum())
    beta = stats.beta(2, 2)
    expected = beta.expect(lambda lam: lam, lb=1 - 0.95**2) / beta.sf(1 - 0.95**2)
    assert mean == pytest.approx(expected, abs=0.02)


def test_draws_do_not_depend_on_the_batch_sizes_and_differ_between_epochs():
    ours, theirs = (draw(1.0, sizes, 1, 2, SIDE, 0.5, second=False) for sizes in ([8, 8, 3], [8, 8, 2]))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.box, b.box)
        assert torch.equal(a.lam, b.lam)
    other = draw(1.0, [8] * 30, 1, 3, SIDE, 0.5, second=False)
    assert any(
        not torch.equal(a.box, b.box)
        for a, b in zip(draw(1.0, [8] * 30, 1, 2, SIDE, 0.5, second=False), other, strict=True)
    )
    assert draw(1.0, [4], 0, 0, SIDE, 0.5, second=True)[0].partner.tolist() == [4, 5, 6, 7]


def test_cmo_is_off_in_the_first_and_last_epochs():
    method = build_method("ce", "global", torch.tensor([8, 4, 1]), mixing=new_mixing("cmo", 1.0, SIDE, 0.5, 3, 10))
    changes = [(method.start_epoch(epoch), method.pastes) for epoch in range(10)]
    assert [pastes for _, pastes in changes] == [False] * 3 + [True] * 4 + [False] * 3
    assert [epoch for epoch, (changed, _) in enumerate(changes) if changed] == [3, 7]


# ---------------------------------------------------------------------------------------------------------------------
# The second draw


@pytest.fixture(scope="module")
def digits():
    return build_data("digits", "", imb_factor=0.05, image_size=8)


def loader_of(data, **options):
    weights = 1 / data.class_counts.double()
    return data.train_loader(32, 0, CPU, paste_weights=weights, **options)


@pytest.mark.parametrize(("power", "shares"), [(0.0, "natural"), (1.0, "uniform")])
def test_pasted_images_are_drawn_by_the_weights_of_their_classes(digits, power, shares):
    counts = digits.class_counts.double()
    loader = digits.train_loader(32, 0, CPU, paste_weights=counts**-power)
    seen = torch.cat([loader.targets[loader.pasted(epoch)] for epoch in range(40)])
    expected = counts / counts.sum() if shares == "natural" else torch.full((10,), 0.1, dtype=torch.float64)
    found = torch.bincount(seen, minlength=10).double()
    assert stats.chisquare(found.numpy(), (expected * found.sum()).numpy()).pvalue > 1e-4


def test_a_batch_brings_its_own_images_and_as_many_to_paste(digits):
    loader = loader_of(digits)
    pasted = loader.pasted(4)
    for plain, batch in zip(loader.epoch(4), loader.epoch(4, paste=True), strict=True):
        images, size = batch.augment(), len(batch.targets)
        assert len(images) == 2 * size
        assert torch.equal(images[:size], plain.augment())
        assert torch.equal(batch.targets, plain.targets)
        assert torch.equal(batch.pasted_targets, loader.targets[pasted[batch.indices]])
        assert len(plain.pasted_targets) == 0


def test_copies_of_a_pasted_image_are_cropped_differently(digits):
    loader = loader_of(digits)
    chosen = torch.zeros(60, dtype=torch.int64)
    rows = torch.arange(60) + len(loader.targets)
    (inputs,) = loader.pixels.train_inputs(chosen, [slice(0, 60)], 0, 0, rows)
    assert len(loader.pixels.augment(*inputs).flatten(1).unique(dim=0)) > 5
    again = loader.pixels.augment(*next(iter(loader.pixels.train_inputs(chosen, [slice(0, 60)], 0, 0, rows))))
    assert torch.equal(again, loader.pixels.augment(*inputs))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_paste_what_one_pastes(digits, world_size):
    def parts(batches):
        """The pasted images as a batch of their own."""
        for batch in batches:
            inputs = tuple(table[len(batch.targets) :] for table in batch.inputs)
            yield batch._replace(inputs=inputs, targets=batch.pasted_targets)

    ranks = [parts(loader_of(digits, rank=r, world_size=world_size).epoch(3, paste=True)) for r in range(world_size)]
    together = [joined(found) for found in zip(*ranks, strict=True)]
    assert_bit_equal(together, list(parts(loader_of(digits).epoch(3, paste=True))))


@pytest.mark.parametrize("workers", [0, 2])
def test_large_images_are_pasted_from_crops_of_their_own(folder, workers):
    loader = train_loader(folder, workers, weights=torch.ones(5))
    first, again = (list(loader.epoch(1, paste=True)) for _ in range(2))
    for batch, other in zip(first, again, strict=True):
        assert torch.equal(batch.augment(), other.augment())
    images = torch.cat([batch.augment()[len(batch.targets) :] for batch in first])
    assert len(images.flatten(1).unique(dim=0)) == SIZE  # though some of the 23 are drawn twice
    assert len(loader.pasted(1).unique()) < SIZE


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_a_pasted_class_that_the_batch_lacks_has_the_count_to_be_expected_in_it():
    class_counts, targets, pasted = torch.tensor([60, 30, 9, 1]), torch.tensor([0, 0, 0, 1]), torch.tensor([1, 0, 3, 1])
    assert step_counts("batch", targets, class_counts, pasted=pasted).tolist() == pytest.approx([3, 1, 0, 0.04])
    assert step_counts("global", targets, class_counts, pasted=pasted).tolist() == [60, 30, 9, 1]
    assert step_counts("global_masked", targets, class_counts, pasted=pasted).tolist() == pytest.approx(
        [60, 30, 0, 0.04]
    )
    everyone = torch.tensor([0, 0, 0, 1, 2, 0, 0, 1])
    synced = step_counts("batch_synced", targets, class_counts, everyone, pasted)
    assert synced.tolist() == pytest.approx([5, 2, 1, 0.08])


@pytest.mark.parametrize("kind", ["cutmix", "cmo"])
@pytest.mark.parametrize("counts", ["batch", "global"])
def test_steps_are_those_of_a_loop_written_out(digits, kind, counts):
    """Boxes, both labels, counts of the unmixed batch; torch's plain SGD."""
    step = new_step(digits)
    mixing = new_mixing(kind, 1.0, 8, 0.7, 0, 10)
    step.method = build_method("arb", counts, digits.class_counts, mixing=mixing)
    loader = loader_of(digits)
    draws = step.method.draws(loader.batch_sizes, 0, 0)
    chosen = list(zip(loader.epoch(0, paste=step.method.pastes), draws, strict=True))[:4]
    assert len({bool(drawn.lam < 1) for _, drawn in chosen}) == 2  # some steps mix
    model, *_ = new_parts(digits)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3, foreach=False)
    step.start_epoch(0)
    for batch, drawn in chosen:
        step(batch, drawn)
        images, size, n = batch.augment(), len(batch.targets), digits.class_counts.double()
        others = images[size:] if kind == "cmo" else images[drawn.partner]
        labels = batch.pasted_targets if kind == "cmo" else batch.targets[drawn.partner]
        top, left, bottom, right = drawn.box.tolist()
        mixed = images[:size].clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / 64
        if counts == "batch":
            expected = n * size / n.sum()
            n = torch.bincount(batch.targets, minlength=10).double()
            for label in labels.tolist() if lam < 1 else []:
                n[label] = n[label] or expected[label]
        logits = model(mixed).clamp(-30, 30) + n.log().float()
        loss = lam * F.cross_entropy(logits, batch.targets)
        loss = loss + (1 - lam) * F.cross_entropy(logits, labels) if lam < 1 else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = step.model.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cutmix", "cmo"])
def test_components_are_those_of_the_mixed_loss(digits, kind):
    """Their sums over the batch are the gradient of the classifier's rows, times the number of images."""
    method = build_method("arb", "batch", digits.class_counts, mixing=new_mixing(kind, 1.0, 8, 1.0, 0, 10))
    loader, (model, *_) = loader_of(digits), new_parts(digits)
    draws = method.draws(loader.batch_sizes, 0, 0)
    batch = next(loader.epoch(0, paste=method.pastes))
    labels = (batch.targets, draws[0], batch.step_targets, batch.pasted_targets)
    output = method(model, batch.augment(), *labels)
    output.loss.backward()
    found = method.components(output.logits, output.features.detach(), *labels)
    bias = len(batch.targets) * model.classifier.fc.bias.grad.double()
    torch.testing.assert_close(found.repulsion_mass - found.attraction_mass, bias, rtol=1e-3, atol=1e-4)
