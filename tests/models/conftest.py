"""Small architectures, and their ONNX files made by torch's own exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_r1.models import DigitsNet

DYNAMIC = torch.export.Dim.DYNAMIC


class DepthwiseCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 12, 1), nn.SiLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Hardsigmoid())
        self.head = nn.Linear(12, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.body(image)
        return self.head((x * self.gate(x)).mean((2, 3)))


class Block(nn.Module):
    """A causal transformer block with its own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, 16)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.smooth = nn.Upsample(scale_factor=2, mode="bilinear")
        self.coarse = nn.Upsample(scale_factor=2, mode="nearest")
        self.last = nn.Conv2d(24, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.down(image).relu()
        return self.norm(self.last(torch.cat([self.up(x), self.smooth(x), self.coarse(x)], 1))).tanh()


class Embedder(nn.Module):
    """Token embeddings averaged under a mask; two inputs, a keyword's name each."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.encoder(self.words(input_ids) + self.places(places))
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), nn.LeakyReLU(), nn.Linear(16, 8), nn.ELU(), nn.Linear(8, 1), nn.Softplus())


def image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


#: Name -> (architecture, inputs, dynamic dimensions).
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], Any]] = {
    "residual": (DigitsNet, lambda: (torch.randn(2, 1, 8, 8),), ({0: DYNAMIC},)),
    "depthwise": (DepthwiseCnn, lambda: (image(16),), ({0: DYNAMIC},)),
    "mlp": (mlp, lambda: (torch.randn(2, 7),), ({0: DYNAMIC},)),
    "block": (Block, lambda: (torch.randn(2, 5, 16),), ({0: DYNAMIC, 1: DYNAMIC},)),
    "unet": (UNet, lambda: (image(16),), ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)),
    "embedder": (
        Embedder,
        lambda: (torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)),
        ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: (torch.randn(2, 5, 8),), ({0: DYNAMIC},)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: (torch.randn(2, 5, 8),), ({0: DYNAMIC},)),
}


def export_onnx(model: nn.Module, inputs: tuple[Any, ...], path: Path, dynamic: Any, **options: Any) -> Path:
    """Write an ONNX file with torch's exporter, silently."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=dynamic, verbose=False, **options)
    return path


@pytest.fixture(scope="session")
def onnx_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, tuple[Any, ...], Any, Path]]:
    """Architecture by name -> (module, inputs, dynamic dimensions, its ONNX file); each made once."""
    folder = tmp_path_factory.mktemp("zoo")
    made: dict[str, tuple[nn.Module, tuple[Any, ...], Any, Path]] = {}

    def get(name: str) -> tuple[nn.Module, tuple[Any, ...], Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            build, inputs_of, dynamic = ARCHITECTURES[name]
            model, inputs = build(), inputs_of()
            with torch.no_grad():
                # Fresh batch-norm statistics would hide a mix-up of mean and variance.
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.running_mean.normal_()
                        module.running_var.uniform_(0.5, 2)
            model.eval()
            made[name] = model, inputs, dynamic, export_onnx(model, inputs, folder / f"{name}.onnx", dynamic)
        return made[name]

    return get


@pytest.fixture(scope="session")
def hf() -> Any:
    """transformers, the oracle for reference models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.fixture
def both_ways(tmp_path: Path) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """A model of transformers -> (ours from its files, transformers' again from the files that ours writes)."""

    def convert(theirs: nn.Module, ours: Any, **changes: Any) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        with torch.no_grad():
            # Ones and zeros of fresh norms and biases would hide what is swapped or forgotten.
            for name, tensor in theirs.state_dict().items():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.eval().save_pretrained(tmp_path / "theirs")
            model = ours.from_pretrained(tmp_path / "theirs", **changes)
            model.save_pretrained(tmp_path / "ours")
            again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model, again.eval()

    return convert


@pytest.fixture
def same_gradients() -> Callable[[nn.Module, nn.Module, Callable[[str, torch.Tensor], torch.Tensor]], None]:
    """Every parameter's gradient is the same in both; the function turns ours into the file's form."""

    def compare(ours: nn.Module, theirs: nn.Module, to_file: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        # In memory transformers 5 has shorter names for ViT than in its files.
        short = {
            "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
            "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
            "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }  # fmt: skip
        wanted = {}
        for name, p in theirs.named_parameters():
            for new, old in short.items() if name.startswith("vit.") else ():
                name = name.replace(new, old)
            wanted[name] = p.grad
        got = {name: to_file(name, p.grad) for name, p in ours.named_parameters()}
        assert set(got) == set(wanted)
        for name, grad in got.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    return compare
