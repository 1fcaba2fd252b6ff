"""What every other package may import, and what imports none of them.

Except that it looks where they are: many projects have a `utils` or `models`, and Hugging Face has `datasets`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

for _name in ("datasets", "methods", "models"):
    _spec = find_spec(_name)
    if _spec is None or Path(_spec.origin or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
        sys.stderr.write(
            f"error: `{_name}` is {_spec and _spec.origin}, not this project's: run from this project's folder, "
            "or put it first in PYTHONPATH\n"
        )
        raise SystemExit(2)
