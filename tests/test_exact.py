"""The statements of methods/EXACT.md, one test each.

Population risks are exact: sums over every composition of a batch, in a world of three classes and four values of x.
Legend: B samples, C classes, X values of x, N_k the training set's count of class k, n_k the batch's. Logits are a
table z [X, C], free at every x.
"""

import itertools
import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from datasets.long_tail import long_tail_counts, long_tail_indices
from methods import build_method, losses
from methods.gradients import component_norms
from methods.losses import arb_loss
from methods.method import step_counts
from methods.mixup import StepDraws

CLASS_COUNTS = torch.tensor([90, 9, 1])
LIKELIHOOD = torch.tensor(  # p(x|y), [C, X]
    [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2], [0.2, 0.1, 0.3, 0.4]], dtype=torch.float64
)
TRUTH = LIKELIHOOD.T.log()  # [X, C]
BATCH_SIZES = pytest.mark.parametrize("batch_size", [2, 3, 5])
NUMERICAL_ERROR = 1e-5  # of a minimiser, in nats


def unreduced(logits, targets, counts):
    return arb_loss(logits, targets, counts, "none")


def weighted_arb(logits, targets, counts):
    return losses.weighted_arb(logits, targets[None], counts)[0]


@lru_cache
def compositions(batch_size: int, classes: int) -> list[tuple[int, ...]]:
    """Every (n_1, ..., n_C) that adds up to ``batch_size``."""
    if classes == 1:
        return [(batch_size,)]
    return [(n, *rest) for n in range(batch_size + 1) for rest in compositions(batch_size - n, classes - 1)]


def multinomial(n, prior) -> float:
    ways = math.factorial(sum(n)) // math.prod(map(math.factorial, n))
    return ways * math.prod(p**k for k, p in zip(n, prior, strict=True))


def batches(batch_size, kind, class_counts):
    """(probability, n [C], the counts that the loss reads [C]) of every composition."""
    prior = (class_counts.double() / class_counts.sum()).tolist()
    for composition in compositions(batch_size, len(class_counts)):
        n = torch.tensor(composition)
        labels = torch.repeat_interleave(torch.arange(len(n)), n)
        yield multinomial(composition, prior), n, step_counts(kind, labels, class_counts)


def risk(batch_size, kind, class_counts=CLASS_COUNTS, likelihood=LIKELIHOOD, loss=unreduced, weights=None):
    """Expected mean loss of a batch, as a function of z [X, C].

    A sample of a batch of counts n has label y with probability n_y / B, and then x ~ p(x|y). With ``weights [C]`` the
    mean is the weighted one, divided by the weights of the batch.
    """
    terms = []
    for probability, n, counts in batches(batch_size, kind, class_counts):
        x, y = torch.cartesian_prod(torch.arange(likelihood.shape[1]), n.nonzero().squeeze(1)).unbind(1)
        shares = n.double() if weights is None else n * weights
        terms.append((probability * (shares / shares.sum())[y] * likelihood[y, x], x, y, counts))
    return lambda z: sum((share * loss(z[x], y, counts)).sum() for share, x, y, counts in terms)


def minimise(function, shape):
    """LBFGS from a random start."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=2000, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-17, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = function(z)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert z.grad.abs().max() < 1e-8, "no minimum was reached"
    return z.detach()


def offsets(z, truth=TRUTH):
    """z - log p(x|y) [X, C], up to a constant per x: 0 for the most frequent class, which is the first."""
    difference = z - truth
    return difference - difference[..., :1]


def shift(batch_size, kind, **world):
    """:func:`offsets` of the risk's minimiser."""
    truth = world.get("likelihood", LIKELIHOOD).T.log()
    return offsets(minimise(risk(batch_size, kind, **world), truth.shape), truth)


def assert_close(actual, expected, tolerance=NUMERICAL_ERROR):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected).expand_as(actual), rtol=0, atol=tolerance, check_dtype=False
    )


