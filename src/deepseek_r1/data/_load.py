"""`load_data`: from what the user has (a folder, a file, a function) to a `DataSplits`. Knows nothing about models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..core import ConfigError, DeepSeekError, InputError
from ..core.userfile import load_attribute
from ._digits import digits
from ._images import all_grey, find_images, read_images
from ._loader import DSDataLoader
from ._splits import FRACTIONS, DataSplits, class_indices, from_arrays, split
from ._tables import read_csv, read_jsonl, read_npz

_READERS: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray]]] = {
    ".npz": read_npz,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
}
_FORMS = "a folder of images by class, .npz, .csv, .jsonl, file.py:loader, or the word digits"


def load_data(
    spec: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    seed: int = 0,
    fractions: tuple[float, float, float] = FRACTIONS,
    image_size: tuple[int, int] | None = None,
) -> DataSplits:
    """Read a dataset and split it into training, validation and test parts.

    Args:
        spec: a folder of images by class (PNG, JPEG), a `.npz` (arrays x and y, or inputs and labels), a `.csv`
            (header; label column "label", "target" or the last), a `.jsonl` (objects with "label" and "features" or
            numeric fields), `file.py:loader` (a function that gives a DataLoader, two or three of them, or arrays
            `(x, y)`), or "digits".
        seed: of the split and of the training batches' order.
        fractions: shares of training, validation and test where the source is not split already.
        image_size: (height, width) to resize images to.

    Raises:
        InputError: nothing there, an unknown ending, or content that cannot be used; the file, line or row is named.
        UnsafeFileError: a `.npz` with pickled objects.
        MissingExtraError: images without Pillow.

    Example:
        >>> load_data("digits").input_shape
        (1, 8, 8)
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}: at least 1 is needed.")
    text, path = str(spec), Path(spec)
    if text == "digits" and not path.exists():
        return digits(batch_size=batch_size, seed=seed)
    if ".py:" in text:
        return _from_function(text, batch_size=batch_size, seed=seed, fractions=fractions)
    if not path.exists():
        raise InputError(f"{path} does not exist; data is {_FORMS}.")
    if path.is_dir():
        return _from_folder(path, batch_size=batch_size, seed=seed, fractions=fractions, image_size=image_size)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} has the unknown ending {path.suffix!r}; data is {_FORMS}.")
    x, y = reader(path)
    return _from_pair(path.name, x, y, batch_size=batch_size, seed=seed, fractions=fractions)


def _from_pair(
    name: str, x: Any, y: Any, *, batch_size: int, seed: int, fractions: tuple[float, float, float]
) -> DataSplits:
    x, y = (v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in (x, y))
    if not x.ndim or not y.ndim or len(x) != len(y):
        raise InputError(f"{name}: inputs of shape {x.shape} and labels of shape {y.shape}; one label for each input.")
    if not x.size:
        raise InputError(f"{name} is empty: its inputs have shape {x.shape}.")
    inputs, steps = _model_ready(x, name)
    labels, names = class_indices(y, name, inputs.shape if inputs.dtype == np.int64 else None)
    if names is None and labels.ndim == 1:
        # One column, as a layer with one output gives it: a flat target would broadcast against it.
        labels = labels[:, None]
    parts = split(inputs, labels, seed=seed, fractions=fractions)
    return from_arrays(name, parts, batch_size=batch_size, seed=seed, labels=names, preprocessing=steps)


def _model_ready(x: np.ndarray, name: str) -> tuple[np.ndarray, tuple[Mapping[str, Any], ...]]:
    """Inputs as the dtype a model takes, and the steps that did it."""
    if x.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        if len(bad):
            raise InputError(f"{name}: row {bad[0]} of the inputs has NaN or infinity. Fill or remove it.")
    if x.dtype == np.uint8:
        return x.astype(np.float32) * np.float32(1 / 255), _pixel_steps()
    if x.dtype.kind not in "fiub":
        raise InputError(f"{name}: the inputs have dtype {x.dtype}; numbers are needed.")
    dtype = np.dtype(np.int64) if x.dtype.kind in "iu" else np.dtype(np.float32)
    return x.astype(dtype), ({"op": "cast", "dtype": dtype.name},)


def _pixel_steps() -> tuple[Mapping[str, Any], ...]:
    return {"op": "cast", "dtype": "float32"}, {"op": "scale", "factor": 1 / 255}


def _from_folder(
    folder: Path,
    *,
    batch_size: int,
    seed: int,
    fractions: tuple[float, float, float],
    image_size: tuple[int, int] | None,
) -> DataSplits:
    found, notes = find_images(folder)
    everything = [item for items in found.values() for item in items]
    classes = sorted({label for _, label in everything})
    if len(classes) < 2:
        raise InputError(f"{folder} has the single class {classes[0]!r}; at least two class folders are needed.")
    files = [file for file, _ in everything]
    pixels = read_images(files, image_size, grey=all_grey(files))
    x, steps = _model_ready(pixels, str(folder))
    y = np.array([classes.index(label) for _, label in everything], dtype=np.int64)
    if image_size is not None:
        notes.append(f"every image was resized to {image_size[1]}x{image_size[0]}; proportions were not kept")
    if "" in found:
        parts = split(x, y, seed=seed, fractions=fractions)
    else:
        starts = np.cumsum([0, *(len(items) for items in found.values())])
        given = {p: (x[a:b], y[a:b]) for p, a, b in zip(found, starts[:-1], starts[1:], strict=True)}
        none = (x[:0], y[:0])
        parts = given["train"], given.get("val", none), given.get("test", none)
        notes.append(f"the folder is split already: {', '.join(f'{p} {len(v[0]):,}' for p, v in given.items())}")
    return from_arrays(
        folder.name,
        parts,
        batch_size=batch_size,
        seed=seed,
        labels=tuple(classes),
        preprocessing=steps,
        notes=tuple(notes),
    )


def _from_function(spec: str, *, batch_size: int, seed: int, fractions: tuple[float, float, float]) -> DataSplits:
    thing = load_attribute(spec, example="my_data.py:loader")
    if callable(thing) and not isinstance(thing, DataLoader | Dataset):
        try:
            thing = thing()
        except DeepSeekError:
            raise
        except Exception as e:
            raise InputError(f"{spec} failed: {type(e).__name__}: {e}") from e
    if isinstance(thing, DataSplits):
        return thing
    many = list(thing) if isinstance(thing, tuple | list) else [thing]
    if 1 <= len(many) <= 3 and all(isinstance(m, DataLoader | Dataset) for m in many):
        loaders = [
            m if isinstance(m, DataLoader) else DSDataLoader(m, batch_size=batch_size, shuffle=not i, seed=seed)
            for i, m in enumerate(many)
        ]
        for part, loader in zip(("training", "validation", "test"), loaders, strict=False):
            if hasattr(loader.dataset, "__len__") and len(loader.dataset) == 0:
                raise InputError(f"{spec}: the {part} part is empty.")
        train, val, test = [*loaders, None, None][:3]
        assert train is not None
        return DataSplits(name=spec, train=train, val=val, test=test)
    if len(many) == 2 and all(hasattr(m, "shape") or isinstance(m, list) for m in many):
        return _from_pair(spec, *many, batch_size=batch_size, seed=seed, fractions=fractions)
    kinds = ", ".join(type(m).__name__ for m in many)
    raise InputError(f"{spec} gave {kinds}; a DataLoader, two or three of them, or arrays (x, y) are needed.")
