"""What a run records of its inside, by the real script: components and neural collapse."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_stage1
from methods import neural_collapse
from methods.gradients import component_norms
from methods.neural_collapse import nc_metrics
from tests.conftest import ARB, ROOT, SHORT, assert_same_run, content, failure, train
from utils import build, checkpoint
from utils.config import load_config

CE = "config/digits/digits_imb005.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("saved"), "num_epochs", 3, "diagnostics", 2, "nc_every", 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same run with nothing measured."""
    return train(tmp_path_factory.mktemp("saved"), "num_epochs", 3)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_collapse(found, expected):
    """Up to last bits, which differ with the number of threads and can turn the decision on a sample round."""
    assert found.keys() == expected.keys()
    assert found["nc4"] == pytest.approx(expected["nc4"], abs=0.01)
    assert found | {"nc4": 0} == pytest.approx(expected | {"nc4": 0}, rel=1e-3)


def test_diagnostics_by_epoch(run):
    stored = np.load(run / "diagnostics.npz")
    counts = content(run)["class_counts"]
    assert stored["epochs"].tolist() == [0, 1, 2]
    assert stored["batches"].tolist() == [4, 4, 4]  # every other of 8
    assert stored["rows"].tolist() == [9, 5, 0]
    assert stored["class_counts"].tolist() == counts.tolist()
    for name in ("diagonal", "row_sums", "column_sums", "attraction_mass", "repulsion_mass", "repulsion_cosine"):
        assert stored[name].shape == (3, 10)
        assert np.isfinite(stored[name]).all()
    assert stored["row_norms"].shape == (3, 3, 10)
    table = stored["table"]
    np.testing.assert_allclose(table[[9, 5, 0]], stored["row_norms"][-1], rtol=1e-6)
    np.testing.assert_allclose(table.sum(axis=1), stored["row_sums"][-1], rtol=1e-5)
    np.testing.assert_allclose(table.sum(axis=0), stored["column_sums"][-1], rtol=1e-5)
    np.testing.assert_allclose(table.diagonal(), stored["diagonal"][-1], rtol=1e-6)
    assert (table > 0).all()


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
        output = method(model.train(), batch.images, batch.targets, draw, batch.step_targets)
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


def test_measuring_changes_nothing_that_is_trained(run, plain):
    for key in ("state_dict_model", "state_dict_classifier"):
        one, other = content(run)[key], content(plain)[key]
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["test"] for row in rows(run)] == [row["test"] for row in rows(plain)]
    assert not (plain / "diagnostics.npz").exists()
    assert not any("nc" in row for row in rows(plain))


def test_neural_collapse_every_so_many_epochs_and_in_the_last(run):
    assert [("nc" in row) for row in rows(run)] == [False, True, True]
    cfg = load_config(run / "config.yaml")
    data = build.load_data(cfg, cfg.class_map, CPU)
    model = build.new_model(cfg, data, content(run))
    checkpoint.load_content(model, content(run), run)
    images, targets = map(torch.cat, zip(*data.plain_train_loader(CPU), strict=True))
    with torch.no_grad():
        features = model.eval().features(images)
    classifier = model.classifier.fc
    expected = nc_metrics(features, targets, classifier.weight, classifier.bias)
    measured = rows(run)[-1]["nc"]
    per_class = expected.pop("nc1_per_class")
    groups = {"nc1_many": per_class[:3], "nc1_medium": per_class[3:7], "nc1_few": per_class[7:]}
    assert_same_collapse(measured, expected | {name: float(part.mean()) for name, part in groups.items()})


def test_tensorboard_gets_scalars_alone(run):
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Tags()["images"] == board.Tags()["histograms"] == []
    assert [p.step for p in board.Scalars("collapse/nc1")] == [1, 2]
    assert [p.value for p in board.Scalars("collapse/nc1")] == pytest.approx([r["nc"]["nc1"] for r in rows(run)[1:]])
    stored = np.load(run / "diagnostics.npz")
    for row in (9, 5, 0):
        repulsion = stored["row_sums"][:, row] - stored["diagonal"][:, row]
        assert [p.value for p in board.Scalars(f"row {row}/repulsion")] == pytest.approx(repulsion.tolist())
        assert [p.value for p in board.Scalars(f"row {row}/attraction")] == pytest.approx(stored["diagonal"][:, row])


def test_class_names_go_with_the_checkpoint(run):
    assert content(run)["class_names"] == [str(n) for n in range(10)]


def test_a_longer_run_goes_on_in_the_same_file(tmp_path):
    options = ["diagnostics", 4, "nc_every", 2]
    whole = train(tmp_path / "whole", "num_epochs", 3, *options)
    parts = train(tmp_path / "parts", "num_epochs", 2, *options)
    assert "table" in np.load(parts / "diagnostics.npz")
    train(tmp_path / "parts", "num_epochs", 3, *options, "resume", parts / "ckps" / "current.pth.tar")
    one, other = (np.load(folder / "diagnostics.npz") for folder in (whole, parts))
    assert one.files == other.files
    # NaN: batch counts leave the row of a class that no watched batch had without any repulsion.
    assert all(np.array_equal(one[name], other[name], equal_nan="cosine" in name) for name in one.files)


def test_other_rows_are_refused_in_one_line(tmp_path, capsys):
    folder = train(tmp_path, "num_epochs", 1, "diagnostics", 4)
    path = folder / "ckps" / "current.pth.tar"
    arguments = ["--cfg", ARB, *SHORT, "num_epochs", 2, "diagnostics", 4, "diagnostics_rows", "[1]", "resume", path]
    result = failure(capsys, train_stage1.main, *arguments)
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["train_stage1.py", "--cfg", ARB, *SHORT, *map(str, options), "save_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
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


def test_half_precision(tmp_path):
    folder = train(tmp_path, "num_epochs", 1, "diagnostics", 4, "nc_every", 1, "precision", "bf16")
    stored = np.load(folder / "diagnostics.npz")
    assert stored["batches"].tolist() == [2]
    assert np.isfinite(stored["table"]).all()
    assert rows(folder)[0]["nc"]["nc1"] > 0
    assert "diagnostics: every 4 steps, rows [9, 5, 0] in full" in next((folder / "logs").iterdir()).read_text()


def test_a_signal_within_the_measurement_loses_nothing(tmp_path, monkeypatch, capsys):
    options = ["num_epochs", 1, "diagnostics", 2, "nc_every", 1]
    whole = train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        own = neural_collapse.collapse

        def stopped(*arguments):
            os.kill(os.getpid(), 15)
            return own(*arguments)

        patch.setattr("utils.build.collapse", stopped)
        words = ["--cfg", ARB, *SHORT, *map(str, options), "save_dir", tmp_path / "parts"]
        assert failure(capsys, train_stage1.main, *words).code == 143
    (folder,) = (tmp_path / "parts").iterdir()
    assert content(folder)["step"] == 8
    assert content(folder)["components"] is not None
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    train(tmp_path / "parts", *options, "resume", "auto")
    assert_same_run(whole, folder)
    (other / "diagnostics.npz").unlink(missing_ok=True)
    train(other.parent, *options, "diagnostics_rows", "[1, 2, 3]", "resume", "auto")
    assert (
        "the diagnostics of epoch 0 start at step 8: their rows have changed"
        in next((other / "logs").iterdir()).read_text()
    )
    assert np.load(other / "diagnostics.npz")["batches"].tolist() == [0]