def example(batch=40, classes=7, scale=3.0):
    """Logits, labels and counts, the last class absent."""
    random = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(batch, classes, generator=random, dtype=torch.float64)
    targets = torch.randint(0, classes - 1, (batch,), generator=random)
    counts = torch.randint(1, 1000, (classes,), generator=random)
    counts[-1] = 0
    return logits.requires_grad_(), targets, counts


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_every_statement_names_tests_that_exist():
    text = (Path(__file__).parent.parent / "methods" / "EXACT.md").read_text()
    named = {word.strip("`.,;:()") for word in text.split() if word.strip("`(").startswith("test_")}
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_every_statement_names_tests_that_exist"}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Cross-entropy on shifted logits


@pytest.mark.parametrize("classes", [7, 1001])
def test_arb_is_cross_entropy_on_shifted_logits(classes):
    logits, targets, counts = example(classes=classes)
    loss = arb_loss(logits, targets, counts, clamp=None)
    expected = F.cross_entropy(logits + counts.double().log(), targets)
    assert_close(loss, expected, 1e-13)
    assert_close(gradient(loss, logits), gradient(expected, logits), 1e-15)


def test_arb_is_equation_14_as_printed():
    z, y, n = example()
    ratios = n / n[y][:, None].double()  # n_k / n_y, [B, C]
    own = z.gather(1, y[:, None]).squeeze(1)
    printed = -torch.log(own.exp() / (ratios * z.exp()).sum(dim=1))
    assert_close(arb_loss(z, y, n, "none", clamp=None), printed, 1e-12)


def test_the_clamp_changes_nothing_inside_and_stops_the_gradient_beyond():
    logits, targets, counts = example(scale=8)
    assert logits.abs().max() < 30
    inside = arb_loss(logits, targets, counts)
    assert torch.equal(inside, arb_loss(logits, targets, counts, clamp=None))
    far, targets, counts = example(scale=40)
    beyond = far.abs() > 30
    loss = arb_loss(far, targets, counts, "none")
    slope = gradient(loss.sum(), far)
    assert (slope[beyond] == 0).all()
    assert (gradient(arb_loss(far, targets, counts, clamp=None), far)[beyond] != 0).any()
    assert (loss > 30).any()
    assert (loss <= 60 + torch.log(counts.sum() / counts[targets])).all()


def test_global_counts_are_a_bias_that_is_dropped_at_test_time():
    """ARB from bias 0 and cross-entropy from bias log n: the same steps of SGD, but for decay of the bias."""
    features, targets, counts = digits()
    log_counts = counts.double().log()

    def train(bias, decay, loss):
        weight = torch.zeros(10, features.shape[1], dtype=torch.float64, requires_grad=True)
        bias = bias.clone().requires_grad_()
        parameters = [{"params": [weight]}, {"params": [bias], "weight_decay": decay}]
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss(features @ weight.T + bias).backward()
            optimizer.step()
        return weight.detach(), bias.detach()

    def both(decay):
        arb = train(torch.zeros(10, dtype=torch.float64), decay, lambda z: arb_loss(z, targets, counts))
        return arb, train(log_counts, decay, lambda z: F.cross_entropy(z, targets))

    (arb_weight, arb_bias), (ce_weight, ce_bias) = both(decay=0.0)
    assert arb_weight.abs().max() > 0.1
    assert_close(arb_weight, ce_weight, 1e-10)
    assert_close(arb_bias, ce_bias - log_counts, 1e-10)
    (arb_weight, _), (ce_weight, _) = both(decay=1e-2)
    assert (arb_weight - ce_weight).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# 2. Batch counts and Balanced Softmax


@pytest.mark.parametrize("kind", ["batch", "global_masked"])
def test_the_risk_over_compositions_is_the_mean_over_all_batches(kind):
    """Every batch of three samples, labels and x, through the method that trains."""
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = build_method("arb", kind, CLASS_COUNTS, 0.0)
    draws = StepDraws(torch.ones(()), torch.arange(3))
    joint = (CLASS_COUNTS.double() / CLASS_COUNTS.sum())[:, None] * LIKELIHOOD  # p(y, x)
    samples = list(itertools.product(range(3), range(4)))
    total = 0.0
    for batch in itertools.product(samples, repeat=3):
        y, x = torch.tensor(batch).unbind(1)
        loss = method(lambda x, with_features: (z[x], x), x, y, draws).loss
        total += joint[y, x].prod() * loss
    assert_close(total, risk(3, kind)(z), 1e-12)


