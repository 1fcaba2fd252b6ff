"""models/places.py: the frozen backbone, the new block and the classifier."""

import pytest
import torch

from models import build_model
from utils.errors import InputError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("places", "resnet50", 12, pretrained=False)


def test_only_block_and_classifier_learn(model):
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"block", "classifier"}


def test_the_backbone_has_lost_its_last_block(model):
    assert len(model.backbone.layer4) == 2
    assert model.block.conv1.weight.shape == (512, 2048, 1, 1)


def test_the_backbone_stays_in_eval_mode_and_does_not_move(model):
    model.train()
    assert not model.backbone.training
    assert model.block.training
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    block_before = model.block.conv1.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert not torch.equal(block_before, model.block.conv1.weight)
    assert model.block.bn1.num_batches_tracked == 1


def test_places_needs_bottleneck_blocks():
    with pytest.raises(InputError, match="places needs torchvision's with bottleneck blocks"):
        build_model("places", "resnet18", 365, pretrained=False)


def test_the_habit_of_places_is_pretrained_weights(monkeypatch):
    """Without a word about them, published weights are asked for; the network is not needed to see that."""
    asked = []
    monkeypatch.setattr("models.resnet._load_pretrained", lambda *arguments: asked.append(arguments[1:]))
    build_model("places", "resnet50", 3)
    assert asked == [("resnet50", True)]
