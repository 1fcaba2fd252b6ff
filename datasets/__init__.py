"""Data sets: :func:`build_data` reads one, holds images out, cuts it to a long tail, and makes its loaders."""

from datasets.data import Data, Images, build_data
from datasets.source import DataError
from datasets.specs import find_spec

__all__ = ["Data", "DataError", "Images", "build_data", "find_spec"]
