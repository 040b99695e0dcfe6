"""A folder of images by class: `folder/cat/1.png`, `folder/dog/2.jpg`. Knows nothing about models.

A folder whose subfolders are `train`, `val` (or `valid`) and `test`, each with the classes in it, is split already.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from ..core import InputError, probe
from ..core.errors import missing_extra

_SUFFIXES = (".png", ".jpg", ".jpeg")
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find_images(folder: Path) -> tuple[dict[str, list[tuple[Path, str]]], list[str]]:
    """Files and their classes by part ("" where the folder is not split already), and notes on what is left out.

    Raises:
        InputError: no class folders, or a class without images.
    """
    children = _folders(folder)
    given = {_PARTS[c.name.lower()]: c for c in children if c.name.lower() in _PARTS}
    if "train" in given and len(given) == len(children) and len(given) > 1:
        roots = given
    else:
        roots = {"": folder}
    found: dict[str, list[tuple[Path, str]]] = {}
    other: list[Path] = []
    for part, root in roots.items():
        found[part] = []
        for child in _folders(root):
            files = sorted(f for f in child.rglob("*") if f.is_file() and not f.name.startswith("."))
            images = [f for f in files if f.suffix.lower() in _SUFFIXES]
            other += [f for f in files if f.suffix.lower() not in _SUFFIXES]
            if not images:
                raise InputError(f"{child} has no {', '.join(_SUFFIXES)} files in it; fill or remove the folder.")
            found[part] += [(f, child.name) for f in images]
        if not found[part]:
            raise InputError(f"{root} has no class folders in it; put the images in one folder for each class.")
    notes = [f"{len(other)} file(s) that are no PNG or JPEG were left out, first {other[0]}"] if other else []
    return found, notes


def read_images(files: list[Path], image_size: tuple[int, int] | None, *, grey: bool) -> np.ndarray:
    """Images as one uint8 array (n, channels, height, width).

    Args:
        image_size: (height, width) to resize every image to (bilinear, proportions not kept); None keeps the sizes.
        grey: one channel instead of red, green and blue.

    Raises:
        InputError: an unreadable image, sizes that differ, or more than memory can take; the file is named.
    """
    arrays: list[np.ndarray] = []
    for file in files:
        array = _read(file, image_size, grey=grey)
        if arrays and array.shape != arrays[0].shape:
            first, this = (f"{a.shape[2]}x{a.shape[1]}" for a in (arrays[0], array))
            raise InputError(
                f"{file} is {this} (width x height), but {files[0]} is {first}; all images need one size. "
                "Resize them, or give image_size=(height, width) (--image-size on the command line)."
            )
        if not arrays:
            # One byte a value as read, four as float32, four more while the parts are copied out.
            _check_memory(array.size * len(files) * 9, len(files), file.parent)
        arrays.append(array)
    return np.stack(arrays)


def all_grey(files: list[Path]) -> bool:
    """Whether every image has one channel. Looks at the files' headers only."""
    image = _pillow()
    for file in files:
        try:
            with image.open(file) as opened:
                mode = opened.mode
        except OSError as e:
            raise InputError(f"{file} cannot be read as an image: {e}. Replace or remove it.") from e
        if mode.startswith(("I", "F")):
            raise InputError(f"{file} has 16 or 32 bits a channel (mode {mode}); convert it to 8 bits.")
        if mode not in ("1", "L", "LA"):
            return False
    return True


def _folders(folder: Path) -> list[Path]:
    return sorted(c for c in folder.iterdir() if c.is_dir() and not c.name.startswith("."))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as e:
        raise missing_extra("reading images", "Pillow", "images") from e
    return Image


def _read(file: Path, image_size: tuple[int, int] | None, *, grey: bool) -> np.ndarray:
    image = _pillow()
    try:
        with image.open(file) as opened:
            picture = opened.convert("L" if grey else "RGB")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as e:
        raise InputError(f"{file} cannot be read as an image: {e}. Replace or remove it.") from e
    if image_size is not None:
        picture = picture.resize((image_size[1], image_size[0]), image.Resampling.BILINEAR)
    array = np.asarray(picture, dtype=np.uint8)
    return array[None] if grey else array.transpose(2, 0, 1)


def _check_memory(wanted_bytes: int, count: int, where: Path) -> None:
    memory = probe().memory_bytes
    if memory and wanted_bytes > memory / 2:
        raise InputError(
            f"{where}: {count:,} images need {wanted_bytes / 1e9:.1f} GB as arrays and this machine has "
            f"{memory / 1e9:.1f} GB. Give a smaller image_size, or file.py:loader with a loader that reads from disk."
        )
