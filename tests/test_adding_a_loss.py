"""A loss is added in three places: a function, a line of the registry, a YAML."""

import json
import os
import shutil
import subprocess
import sys

from tests.conftest import ROOT

FUNCTION = '''

def hinge(logits: Tensor, targets: Tensor) -> Tensor:
    """The multi-class hinge loss."""
    return torch.stack([F.multi_margin_loss(logits, y, reduction="none") for y in targets])
'''
REGISTERED = '    "ce": (losses.cross_entropy, {}),\n'
LINE = '    "hinge": (losses.hinge, {}),\n'
YAML = "_BASE_: digits_imb005.yaml\nloss: hinge\nmixup: True\nnum_epochs: 1\n"


def test_a_loss_is_added_in_three_places(tmp_path):
    """A copy of the sources gets one and trains it by the real script."""
    for name in ("config", "datasets", "methods", "models", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_stage1.py", tmp_path)
    with (tmp_path / "methods" / "losses.py").open("a") as file:
        file.write(FUNCTION)
    registry = tmp_path / "methods" / "method.py"
    assert registry.read_text().count(REGISTERED) == 1
    registry.write_text(registry.read_text().replace(REGISTERED, REGISTERED + LINE))
    (tmp_path / "config" / "digits" / "hinge.yaml").write_text(YAML)

    command = [sys.executable, "train_stage1.py", "--cfg", "config/digits/hinge.yaml", "device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "saved").iterdir()
    first = (folder / "logs" / "hinge.txt").read_text().splitlines()[0]
    assert "hinge: training hinge, mixup alpha 1" in first
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < row["train"]["loss"] < 2  # of cross-entropy it would begin at log 10
    assert row["test"]["top1"] > 15
