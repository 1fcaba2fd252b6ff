"""A loss is added in three places: a function, a line of the registry, a YAML."""

import torch
import torch.nn.functional as F

from methods import losses, method
from tests.conftest import CE, ROOT, history, log_of, train

YAML = f"_BASE_: {ROOT / CE}\nloss: hinge\nmixup: True\n"


def hinge(logits, targets):
    """The multi-class hinge loss."""
    return torch.stack([F.multi_margin_loss(logits, y, reduction="none") for y in targets])


def test_a_loss_is_added_in_three_places(tmp_path, monkeypatch):
    """As the README says; it is trained by the real script."""
    monkeypatch.setattr(losses, "hinge", hinge, raising=False)
    monkeypatch.setitem(method.LOSSES, "hinge", (hinge, {}))
    (tmp_path / "hinge.yaml").write_text(YAML)

    folder = train(tmp_path / "saved", "num_epochs", 4, cfg=str(tmp_path / "hinge.yaml"))
    assert "hinge: training hinge, mixup alpha 1" in log_of(folder).splitlines()[0]
    first, *_, last = (row["train"]["loss"] for row in history(folder))
    assert 0 < last < first < 2  # of cross-entropy it would begin at log 10