@BATCH_SIZES
@pytest.mark.parametrize("kind", ["batch", "global"])
def test_batch_counts_have_the_minimiser_of_balanced_softmax(kind, batch_size):
    truth = TRUTH.clone().requires_grad_()
    assert_close(gradient(risk(batch_size, kind)(truth), truth), 0.0, 1e-15)
    assert_close(shift(batch_size, kind), 0.0)


def test_batches_of_one_sample_teach_nothing():
    for scale in (0.0, 1.0, 10.0):
        z = (
            scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ).requires_grad_()
        loss = risk(1, "batch")(z)
        assert loss == 0
        assert (gradient(loss, z) == 0).all()


def test_a_model_that_cannot_fit_has_a_minimiser_that_depends_on_the_batch_size():
    """Logits linear in one number x = 0, 1, 2, 3, where log p(x|y) is not."""
    x = torch.arange(4.0, dtype=torch.float64)[:, None]

    def logits(kind, batch_size):
        expected = risk(batch_size, kind)
        line = minimise(lambda p: expected(x * p[0] + p[1]), (2, 3))
        return x * line[0] + line[1]

    apart = [offsets(logits("batch", b), logits("global", b)).abs().max().item() for b in (2, 5)]
    assert apart == pytest.approx([0.13, 0.05], abs=0.005)


def mixup_risk(batch_size, kind, lam):
    """As a function of z [X, X, C], the logits at every mixed pair; a partner is any sample, also the very same."""
    values = torch.arange(4)
    terms = []
    for probability, n, counts in batches(batch_size, kind, CLASS_COUNTS):
        present, pairs = n.nonzero().squeeze(1), (n[:, None] * n - torch.diag(n)) / batch_size**2
        a, b, x, u = torch.cartesian_prod(present, present, values, values).unbind(1)
        two = pairs[a, b] * LIKELIHOOD[a, x] * LIKELIHOOD[b, u]
        y, v = torch.cartesian_prod(present, values).unbind(1)
        same = n[y] / batch_size**2 * LIKELIHOOD[y, v]
        share = probability * torch.cat([lam * two, (1 - lam) * two, same])
        rows = torch.cat([x, x, v]), torch.cat([u, u, v])
        terms.append((share, rows, torch.cat([a, b, y]), counts))
    return lambda z: sum((share * unreduced(z[rows], y, counts)).sum() for share, rows, y, counts in terms)


