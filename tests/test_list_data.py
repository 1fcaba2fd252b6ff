"""ImageNet-LT, iNaturalist 2018 and Places-LT end to end: configurations, class maps, the authors' commands."""

import csv
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import eval as eval_script
import train_stage1
from datasets.class_order import class_map_for
from models import build_model
from tests.conftest import ROOT, assert_same_run, failure, train
from tests.goldens.fill import fill_state_dict, wave_images
from tests.scripts import ended, free_port, started
from utils import build
from utils.checkpoint import load_weights
from utils.config import load_config
from utils.run import resume

# As the authors released them: (loss, counts, mixup alpha or None, batch, weight decay, epochs).
CONFIGS = {
    "imagenet/imagenet_resnet50": ("ce", None, None, 1024, 5e-4, 200),
    "imagenet/imagenet_resnet50_arbloss": ("arb", "batch", None, 768, 5e-4, 200),
    "imagenet/imagenet_resnet50_arbloss_ugcc": ("arb", "global", None, 768, 5e-4, 200),
    "imagenet/imagenet_resnet50_arbloss_ugcc_mixup": ("arb", "global", 0.2, 1024, 5e-4, 200),
    "ina2018/ina2018_resnet50": ("ce", None, None, 1024, 1e-4, 200),
    "ina2018/ina2018_resnet50_arbloss_ugcc": ("arb", "global", None, 1024, 1e-4, 200),
    "ina2018/ina2018_resnet50_arbloss_ugcc_mixup": ("arb", "global", 0.2, 1024, 1e-4, 200),
    "places/places_resnet50": ("ce", None, None, 1024, 5e-4, 90),
    "places/places_resnet50_arbloss_ugcc_mixup": ("arb", "global", 0.2, 1024, 5e-4, 90),
    "places/places_resnet152_arbloss_ugcc_mixup": ("arb", "global", 0.2, 1024, 5e-4, 90),
}
SMALL = ["batch_size", 8, "workers", 1, "num_epochs", 1]
LINES = re.compile(r"^(?:\S+ \S+ )?(\* (?:Acc@1|ECE) .*)$", re.MULTILINE)
IMAGENET = "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml"


def test_these_are_all_configurations():
    found = {p for d in ("imagenet", "ina2018", "places") for p in (ROOT / "config" / d).glob("*.yaml")}
    assert {f"{p.parent.name}/{p.stem}" for p in found if p.stem != "base"} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_what_the_released_one_says(name):
    cfg = load_config(f"config/{name}.yaml")
    counts = cfg.class_counts if cfg.loss == "arb" else None
    said = (cfg.loss, counts, cfg.alpha if cfg.mixup else None, cfg.batch_size, cfg.weight_decay, cfg.num_epochs)
    assert said == CONFIGS[name]
    assert (cfg.lr, cfg.cos, cfg.momentum, cfg.imb_factor, cfg.pretrained) == (0.1, True, 0.9, None, None)
    assert cfg.dataset == name.split("/")[0]
    assert cfg.backbone.removesuffix("_fe") == name.split("_")[1]


# ---------------------------------------------------------------------------------------------------------------------
# The authors' commands


# One of the authors' commands per data set is slow, the others are soak.
AUTHORS = (
    "imagenet_resnet50_arbloss_ugcc_mixup",
    "ina2018_resnet50_arbloss_ugcc_mixup",
    "places_resnet50_arbloss_ugcc_mixup",
)
LAUNCHED = [
    pytest.param(name, marks=pytest.mark.slow if name.endswith(AUTHORS) else pytest.mark.soak) for name in CONFIGS
]


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_configuration_trains_with_two_processes_and_is_evaluated(name, lists, tmp_path):
    """Two of them at full size; the pretrained weights of Places are a file with any numbers."""
    dataset, full = (
        name.split("/")[0],
        name.endswith(("net_resnet50_arbloss_ugcc_mixup", "resnet152_arbloss_ugcc_mixup")),
    )
    options = ["data_path", lists / dataset, *SMALL, *([] if full else ["image_size", 64])]
    if dataset == "places":
        backbone = load_config(f"config/{name}.yaml").backbone.removesuffix("_fe")
        weights = build_model("imagenet", backbone, 1000, pretrained=False).backbone.state_dict()
        torch.save(weights, tmp_path / "weights.pth")
        options += ["pretrained", tmp_path / "weights.pth"]
    launch = ["-m", "torch.distributed.launch", "--nproc_per_node", 2, "--master_port", free_port()]
    training = ["train_stage1.py", "--cfg", f"./config/{name}.yaml", *options, "save_dir", tmp_path]
    trained = said(tmp_path, *launch, *training)
    (tmp_path / "weights.pth").unlink(missing_ok=True)  # a checkpoint needs them no more
    (run,) = tmp_path.glob("*resnet*_2*")
    words = ["eval.py", "--cfg", run / "config.yaml", "resume", run / "ckps" / "current.pth.tar"]
    evaluated = LINES.findall(said(tmp_path, *words))
    assert len(evaluated) == 2
    assert LINES.findall(trained)[-2:] == evaluated


