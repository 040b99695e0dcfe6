"""Printed characters on photographs: a task that needs no download, and is hard enough to lose accuracy on.

47 classes (digits and letters; capitals and small letters that look alike are one class, as in EMNIST), drawn in the
fonts that matplotlib ships, turned, sheared, scaled, blurred and put on crops of scikit-learn's two photographs with
noise. The test set is drawn in five fonts that the training set does not have.
"""

from __future__ import annotations

import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, TensorDataset

SIDE = 16
HELD_OUT = ("DejaVuSerif-Italic", "cmss10", "STIXGeneralBol", "cmtt10", "DejaVuSansMono-Oblique")
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmti10",
)  # fmt: skip
_ALIKE = "cijklmopsuvwxyz"
CLASSES = string.digits + string.ascii_uppercase + "".join(c for c in string.ascii_lowercase if c not in _ALIKE)


def glyphs(count: int, seed: int, *, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 1, 16, 16] with mean 0 and spread 1 each, and their classes."""
    rng = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 28) for name in (HELD_OUT if held_out else FONTS)]
    photos = [
        np.asarray(Image.fromarray(photo).convert("L"), dtype=np.float32) for photo in load_sample_images().images
    ]
    letters = string.digits + string.ascii_letters
    pictures = np.empty((count, 1, SIDE, SIDE), dtype=np.float32)
    classes = np.empty(count, dtype=np.int64)
    for i in range(count):
        letter = letters[rng.integers(len(letters))]
        mask = _drawn(letter, fonts[rng.integers(len(fonts))], rng)
        photo = photos[rng.integers(len(photos))]
        top, left = rng.integers(photo.shape[0] - SIDE), rng.integers(photo.shape[1] - SIDE)
        back = photo[top : top + SIDE, left : left + SIDE] / 255
        ink = float(back.mean()) + rng.choice([-1, 1]) * rng.uniform(0.45, 0.8)
        back = 0.4 * (back - back.mean()) + back.mean()
        mixed = back * (1 - mask) + ink * mask + rng.normal(0, 0.04, mask.shape)
        pictures[i, 0] = (mixed - mixed.mean()) / (mixed.std() + 1e-6)
        classes[i] = CLASSES.index(letter.upper() if letter in _ALIKE else letter)
    return torch.from_numpy(pictures), torch.from_numpy(classes)


def _drawn(letter: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> np.ndarray:
    sheet = Image.new("L", (48, 48))
    ImageDraw.Draw(sheet).text((24, 24), letter, fill=255, font=font, anchor="mm")
    angle, shear, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15), 48 / SIDE / rng.uniform(1.2, 1.6)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]] * scale
    move = 24 - turn @ (SIDE / 2 + rng.uniform(-1, 1, 2))
    small = sheet.transform(
        (SIDE, SIDE), Image.Transform.AFFINE, (*turn[0], move[0], *turn[1], move[1]), Image.Resampling.BILINEAR
    )
    return np.asarray(small.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9))), dtype=np.float32) / 255


def loaders(train: int, test: int, seed: int = 0, batch_size: int = 128) -> tuple[DataLoader, DataLoader]:
    """Batches for training, shuffled, and of the held-out fonts."""
    torch.manual_seed(seed)
    first, second = glyphs(train, 1), glyphs(test, 2, held_out=True)
    return (
        DataLoader(TensorDataset(*first), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(*second), batch_size=250),
    )
