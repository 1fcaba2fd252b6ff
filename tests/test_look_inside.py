"""What a run records of its inside, by the real script: components and neural collapse."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_stage1
from methods import neural_collapse
from methods.gradients import component_norms
from methods.neural_collapse import nc_metrics
from tests.conftest import (
    ARB,
    CE,
    SHORT,
    assert_same_run,
    content,
    copy_of,
    current,
    failure,
    in_ranks,
    log_of,
    stopped,
    train,
    train_in_rank,
)
from utils import build, checkpoint
from utils.config import load_config

CPU = torch.device("cpu")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_collapse(found, expected):
    """Up to last bits, which differ with the number of threads and can turn the decision on a sample round."""
    assert found.keys() == expected.keys()
    assert found["nc4"] == pytest.approx(expected["nc4"], abs=0.01)
    assert found | {"nc4": 0} == pytest.approx(expected | {"nc4": 0}, rel=1e-3)


def test_diagnostics_by_epoch(measured):
    stored = np.load(measured / "diagnostics.npz")
    counts = content(measured)["class_counts"]
    assert stored["epochs"].tolist() == [0, 1]
    assert stored["batches"].tolist() == [4, 4]  # every other of 8
    assert stored["rows"].tolist() == [9, 5, 0]
    assert stored["class_counts"].tolist() == counts.tolist()
    for name in ("diagonal", "row_sums", "column_sums", "attraction_mass", "repulsion_mass", "repulsion_cosine"):
        assert stored[name].shape == (2, 10)
        assert np.isfinite(stored[name]).all()
    assert stored["row_norms"].shape == (2, 3, 10)
    table = stored["table"]
    np.testing.assert_allclose(table[[9, 5, 0]], stored["row_norms"][-1], rtol=1e-6)
    np.testing.assert_allclose(table.sum(axis=1), stored["row_sums"][-1], rtol=1e-5)
    np.testing.assert_allclose(table.sum(axis=0), stored["column_sums"][-1], rtol=1e-5)
    np.testing.assert_allclose(table.diagonal(), stored["diagonal"][-1], rtol=1e-6)
    assert (table >= 0).all() and table.sum() > 0


@pytest.mark.parametrize("cfg", [ARB, CE])
def test_they_are_the_mean_over_the_steps_that_the_run_took(tmp_path, cfg):
    """The first epoch by the trainer's own parts, with tables from :func:`component_norms`."""
    options = ["num_epochs", 1, "diagnostics", 3, "logit_clamp", "null", "class_counts", "global"]
    stored = np.load(train(tmp_path, *options, cfg=cfg) / "diagnostics.npz")
    cfg = load_config(cfg, [*SHORT, *map(str, options)])
    data = build.load_data(cfg, cfg.class_map, CPU)
    model, method = build.new_model(cfg, data), build.new_method(cfg, data)
    optimizer = build.new_optimizer(cfg, model, method)
    build.set_lr(optimizer, cfg, 0)
    loader = data.train_loader(cfg.batch_size, cfg.seed, CPU)
    tables = []
    for number, (batch, draw) in enumerate(
        zip(loader.epoch(0), method.draws(loader.batch_sizes, cfg.seed, 0), strict=True)
    ):
        output = method(model.train(), batch.augment(), batch.targets, draw, batch.step_targets)
        if number % 3 == 0:
            counts = data.class_counts if cfg.loss == "arb" else None
            mixed = (batch.targets[draw.partner], draw.lam) if cfg.mixup else None
            arguments = (output.logits.detach(), output.features, batch.targets, counts)
            tables.append(component_norms(*arguments, "true", mixed))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert len(tables) == 3
    np.testing.assert_allclose(stored["table"], torch.stack(tables).mean(dim=0).numpy(), rtol=1e-3, atol=1e-4)


def test_measuring_changes_nothing_that_is_trained(measured, finished):
    for key in ("state_dict_model", "state_dict_classifier"):
        one, other = content(measured)[key], content(finished)[key]
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["test"] for row in rows(measured)] == [row["test"] for row in rows(finished)]
    assert not (finished / "diagnostics.npz").exists()
    assert not any("nc" in row for row in rows(finished))


def test_neural_collapse_every_so_many_epochs_and_in_the_last(measured):
    assert [("nc" in row) for row in rows(measured)] == [False, True]
    cfg = load_config(measured / "config.yaml")
    data = build.load_data(cfg, cfg.class_map, CPU)
    model = build.new_model(cfg, data, content(measured))
    checkpoint.load_content(model, content(measured), measured)
    images, targets = map(torch.cat, zip(*data.plain_train_loader(CPU), strict=True))
    with torch.no_grad():
        features = model.eval().features(images)
    classifier = model.classifier.fc
    expected = nc_metrics(features, targets, classifier.weight, classifier.bias)
    measured = rows(measured)[-1]["nc"]
    per_class = expected.pop("nc1_per_class")
    groups = {"nc1_many": per_class[:3], "nc1_medium": per_class[3:7], "nc1_few": per_class[7:]}
    assert_same_collapse(measured, expected | {name: float(part.mean()) for name, part in groups.items()})


