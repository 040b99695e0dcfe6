"""Data: loaders, splits and readers of the forms in which users have it. Knows nothing about models."""

from __future__ import annotations

from ._batch import batch_size, map_tensors, slice_batch, tensors, to_device, unpack_batch
from ._buckets import choose_shapes
from ._digits import digits
from ._domain import DomainAdapter, DomainMixture, term_mask
from ._labels import TASKS, class_dim, class_hits
from ._load import load_data
from ._loader import DSDataLoader
from ._pack import Packing, pack_lengths, pack_stream
from ._sequences import block_mask, per_sample_loss, sample_weights
from ._splits import DataSplits, split

__all__ = [
    "TASKS",
    "DSDataLoader",
    "DataSplits",
    "DomainAdapter",
    "DomainMixture",
    "Packing",
    "batch_size",
    "block_mask",
    "choose_shapes",
    "class_dim",
    "class_hits",
    "digits",
    "load_data",
    "map_tensors",
    "pack_lengths",
    "pack_stream",
    "per_sample_loss",
    "sample_weights",
    "slice_batch",
    "split",
    "tensors",
    "term_mask",
    "to_device",
    "unpack_batch",
]
