"""Other classifiers on the same features: against independent computations, and where the answer is known."""

import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from utils.evaluation import Outputs
from utils.metrics import groups_by_index, halves
from utils.report import decompose as module
from utils.report.decompose import (
    ADJUSTED,
    MODEL,
    NEAREST_MEAN,
    PROBE,
    REFIT,
    adjusted,
    decompose,
    decomposition_text,
    logistic_classes,
    nearest_mean_classes,
    write_decomposition,
)

COUNTS = torch.tensor([200, 60, 20, 6])
GROUPS = groups_by_index([[0, 1], [1, 3], [3, 4]], 4)
PERFECT = {"top1": 100.0, "many": 100.0, "medium": 100.0, "few": 100.0}


def drawn(targets, means, noise, seed):
    """Features around the classes' means."""
    draw = torch.Generator().manual_seed(seed)
    return means[targets] + noise * torch.randn(len(targets), means.shape[1], generator=draw)


def clouds(means, weight, noise=0.1, per_class=20):
    """(train, test) of classes around ``means`` [C, D]; the model's classifier is ``weight`` [C, D]."""
    targets = torch.repeat_interleave(torch.arange(len(means)), COUNTS[: len(means)])
    tested = torch.arange(len(means)).repeat(per_class)
    features = drawn(tested, means, noise, seed=1)
    return Outputs(drawn(targets, means, noise, seed=0), targets), Outputs(features, tested, features @ weight.T)


@pytest.fixture
def noisy():
    """A test set on which nothing is perfect, with a prior in the logits that a tau can take out."""
    means = 1.5 * torch.eye(4)
    train, test = clouds(means, 2 * means, noise=1.0, per_class=51)
    return train, test._replace(logits=test.logits + (COUNTS / COUNTS.sum()).log())


# ---------------------------------------------------------------------------------------------------------------------
# One classifier after the other


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_logit_adjustment_is_an_explicit_argmax_also_over_many_parts(noisy, monkeypatch, tau):
    monkeypatch.setattr(module, "ROWS", 7)
    _, test = noisy
    scores = test.logits.double().numpy() - tau * np.log(COUNTS.numpy() / COUNTS.sum().item())
    predictions = adjusted(test, COUNTS, tau)
    assert predictions.classes.tolist() == scores.argmax(axis=1).tolist()
    assert torch.equal(predictions.targets, test.targets)


def test_a_class_without_training_images_counts_as_one_image():
    test = Outputs(torch.zeros(2, 1), torch.tensor([0, 2]), torch.tensor([[2.0, 0, 0.1], [2.4, 0, 0]]))
    counts = torch.tensor([10, 10, 0])  # log 10 is 2.30
    assert adjusted(test, counts, 1.0).classes.tolist() == [2, 0]


def test_the_nearest_mean_is_that_of_scikit_learn(noisy, monkeypatch):
    train, test = noisy
    monkeypatch.setattr(module, "ROWS", 50)
    expected = NearestCentroid().fit(train.features.numpy(), train.targets.numpy()).predict(test.features.numpy())
    found = nearest_mean_classes(train, test.features, 4)
    assert found.tolist() == expected.tolist()
    assert 0 < int((found == test.targets).sum()) < len(found)


def test_the_mean_of_no_image_is_near_to_nothing():
    train = Outputs(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([1, 3]))
    near_zero = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.1, 0.0]])
    assert nearest_mean_classes(train, near_zero, 5).tolist() == [1, 3, 1]


def test_balanced_weights_move_the_border_to_where_both_classes_err_alike():
    draw = torch.Generator().manual_seed(0)
    targets = torch.repeat_interleave(torch.arange(2), torch.tensor([950, 50]))
    features = torch.randn(1000, 1, generator=draw) + targets[:, None]  # around 0 and 1: the fair border is 0.5
    line = torch.linspace(-3, 8, 11001)[:, None]
    borders = []
    for balanced in (True, False):
        classes, converged = logistic_classes(features, targets, line, balanced)
        assert converged
        borders.append(float(line[classes == 1].min()))
    assert borders[0] == pytest.approx(0.5, abs=0.25)
    assert borders[1] > 1.5


def test_the_units_of_features_do_not_matter_and_a_dead_one_does_no_harm(noisy):
    train, test = noisy
    scales = (torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1e-3, 1.0, 1e3, 0.0]))
    found = [logistic_classes(train.features * by, train.targets, test.features * by)[0] for by in scales]
    assert (found[0] == found[1]).double().mean() > 0.99
    assert len(found[0].unique()) > 1