def test_tensorboard_gets_scalars_alone(measured):
    board = EventAccumulator(str(measured / "tensorboard")).Reload()
    assert board.Tags()["images"] == board.Tags()["histograms"] == []
    assert [p.step for p in board.Scalars("collapse/nc1")] == [1]
    assert [p.value for p in board.Scalars("collapse/nc1")] == pytest.approx(
        [r["nc"]["nc1"] for r in rows(measured)[1:]]
    )
    stored = np.load(measured / "diagnostics.npz")
    for row in (9, 5, 0):
        repulsion = stored["row_sums"][:, row] - stored["diagonal"][:, row]
        assert [p.value for p in board.Scalars(f"row {row}/repulsion")] == pytest.approx(repulsion.tolist())
        assert [p.value for p in board.Scalars(f"row {row}/attraction")] == pytest.approx(stored["diagonal"][:, row])


def test_class_names_go_with_the_checkpoint(measured):
    assert content(measured)["class_names"] == [str(n) for n in range(10)]


def test_a_run_goes_on_in_the_same_file(measured, tmp_path):
    folder = stopped(measured, tmp_path)
    train(tmp_path, "num_epochs", 2, "diagnostics", 2, "nc_every", 2, "resume", current(folder))
    one, other = (np.load(run / "diagnostics.npz") for run in (measured, folder))
    assert one.files == other.files
    # NaN: batch counts leave the row of a class that no watched batch had without any repulsion.
    assert all(np.array_equal(one[name], other[name], equal_nan="cosine" in name) for name in one.files)


def test_other_rows_are_refused_in_one_line(measured, tmp_path, capsys):
    folder = copy_of(measured, tmp_path)
    options = ["num_epochs", 3, "diagnostics", 4, "diagnostics_rows", "[1]", "resume", current(folder)]
    result = failure(capsys, train_stage1.main, "--cfg", ARB, *SHORT, *options)
    assert result.code == 2
    assert result.lines[-1].startswith(f"error: {folder / 'diagnostics.npz'}: was begun with other rows")


def test_rows_that_do_not_exist_are_refused_before_a_folder_is_made(tmp_path, capsys):
    arguments = ["--cfg", ARB, "diagnostics", 1, "diagnostics_rows", "[10]", "save_dir", tmp_path]
    result = failure(capsys, train_stage1.main, *arguments)
    assert (result.code, len(result.lines)) == (2, 1)
    assert "diagnostics_rows: 10, but the classes are 0 to 9" in result.said
    assert not any(tmp_path.iterdir())


def test_two_processes_average_over_the_batches_of_both_and_agree_on_neural_collapse(tmp_path):
    """One process in two passes per step sees the very batches that two processes see, once: at the first step."""
    options = ["num_epochs", 1, "diagnostics", 8, "nc_every", 1, "device", "cpu", "workers", 0]
    one = train(tmp_path / "one", *options, "accumulate", 2)
    in_ranks(tmp_path, train_in_rank, ARB, *options, "save_dir", tmp_path / "two")
    (two,) = (tmp_path / "two").iterdir()
    first, second = (np.load(folder / "diagnostics.npz") for folder in (one, two))
    assert first["batches"].tolist() == second["batches"].tolist() == [2]
    for name in ("table", "attraction_mass", "repulsion_mass", "repulsion_cosine"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert rows(two)[0]["nc"].keys() == rows(one)[0]["nc"].keys()
    cfg = load_config(two / "config.yaml")
    data = build.load_data(cfg, cfg.class_map, CPU)
    model = build.new_model(cfg, data, content(two))
    checkpoint.load_content(model, content(two), two)
    groups = build.class_groups(cfg, data)
    alone = neural_collapse.collapse(model, data.plain_train_loader(CPU), groups, "fp32", lambda: 0)
    assert_same_collapse(rows(two)[0]["nc"], alone)


@pytest.mark.slow
def test_half_precision(tmp_path):
    folder = train(tmp_path, "num_epochs", 1, "diagnostics", 4, "nc_every", 1, "precision", "bf16")
    stored = np.load(folder / "diagnostics.npz")
    assert stored["batches"].tolist() == [2]
    assert np.isfinite(stored["table"]).all()
    assert rows(folder)[0]["nc"]["nc1"] > 0
    assert "diagnostics: every 4 steps, rows [9, 5, 0] in full" in log_of(folder)


def test_a_signal_within_the_measurement_loses_nothing(measured, tmp_path, monkeypatch, capsys):
    options = ["num_epochs", 2, "diagnostics", 2, "nc_every", 2]
    folder = stopped(measured, tmp_path / "parts")
    with monkeypatch.context() as patch:
        own = neural_collapse.collapse

        def interrupted(*arguments):
            os.kill(os.getpid(), 15)
            return own(*arguments)

        patch.setattr("utils.build.collapse", interrupted)
        words = ["--cfg", ARB, *SHORT, *options, "resume", current(folder)]
        assert failure(capsys, train_stage1.main, *words).code == 143
    assert (content(folder)["epoch"], content(folder)["step"]) == (1, 8)
    assert content(folder)["components"] is not None
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    train(tmp_path / "parts", *options, "resume", current(folder))
    assert_same_run(measured, folder)
    (other / "diagnostics.npz").unlink()
    train(other.parent, *options, "diagnostics_rows", "[1, 2, 3]", "resume", current(other))
    assert "the diagnostics of epoch 1 start at step 8: their rows have changed" in log_of(other)
    assert np.load(other / "diagnostics.npz")["batches"].tolist()[-1] == 0