def said(folder: Path, *words: object) -> str:
    with started(folder, *words) as run:
        done = ended(run, 500)
    assert done.code == 0, done.err
    return done.out


def test_resume_matches_an_uninterrupted_run_with_any_number_of_workers(lists, tmp_path):
    """Crops and colours are a function of (seed, epoch, image)."""
    options = ["data_path", lists / "imagenet", "batch_size", 16, "cos", False, "warmup_epochs", 0, "accumulate", 2]
    whole = train(tmp_path / "whole", *options, "workers", 0, "num_epochs", 2, cfg=IMAGENET)
    parts = train(tmp_path / "parts", *options, "workers", 2, "num_epochs", 1, cfg=IMAGENET)
    last = parts / "ckps" / "current.pth.tar"
    train(tmp_path / "parts", *options, "workers", 1, "num_epochs", 2, "resume", last, cfg=IMAGENET)
    assert_same_run(whole, parts)
    log = next((whole / "logs").iterdir()).read_text()
    assert "batch 16 in 2 micro-batches" in log
    assert "images: 8 pixels, decoded with PIL by 0 workers" in log


# ---------------------------------------------------------------------------------------------------------------------
# Class maps


TIED = np.bincount(np.arange(40).repeat(2), minlength=1000)  # training images per class


@pytest.fixture(scope="module")
def tied(tmp_path_factory, lists) -> Path:
    """ImageNet-LT with two training images of each of 40 classes: every order of them is by frequency."""
    root = tmp_path_factory.mktemp("tied")
    image = next((lists / "places" / "val_256").iterdir()).read_bytes()
    for name, folder in (("train", "train"), ("test", "val")):
        paths = [(f"{folder}/{c}_{i}.jpg", c) for c in range(40) for i in range(2)]
        (root / folder).mkdir()
        for path, _ in paths:
            (root / path).write_bytes(image)
        (root / f"ImageNet_LT_{name}.txt").write_text("".join(f"{path} {c}\n" for path, c in paths))
    return root


@pytest.fixture(scope="module")
def run(tied, tmp_path_factory) -> Path:
    """A run on these data with a stable order."""
    options = ["data_path", tied, "backbone", "resnet10", "num_epochs", 1, "workers", 0, "batch_size", 40]
    return train(tmp_path_factory.mktemp("saved"), *options, cfg=IMAGENET)


def test_the_log_and_the_checkpoint_know_the_class_map(run):
    stored = torch.load(run / "ckps" / "current.pth.tar", weights_only=True)["class_map"]
    assert stored.tolist() == class_map_for("stable", TIED).tolist() == list(range(1000))
    assert class_map_for("legacy", TIED).tolist() != stored.tolist()
    assert "note: class map: stable\n" in next((run / "logs").iterdir()).read_text()


def foreign(run: Path, path: Path) -> Path:
    """The same weights as MiSLAS would have saved them."""
    own = torch.load(run / "ckps" / "current.pth.tar", weights_only=True)
    parts = {key: value for key, value in own.items() if key.startswith("state_dict_") and "method" not in key}
    torch.save({"epoch": 1, "best_acc1": own["best_acc1"], "its_ece": np.float64(0.1), **parts}, path)
    return path


