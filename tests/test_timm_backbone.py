"""models/timm_backbone.py: timm's models as backbones."""

import sys

import pytest
import torch
from torch import nn

import train_stage1
from models import build_model, find_backbone
from tests.conftest import ARB, CE, assert_same_run, content, current, failure, stopped, train
from utils.errors import InputError


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


def test_without_timm_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    done = failure(capsys, train_stage1.main, "--cfg", CE, "backbone", "timm:test_resnet")
    assert (done.code, done.lines) == (2, ["error: backbone: timm:NAME needs timm: pip install timm"])


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 8), ("test_resnet", 33), ("test_vit", 32)])
def test_features_are_flat_at_any_size(timm, name, size):
    torch.manual_seed(0)
    model = build_model("digits", f"timm:{name}", 7, image_size=size)
    logits, features = model(torch.randn(3, 3, size, size), with_features=True)
    assert logits.shape == (3, 7) and features.shape == (3, model.backbone.out_features)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_drawn_in_training(timm):
    """Swin has stochastic depth by default."""
    assert timm.create_model("swin_tiny_patch4_window7_224").layers[-1].blocks[-1].drop_path1.drop_prob > 0
    model = build_model("digits", "timm:swin_tiny_patch4_window7_224", 10, image_size=32).train()
    before, images = torch.get_rng_state(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_a_file_are_loaded_without_its_classifier(timm, tmp_path):
    torch.manual_seed(0)
    theirs, images = timm.create_model("test_vit", img_size=32).eval(), torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        model = build_model("digits", "timm:test_vit", 7, str(tmp_path / name), image_size=32).eval()
        torch.testing.assert_close(theirs.head(model.features(images)), theirs(images))
    with pytest.raises(InputError, match=r"weights.pth: does not fit timm:test_vit2: "):
        build_model("digits", "timm:test_vit2", 7, str(tmp_path / "weights.pth"), image_size=32)
    with pytest.raises(InputError, match=r"weights.pth: does not fit timm:test_vit: .*pos_embed"):
        build_model("digits", "timm:test_vit", 7, str(tmp_path / "weights.pth"), image_size=64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["backbone", "timm:resnet51"], "backbone: timm has no model 'resnet51'; near are resnet5"),
        (["backbone", "timm:resnet18.none"], "backbone: timm has no model 'resnet18.none'; near are resnet18"),
        (["backbone", "timm:"], "backbone: timm has no model '', see timm.list_models()"),
        (["backbone", "timm:test_vit", "image_size", 17], "image_size: timm:test_vit does not take images of 17"),
        (["backbone", "timm:test_vit2", "pretrained", True], "pretrained: cannot download timm/test_vit2.r160_in1k ("),
        (["backbone", "timm:test_vit4", "pretrained", True], "pretrained: True, but timm has no weights for test_v"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(timm, no_hub, capsys, tmp_path, options, words):
    done = failure(capsys, train_stage1.main, "--cfg", CE, "save_dir", tmp_path, *options)
    assert (done.code, len(done.lines)) == (2, 1), done.said
    assert done.said.startswith(f"error: {words}")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_hub(monkeypatch, tmp_path_factory):
    """The hub's client refuses to download, and its cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


def test_models_without_flat_features_are_refused(timm, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **options: nn.Conv2d(3, 4, 1))
    with pytest.raises(InputError, match=r"backbone: timm:test_resnet gives no flat features \[B, D\]"):
        build_model("digits", "timm:test_resnet", 10, image_size=8)
    monkeypatch.undo()
    with pytest.raises(InputError, match="places needs torchvision's with bottleneck"):
        build_model("places", "timm:test_resnet", 10, False, image_size=32)


def test_a_resumed_run_is_the_uninterrupted_one(timm, tmp_path):
    options = ["backbone", "timm:test_resnet", "num_epochs", 2, "keep_epochs", "[1]"]
    whole = train(tmp_path / "whole", *options)
    assert "layer1.0.conv1.weight" in content(whole)["state_dict_model"] and find_backbone("timm:test_resnet")
    folder = stopped(whole, tmp_path)
    train(tmp_path, *options, "resume", current(folder), cfg=ARB)
    assert_same_run(folder, whole)
