"""The handwritten digits that ship inside scikit-learn: real scans, no network."""

from __future__ import annotations

import numpy as np

from ._splits import FRACTIONS, DataSplits, from_arrays, split

#: From the raw scans (n, 8, 8) with values 0..16 to what the model takes.
_STEPS = (
    {"op": "cast", "dtype": "float32"},
    {"op": "reshape", "shape": [-1, 1, 8, 8]},
    {"op": "scale", "factor": 1 / 16},
)


def digits(*, batch_size: int = 32, seed: int = 0) -> DataSplits:
    """1,797 scans of handwritten digits, float32 of shape (n, 1, 8, 8) from 0 to 1, in 10 classes.

    The split (1,258 / 180 / 359) never changes; `seed` decides the order of the training batches only. Source:
    E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as `sklearn.datasets.load_digits`.

    Example:
        >>> data = digits()
        >>> [len(data.tensors(part)[0]) for part in ("train", "val", "test")]
        [1258, 180, 359]
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    x = (source.images.astype(np.float32) * np.float32(1 / 16)).reshape(-1, 1, 8, 8)
    y = source.target.astype(np.int64)
    return from_arrays(
        "digits",
        split(x, y, seed=0, fractions=FRACTIONS),
        batch_size=batch_size,
        seed=seed,
        labels=tuple(str(i) for i in range(10)),
        preprocessing=_STEPS,
    )