@pytest.mark.parametrize("wanted", ["stable", "legacy", None])
def test_a_checkpoint_keeps_its_map_and_one_without_gets_the_legacy_order(run, tied, tmp_path, wanted):
    asked = [] if wanted is None else ["class_map", wanted]
    cfg = load_config(run / "config.yaml", ["resume", str(run / "ckps" / "current.pth.tar"), *asked])
    numbering = resume.class_map(cfg, resume.find_checkpoint(cfg))
    assert build.load_data(cfg, numbering.choice, torch.device("cpu")).class_map.tolist() == list(range(1000))
    assert numbering.notes[0].startswith("class map: the checkpoint's")
    cfg = load_config(run / "config.yaml", ["resume", str(foreign(run, tmp_path / "best.pth.tar")), *asked])
    numbering = resume.class_map(cfg, resume.find_checkpoint(cfg))
    assert numbering == (wanted or "legacy", [f"class map: {wanted or 'legacy'}, the checkpoint has none"])


def test_a_foreign_checkpoint_is_evaluated_in_the_legacy_order_without_pretrained_weights(run, tmp_path, capsys):
    config = ["--cfg", run / "config.yaml", "pretrained", "absent.pth", "save_dir", tmp_path / "saved"]
    eval_script.main([*map(str, config), "resume", str(foreign(run, tmp_path / "best.pth.tar"))])
    printed = capsys.readouterr().out
    assert "note: class map: legacy, the checkpoint has none\n" in printed
    assert len(LINES.findall(printed)) == 2
    (report,) = (tmp_path / "saved").glob("*/per_class.csv")
    tested = [int(row["class"]) for row in csv.DictReader(report.open()) if row["test_images"] != "0"]
    assert sorted(class_map_for("legacy", TIED)[:40]) == tested
    bad = failure(capsys, train_stage1.main, *config)
    assert (bad.code, bad.lines) == (2, ["error: pretrained: absent.pth: no such weights file"])


def test_a_run_goes_on_with_its_own_list_only(run, tied, tmp_path, capsys):
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("".join((tied / "ImageNet_LT_train.txt").read_text().splitlines(keepends=True)[:-1]))
    resume = ["resume", run / "ckps" / "current.pth.tar", "num_epochs", 2, "train_txt", shorter]
    bad = failure(capsys, train_stage1.main, "--cfg", run / "config.yaml", *resume)
    assert (bad.code, len(bad.lines)) == (2, 1)
    assert "was trained on other images" in bad.said


def test_options_of_lists_are_refused_for_other_data(capsys):
    for option in ("class_map", "train_txt", "val_txt"):
        bad = failure(
            capsys, train_stage1.main, "--cfg", "config/digits/digits_imb005.yaml", option, "stable", "num_epochs", 1
        )
        assert (bad.code, len(bad.lines)) == (2, 1)
        assert f"{option}: digits does not come as lists" in bad.said


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints


@pytest.mark.parametrize(
    ("dataset", "backbone", "classes", "name", "images", "zipped"),
    [
        ("cifar10", "resnet32", 10, "resnet32", (4, 32), True),
        ("cifar10", "resnet32", 10, "resnet32", (4, 32), False),  # the file format of torch 1.2
        pytest.param("imagenet", "resnet50", 50, "resnet50", (2, 64), False, marks=pytest.mark.slow),
        pytest.param("places", "resnet152", 365, "places152", (2, 64), False, marks=pytest.mark.slow),
    ],
)
def test_the_goldens_come_out_of_a_checkpoint_in_mislas_format(
    dataset, backbone, classes, name, images, zipped, tmp_path
):
    """The reference's numbers, from its key names, through a file like its own."""
    model = build_model(dataset, backbone, classes, pretrained=False)
    parts = {
        "state_dict_model": model.backbone,
        "state_dict_classifier": model.classifier,
        "state_dict_block": model.block,
    }
    content = {"epoch": 200, "best_acc1": torch.tensor([40.0]), "its_ece": np.float64(0.05)}
    for key, part in parts.items():
        if part is not None:
            state = {k: v.clone() for k, v in part.state_dict().items()}
            fill_state_dict(state)
            content[key] = OrderedDict((f"module.{k}", v) for k, v in state.items())
    torch.save(content, tmp_path / "model_best.pth.tar", _use_new_zipfile_serialization=zipped)
    load_weights(model, tmp_path / "model_best.pth.tar")
    stored = np.load(ROOT / "tests" / "goldens" / "forward.npz")
    logits = model.eval()(wave_images(*images, int(stored["seed"]))).detach()
    expected = stored[f"{name}.logits"]
    assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