def test_under_mixup_batch_and_global_counts_have_different_minimisers():
    def minimiser(kind, batch_size):
        return minimise(mixup_risk(batch_size, kind, 0.3), (4, 4, 3))

    apart = [offsets(minimiser("batch", b), minimiser("global", b)).abs().max().item() for b in (2, 3)]
    assert apart == pytest.approx([1.16, 0.72], abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# 3. What is balanced


BATCH = torch.repeat_interleave(torch.arange(5), torch.tensor([8, 4, 2, 1, 0]))
N = torch.tensor([8.0, 4, 2, 1, 0])


def test_the_balanced_coefficient_is_the_prior_adjusted_probability():
    """(n_i / n_k) p~ = n_i e^{z_i} / sum_m n_m e^{z_m}, against the loss's own gradient."""
    z, y, n = example()
    own = n[y][:, None].double()
    p = z.exp() / (n / own * z.exp()).sum(dim=1, keepdim=True)  # p~ of eq. 14
    adjusted = n * z.exp() / (n * z.exp()).sum(dim=1, keepdim=True)
    assert_close(n / own * p, adjusted, 1e-13)
    slope = gradient(arb_loss(z, y, n, "sum", clamp=None), z)
    assert_close(slope, adjusted - F.one_hot(y, 7), 1e-13)


def test_the_printed_probability_is_not_bounded_by_one_and_carries_the_count():
    n, y = torch.tensor([90.0, 9, 1]), torch.tensor([0, 1, 2])

    def printed(z):
        return z.exp() / (n / n[y][:, None] * z.exp()).sum(dim=1, keepdim=True)

    assert_close(printed(torch.zeros(3, 3)), (n / 100)[:, None].expand(3, 3))  # n_y / N in every column
    confused = printed(torch.tensor([0.0, 0.0, 20.0]).expand(3, 3))  # all take the rare class for theirs
    assert_close(confused[:, 2], n[y], 1e-4)
    assert confused[0, 2] > 89


@pytest.mark.parametrize("loss", ["arb", "ce"])
def test_at_equal_logits_arb_alone_balances_attraction_and_repulsion(loss):
    """One feature, 1 for all, makes the norms of the components their masses."""
    counts = N if loss == "arb" else None
    table = component_norms(torch.full((15, 5), 0.7), torch.ones(15, 1), BATCH, counts, absent_rows="true")
    attraction = table.diagonal()
    repulsion = table.sum(dim=1) - attraction
    if loss == "arb":
        assert_close(attraction, N * (15 - N) / 15)
        assert_close(repulsion, attraction)
    else:
        assert_close(attraction, (1 - 1 / 5) * N)
        assert_close(repulsion, (15 - N) / 5)


def test_with_global_counts_the_balance_holds_on_average_over_batches():
    z = torch.zeros(15, 5, requires_grad=True)
    counts = torch.tensor([100, 50, 20, 8, 2])
    surplus = -gradient(arb_loss(z, BATCH, counts, "sum"), z).sum(dim=0)  # attraction minus repulsion
    assert_close(surplus, N - 15 * counts / 180, 1e-5)
    assert surplus.abs().max() > 0.1


@pytest.mark.parametrize("loss", ["arb", "ce"])
def test_repulsion_components_are_not_balanced_against_each_other(loss):
    """At equal logits row i's repulsions from k and l are as n_k to n_l."""
    counts = N if loss == "arb" else None
    table = component_norms(torch.zeros(15, 5), torch.ones(15, 1), BATCH, counts, absent_rows="true")
    factor = N / 15 if loss == "arb" else torch.full((5,), 1 / 5)  # of row i
    for i, k in itertools.permutations(range(4), 2):
        assert_close(table[i, k], factor[i] * N[k])


@lru_cache
def digits():
    """Real scans, long-tailed (100 down to 5 per class): centred features [335, 64], targets, counts."""
    scans = load_digits()
    counts = long_tail_counts(100, 10, "exp", 0.05)
    kept = long_tail_indices(scans.target, counts)
    features, targets = torch.from_numpy(scans.data[kept]) / 16, torch.from_numpy(scans.target[kept])
    return features - features.mean(dim=0), targets.long(), torch.tensor(counts)


@lru_cache
def stationary(loss: str, decay: float):
    """A linear softmax classifier at its minimum: (surplus of attraction mass [10], attraction [10], bias [10]).

    The weights are decayed by 1e-2, the bias by ``decay``.
    """
    features, targets, counts = digits()
    counts = counts if loss == "arb" else torch.ones(10)

    def logits(p):
        return features @ p[:, :-1].T + p[:, -1]

    def objective(p):
        penalty = 1e-2 * p[:, :-1].square().sum() + decay * p[:, -1].square().sum()
        return arb_loss(logits(p), targets, counts, clamp=None) + penalty / 2

    p = minimise(objective, (10, 65))
    z = logits(p).requires_grad_()
    slope = gradient(arb_loss(z, targets, counts, "sum", clamp=None), z)
    attraction = -(slope * F.one_hot(targets, 10)).sum(dim=0)
    return -slope.sum(dim=0), attraction, p[:, -1]


@pytest.mark.parametrize("loss", ["ce", "arb"])
def test_stationarity_of_a_bias_equates_the_masses_under_either_loss(loss):
    surplus, attraction, _ = stationary(loss, 0.0)
    assert attraction.min() > 0.1
    assert_close(surplus, 0.0, 1e-4)


def test_a_decayed_bias_leaves_a_surplus():
    surplus, _, bias = stationary("arb", 1e-2)
    assert_close(surplus, 1e-2 * len(digits()[1]) * bias, 1e-4)
    assert surplus.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# 4. Mask and magnitude


MASK = {2: [2.30, 4.50], 3: [1.75, 3.89], 5: [1.16, 3.22], 8: [0.73, 2.68]}
MAGNITUDE = {2: [-0.75, -0.85], 3: [-0.68, -0.82], 5: [-0.55, -0.75], 8: [-0.42, -0.71]}


@pytest.mark.parametrize("batch_size", [2, 3, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_mask_alone_and_magnitude_alone_err_in_opposite_directions(batch_size):
    """Offsets of the medium and the rare class against the frequent one; together they vanish."""
    mask, magnitude, together = (
        shift(batch_size, kind)[:, 1:] for kind in ("global_masked", "batch_unmasked", "batch")
    )
    assert mask.min() > 0.5
    assert magnitude.max() < -0.3
    assert_close(together, 0.0)
    assert mask.mean(dim=0).tolist() == pytest.approx(MASK[batch_size], abs=0.006)
    assert magnitude.mean(dim=0).tolist() == pytest.approx(MAGNITUDE[batch_size], abs=0.006)


def test_mask_alone_at_two_samples_subtracts_the_log_prior_once_more():
    expected = -(CLASS_COUNTS / CLASS_COUNTS[0]).double().log()
    assert_close(shift(2, "global_masked"), expected)


TWO = torch.tensor([[0.9, 0.1], [0.05, 0.95]], dtype=torch.float64)  # p(x|y) of two classes


@pytest.mark.parametrize(("frequent", "batch_size"), [(60, 2), (60, 7), (97, 7), (97, 30)])
def test_mask_alone_for_two_classes_has_a_closed_form(frequent, batch_size):
    o, k = frequent / 100, 1 - frequent / 100
    expected = math.log((1 - k ** (batch_size - 1)) / (1 - o ** (batch_size - 1)))
    counts = torch.tensor([frequent, 100 - frequent])
    measured = shift(batch_size, "global_masked", class_counts=counts, likelihood=TWO)
    assert expected > 0
    assert_close(measured[:, 1], expected)


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_magnitude_alone_costs_a_very_rare_class_at_least_log_2(batch_size):
    counts = torch.tensor([9_999, 1])
    measured = shift(batch_size, "batch_unmasked", class_counts=counts, likelihood=TWO)[:, 1]
    ratio = TWO[1] / TWO[0]
    limit = -torch.log(1 + torch.sqrt(1 + ratio / (batch_size - 1)))
    assert_close(measured, limit, 2e-3)
    assert (limit < -math.log(2)).all()


def test_magnitude_alone_may_raise_a_class_that_is_hardly_the_rarer_one():
    """Two samples and a prior below 0.618 : 0.382; x = 0 speaks for the frequent class."""
    near, far = (
        shift(2, "batch_unmasked", class_counts=torch.tensor(counts), likelihood=TWO)[:, 1]
        for counts in ([60, 40], [65, 35])
    )
    assert near[0] > 1e-3
    assert near[1] < -1e-3
    assert (far < -1e-3).all()


def test_the_sizes_of_cifar10_lt():
    """Its rarest class (50 of 12,406 images) against the rest, 128 samples, an x that says nothing."""
    world = {"class_counts": torch.tensor([12_356, 50]), "likelihood": torch.ones(2, 1, dtype=torch.float64)}
    assert shift(128, "global_masked", **world)[0, 1].item() == pytest.approx(0.91, abs=0.005)
    assert shift(128, "batch_unmasked", **world)[0, 1].item() == pytest.approx(-0.47, abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Many more classes than samples


def test_different_labels_make_it_cross_entropy_over_the_classes_in_the_batch():
    labels = torch.tensor([7, 41, 3, 19, 30, 11])
    z = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    counts = step_counts("batch", labels, torch.arange(1, 51))
    loss = arb_loss(z, labels, counts)
    assert_close(loss, F.cross_entropy(z[:, labels], torch.arange(6)), 1e-14)
    absent = torch.ones(50, dtype=torch.bool).index_fill(0, labels, False)
    assert (gradient(loss, z)[:, absent] == 0).all()


def test_repeated_labels_add_the_log_of_their_count_and_no_more():
    labels = torch.tensor([7, 41, 3, 7, 30, 7, 41])
    present, inverse, n = labels.unique(return_inverse=True, return_counts=True)
    z = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = arb_loss(z, labels, step_counts("batch", labels, torch.arange(1, 51)), "none")
    plain = F.cross_entropy(z[:, present], inverse, reduction="none")
    assert_close(found, F.cross_entropy(z[:, present] + n.double().log(), inverse, reduction="none"), 1e-13)
    assert (found - plain).abs().max() > 0.1
    assert (found - plain).abs().max() <= math.log(3)


def all_different(batch_size, prior) -> float:
    """B! times the B-th elementary symmetric polynomial of the prior."""
    sums = torch.zeros(batch_size + 1, dtype=torch.float64)
    sums[0] = 1.0
    for p in prior:
        sums[1:] += p * sums[:-1].clone() * torch.arange(1, batch_size + 1)  # k! e_k
    return sums[-1].item()


def test_labels_all_differ_once_classes_outnumber_pairs_of_samples():
    every = list(itertools.product(range(5), repeat=3))
    assert all_different(3, [1 / 5] * 5) == pytest.approx(sum(len(set(y)) == 3 for y in every) / len(every))
    uniform = {c: math.prod(1 - i / c for i in range(128)) for c in (1000, 8142, 100_000, 1_000_000)}
    assert all_different(128, [1 / 8142] * 8142) == pytest.approx(uniform[8142])
    assert list(uniform.values()) == pytest.approx([0.0002, 0.367, 0.922, 0.992], abs=0.0005)
    profile = torch.tensor(long_tail_counts(1000, 8142, "exp", 0.002)).double()
    assert all_different(128, (profile / profile.sum()).tolist()) == pytest.approx(0.04, abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Correcting the prior twice


def drw_weights(beta=0.99):
    return (1 - beta) / (1 - beta ** CLASS_COUNTS.double())


@BATCH_SIZES
def test_weighted_arb_corrects_the_prior_twice(batch_size):
    """Global counts: omega ~ 1 / N_y."""
    truth = TRUTH - CLASS_COUNTS.double().log()
    z = minimise(risk(batch_size, "global", loss=weighted_arb), (4, 3))
    assert_close(offsets(z, truth), 0.0)


def test_the_second_correction_moves_every_decision_to_the_rarest_class():
    z = minimise(risk(3, "global", loss=weighted_arb), (4, 3))
    balanced, posterior = TRUTH, TRUTH + CLASS_COUNTS.double().log()
    assert balanced.argmax(dim=1).tolist() == [0, 1, 2, 2]
    assert posterior.argmax(dim=1).tolist() == [0, 0, 0, 0]
    assert z.argmax(dim=1).tolist() == [2, 2, 2, 2]


def test_weighted_arb_with_batch_counts_corrects_twice_in_part():
    """Not at all at two samples; more the larger the batch."""
    shifts = [shift(b, "batch", loss=weighted_arb) for b in (2, 3, 5)]
    assert_close(shifts[0], 0.0)
    rare = [s[:, 2].mean().item() for s in shifts[1:]]
    assert rare == pytest.approx([0.63, 1.31], abs=0.005)
    assert max(rare) < math.log(90)


@pytest.mark.parametrize("kind", ["global", "batch"])
@BATCH_SIZES
def test_reweighting_on_top_of_arb_adds_the_log_of_the_weights(batch_size, kind):
    w = drw_weights()
    measured = shift(batch_size, kind, loss=lambda z, y, n: w[y] * unreduced(z, y, n))
    assert_close(measured, (w / w[0]).log())
    assert measured[:, 2].min() > 4


def test_dividing_by_the_weights_of_the_batch_is_harmless_with_batch_counts_only():
    """PyTorch's weighted mean, as DRW has it: sum of w l over sum of w."""
    w = drw_weights()
    expected = (w / w[0]).log()
    for batch_size, rare in {2: 0.74, 5: 1.73}.items():
        assert_close(shift(batch_size, "batch", weights=w), expected)
        measured = shift(batch_size, "global", weights=w)
        assert measured[:, 2].tolist() == pytest.approx([rare] * 4, abs=0.005)
    assert expected[2] > 4