def test_a_fit_that_does_not_converge_says_so_without_a_warning(noisy, monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = decompose(*noisy, COUNTS, GROUPS)
    assert result.notes == [f"{label}: not converged after 2 iterations, scored as it is" for label in (REFIT, PROBE)]
    assert set(result.rows) == {MODEL, ADJUSTED, NEAREST_MEAN, REFIT, PROBE}


# ---------------------------------------------------------------------------------------------------------------------
# Cross-fitting


def test_each_half_is_predicted_with_the_tau_that_the_other_one_chose():
    """Worked by hand: with 100 images to 1 a sample goes to the rare class where tau is above its margin."""
    # Frequent over rare, in units of log(100); each class's samples are in the first half, the second, and again.
    margins = torch.tensor([0.75, 1.75, 0.75, 1.75, 0.25, 1.25, 0.25, 0.25]) * torch.tensor(100.0).log()
    test = Outputs(torch.zeros(8, 1), torch.tensor([0] * 4 + [1] * 4), torch.stack([margins, 0 * margins], dim=1))
    train = Outputs(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
    groups = groups_by_index([[0, 1], [1, 1], [1, 2]], 2)
    result = decompose(train, test, torch.tensor([100, 1]), groups)
    # The first half is perfect from 0.3 to 0.7; with 1.3 it loses class 0. The second is perfect from 1.3 to 1.7; with
    # 0.3 it loses one of class 1.
    assert result.tau["best"] == [0.3, 1.3]
    assert result.rows[ADJUSTED] == {"top1": 62.5, "many": 50.0, "few": 75.0}
    assert result.rows[MODEL] == {"top1": 50.0, "many": 100.0, "few": 0.0}
    assert result.tau["values"] == [round(-1 + 0.1 * step, 1) for step in range(31)]
    assert result.tau["top1"] == [50.0] * 13 + [87.5] * 5 + [62.5] * 5 + [75.0] * 5 + [50.0] * 3


def test_the_model_is_the_curve_at_0_and_rows_have_the_groups_that_exist(noisy):
    result = decompose(*noisy, COUNTS, GROUPS)
    zero = result.tau["values"].index(0.0)
    assert list(result.tau) == ["values", "top1", "many", "medium", "few", "best"]
    assert result.rows[MODEL] == {key: result.tau[key][zero] for key in ("top1", "many", "medium", "few")}
    assert all(len(result.tau[key]) == 31 for key in list(result.tau)[:-1])
    assert list(result.rows) == [MODEL, ADJUSTED, NEAREST_MEAN, REFIT, PROBE]
    assert result.rows[ADJUSTED]["few"] > result.rows[MODEL]["few"] + 10
    assert decompose(*noisy, COUNTS, GROUPS) == result
    no_few = decompose(*noisy, COUNTS, groups_by_index([[0, 1], [1, 4], [4, 4]], 4))
    assert not any("few" in row for row in (no_few.tau, *no_few.rows.values()))


def test_the_probe_predicts_each_half_from_the_other_alone():
    """In the second half the classes have changed places: what one half teaches is wrong in the other."""
    means = 3 * torch.eye(4)
    train, test = clouds(means, means)
    swapped = torch.where(halves(test.targets), 3 - test.targets, test.targets)
    test = test._replace(features=drawn(swapped, means, noise=0.1, seed=1))
    assert decompose(train, test, COUNTS, GROUPS).rows[PROBE]["top1"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Where the answer is known


@pytest.mark.parametrize("spoilt", ["rare rows shrunk", "rows permuted"])
def test_perfect_features_under_a_spoilt_classifier(spoilt):
    means = 3 * torch.eye(4)
    weight = means * torch.tensor([1.0, 1.0, 1.0, -0.1])[:, None] if spoilt == "rare rows shrunk" else means.roll(1, 0)
    result = decompose(*clouds(means, weight), COUNTS, GROUPS)
    assert result.rows[MODEL]["few"] == 0.0
    assert [result.rows[label] for label in (NEAREST_MEAN, REFIT, PROBE)] == [PERFECT] * 3
    assert result.notes == []


def test_features_that_lack_a_class_cannot_be_helped():
    means = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [0, 0, 3]])  # the last two are the same to the network
    result = decompose(*clouds(means, means, per_class=200), COUNTS, groups_by_index([[0, 2], [2, 3], [3, 4]], 4))
    for label, row in result.rows.items():
        assert row["many"] == 100.0, label
        assert 35 < (row["medium"] + row["few"]) / 2 < 65, label


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be had


def test_beyond_a_thousand_classes_there_is_no_logistic_regression():
    classes, eye, groups = torch.arange(1001), torch.eye(1001), groups_by_index([[0, 9]] * 3, 1001)
    result = decompose(Outputs(eye, classes), Outputs(eye, classes, eye), torch.ones(1001), groups)
    assert list(result.rows) == [MODEL, ADJUSTED, NEAREST_MEAN]
    assert result.rows[NEAREST_MEAN] == PERFECT
    assert [note.split(":")[0] for note in result.notes] == [REFIT, PROBE, ADJUSTED]
    assert "1001 classes would take hours" in result.notes[0]
    assert "one test image per class cannot be halved" in result.notes[2]


def test_one_test_image_per_class_cannot_be_probed():
    train, test = clouds(torch.eye(4), torch.eye(4), per_class=1)
    result = decompose(train, test, COUNTS, GROUPS)
    assert list(result.rows) == [MODEL, ADJUSTED, NEAREST_MEAN, REFIT]
    assert result.notes[0] == f"{PROBE}: left out, it needs training samples of at least two classes"


# ---------------------------------------------------------------------------------------------------------------------
# On paper and on disk


def test_the_text_and_the_file(noisy, tmp_path):
    result = decompose(*noisy, COUNTS, GROUPS)._replace(notes=["something is odd"])
    write_decomposition(tmp_path, result)
    assert json.loads((tmp_path / "decomposition.json").read_text()) == result._asdict()
    lines = decomposition_text(result).splitlines()
    assert lines[1].split() == ["top-1", "many", "medium", "few"]
    assert lines[2].split() == ["model", *(f"{result.rows[MODEL][key]:.2f}" for key in PERFECT)]
    first, second = result.tau["best"]
    assert f"tau of logit adjustment: {first:g} chosen on the test set's first half, {second:g}" in lines[7]
    assert lines[8] == "note: something is odd"
