"""Readers of `.npz`, `.csv` and `.jsonl` files: inputs and labels as two arrays. Knows no torch and no splits."""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..core import InputError, UnsafeFileError

_LABELS = ("label", "target")
_PAIRS = (("x", "y"), ("inputs", "labels"))


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `x` and `y` (or `inputs` and `labels`) of a file that `numpy.savez` wrote.

    Raises:
        UnsafeFileError: it holds pickled objects, which are never opened.
        InputError: damaged, or without such arrays.
    """
    # numpy takes any file that is no archive for a pickle, and would say so.
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is damaged or no .npz file.")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = list(file.keys())
            pair = next((p for p in _PAIRS if set(p) <= set(names)), None)
            if pair is None:
                raise InputError(f"{path} has the arrays {names}; x and y, or inputs and labels, are needed.")
            return file[pair[0]], file[pair[1]]
    except InputError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error) as e:
        if "allow_pickle" in str(e):
            raise UnsafeFileError(f"{path} holds pickled objects, which could run code; save plain arrays.") from e
        raise InputError(f"{path} is damaged or no .npz file: {e}") from e


def read_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Float32 features (n, columns) and labels of a CSV file with a header.

    The label is the column named "label" or "target", else the last one.

    Raises:
        InputError: no header or no rows; a row of another length or a cell that is no finite number, by its line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        if len(header) < 2:
            raise InputError(f"{path} has {len(header)} column(s); a header, features and a label column are needed.")
        if all(_is_number(name) for name in header):
            raise InputError(f"{path} has no header: its first line is all numbers. Put the columns' names there.")
        column = next((i for i, name in enumerate(header) if name.lower() in _LABELS), len(header) - 1)
        features, labels = [], []
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} cells, but the header has {len(header)}.")
            labels.append(row[column].strip())
            features.append([_number(v, where, header[i]) for i, v in enumerate(row) if i != column])
    if not features:
        raise InputError(f"{path} has a header and no rows.")
    return np.array(features, dtype=np.float32), _texts(labels, f"{path}: the column {header[column]!r}")


def read_jsonl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Float32 features and labels of a file with one JSON object a line.

    An object has "label" or "target", and either "features" (numbers, nested lists allowed) or numbers in further
    fields, the same in every line.

    Raises:
        InputError: no rows; no object, no label, another shape or other fields, or no finite number, by its line.
    """
    features: list[np.ndarray] = []
    labels: list[Any] = []
    fields: list[str] | None = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            item = _object(line, where)
            key = next((k for k in _LABELS if k in item), None)
            if key is None:
                raise InputError(f'{where}: no "label" in it; its fields are {", ".join(item) or "none"}.')
            labels.append(item.pop(key))
            fields = fields or list(item)
            if set(item) != set(fields):
                raise InputError(f"{where}: the fields {sorted(item)} differ from the first line's {sorted(fields)}.")
            values = item["features"] if "features" in item else [item[name] for name in fields]
            features.append(_array(values, where))
            if features[-1].shape != features[0].shape:
                raise InputError(
                    f"{where}: features of shape {features[-1].shape}, but {features[0].shape} in the first line."
                )
    if not features:
        raise InputError(f"{path} has no rows.")
    return np.stack(features), _json_labels(labels, path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, where: str, column: str) -> float:
    value = float(text) if _is_number(text) else None
    if value is None or not np.isfinite(value):
        raise InputError(f"{where}, column {column!r}: {text!r} is not a finite number. Fill or remove the row.")
    return value


def _texts(labels: list[str], where: str) -> np.ndarray:
    """Labels that came as text: integers, else decimals, else texts."""
    if "" in labels:
        raise InputError(f"{where} is empty in row {labels.index('') + 1} of the data.")
    for kind in (np.int64, np.float64):
        try:
            return np.array([kind(text) for text in labels])
        except (ValueError, OverflowError):
            continue
    return np.array(labels)


def _json_labels(labels: list[Any], path: Path) -> np.ndarray:
    kinds = {type(label) for label in labels}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) != 1 or not kinds <= {int, float, str, bool}:
        names = ", ".join(sorted(k.__name__ for k in kinds))
        raise InputError(
            f"{path}: the labels are of the kinds {names}; all texts, all integers or all decimals needed."
        )
    return np.array(labels)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where}: no JSON ({e}).") from e
    if not isinstance(item, dict):
        raise InputError(f"{where}: a JSON object is needed, not {line.strip()[:40]!r}.")
    return item


def _array(values: Any, where: str) -> np.ndarray:
    try:
        array = np.array(values)
    except ValueError as e:
        raise InputError(f"{where}: the features are ragged lists; all lists of one level need one length.") from e
    if array.dtype.kind not in "fiub" or not array.size or not np.isfinite(array).all():
        raise InputError(f"{where}: features must be finite numbers, at least one.")
    return array.astype(np.float32)
