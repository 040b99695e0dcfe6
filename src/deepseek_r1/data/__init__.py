"""Data: loaders, splits and readers of the forms in which users have it. Knows nothing about models."""

from __future__ import annotations

from ._batch import batch_size, slice_batch, unpack_batch
from ._digits import digits
from ._labels import TASKS, class_dim, class_hits
from ._load import load_data
from ._loader import DSDataLoader
from ._splits import DataSplits, split

__all__ = [
    "TASKS",
    "DSDataLoader",
    "DataSplits",
    "batch_size",
    "class_dim",
    "class_hits",
    "digits",
    "load_data",
    "slice_batch",
    "split",
    "unpack_batch",
]
