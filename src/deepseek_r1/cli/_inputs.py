"""From the words of the command line to a model, its weights, data and example inputs. Imports torch: only verbs may
import this, and only when they run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ..core import ConfigError, InputError, UnsafeFileError
from ..data import DataSplits, load_data
from ..graph import Program
from ..module import load_model
from ..pruning import plan_in
from ..train import seed_everything

#: Names under which training scripts keep the weights in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and what was given to feed it: data, or example inputs, or neither."""

    model: torch.nn.Module | Program
    data: DataSplits | None
    example_inputs: tuple[torch.Tensor, ...] | None

    def part(self, *names: str) -> DataLoader[Any] | None:
        """The loader of the first part that there is; None without data."""
        found = [getattr(self.data, n) for n in names if getattr(self.data, n, None) is not None]
        return found[0] if found else None

    def then_unseen(self, count: int) -> Iterable[Any]:
        """The first batches of the training part, then the validation part; all of the former without the latter."""
        train, unseen = self.part("train"), self.part("val")
        assert train is not None, "asked where data are needed"
        return train if unseen is None else chain(islice(train, count), unseen)

    def for_artifact(self) -> dict[str, Any]:
        """What an artifact wants to know of the data, as keyword arguments of `deploy.export`."""
        if self.data is None:
            return {"example_inputs": self.example_inputs}
        return {
            "dataset": self.part("test", "val", "train"),
            "labels": self.data.labels,
            "preprocessing": self.data.preprocessing,
        }


def open_inputs(
    model: str,
    *,
    weights: Path | None = None,
    data: str | None = None,
    batch_size: int = 32,
    image_size: str | None = None,
    input_shape: list[str] | None = None,
    input_dtype: list[str] | None = None,
    seed: int = 0,
) -> Opened:
    """Open everything that a verb was given. Data comes first: it fails fastest.

    Raises:
        DeepSeekError: whatever of it cannot be used, by name.
    """
    size = parse_size(image_size) if image_size else None
    splits = load_data(data, batch_size=batch_size, seed=seed, image_size=size) if data else None
    examples = parse_inputs(input_shape, input_dtype or [], seed) if input_shape else None
    if data and input_shape:
        raise InputError("--data and --input-shape were given; one of them is enough.")
    # A factory draws its weights when called, so the seed comes before it.
    seed_everything(seed)
    opened = load_model(model)
    if weights is not None:
        load_weights_(opened, weights)
    return Opened(model=opened, data=splits, example_inputs=examples)


def needs_inputs(opened: Opened) -> None:
    """Raise InputError if a module came with neither data nor input shapes."""
    if not isinstance(opened.model, Program) and opened.data is None and opened.example_inputs is None:
        raise InputError("the shape of the inputs is not known: give --data, or --input-shape such as 1,3,224,224.")


def load_weights_(model: torch.nn.Module | Program, path: Path) -> None:
    """Changes `model`: puts the weights of a file into it, every one of them and no other.

    If the file was written by `prune`, the model is cut to its shapes first.

    Raises:
        InputError: no such file, damaged, or names and shapes that do not fit; the first of each kind are said.
        UnsafeFileError: a `.pt` or `.pth` that would run code when read.
    """
    if isinstance(model, Program):
        raise InputError(f"--weights {path}: this model has its weights in its own file; leave --weights out.")
    if not path.is_file():
        raise InputError(f"--weights {path}: there is no such file.")
    state = _read_weights(path)
    if path.suffix == ".safetensors" and (plan := plan_in(path)) is not None:
        plan.apply_(model)
        model.pruning_plan = plan  # type: ignore[assignment]
    wanted = model.state_dict()
    problems = [
        _list("missing in the file", [n for n in wanted if n not in state]),
        _list("not in the model", [n for n in state if n not in wanted]),
        _list(
            "of another shape",
            [
                f"{n} {tuple(state[n].shape)}, the model has {tuple(wanted[n].shape)}"
                for n in wanted
                if n in state and state[n].shape != wanted[n].shape
            ],
        ),
    ]
    if any(problems):
        found = "; ".join(p for p in problems if p)
        raise InputError(f"--weights {path} does not fit the model: {found}. Use the factory these weights came from.")
    model.load_state_dict(state)


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}" if names else ""


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise InputError(f"--weights {path} is damaged or no safetensors file: {e}") from e
    if path.suffix not in (".pt", ".pth"):
        raise InputError(f"--weights {path}: the ending must be .safetensors, .pt or .pth.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UnsafeFileError(
            f"--weights {path} holds more than tensors, and reading it could run code; it was not read. "
            "Save model.state_dict() instead, best as .safetensors."
        ) from e
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise InputError(f"--weights {path} is damaged or was not written by torch.save: {e}") from e
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise InputError(f"--weights {path} has no tensors by name in it; save model.state_dict().")
    return dict(found)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "224x160" or "224".

    Example:
        >>> parse_size("224x160"), parse_size("64")
        ((224, 160), (64, 64))
    """
    match = re.fullmatch(r"([1-9]\d*)(?:[x,]([1-9]\d*))?", text.strip())
    if match is None:
        raise ConfigError(f"--image-size {text}: write height x width, like 224x224.")
    return int(match[1]), int(match[2] or match[1])


def parse_inputs(shapes: list[str], dtypes: list[str], seed: int) -> tuple[torch.Tensor, ...]:
    """Example inputs of the given shapes: normal numbers, or zeros and ones for integers.

    Example:
        >>> [(t.shape[1], t.dtype) for t in parse_inputs(["1,3", "1,5"], ["float32", "int64"], 0)]
        [(3, torch.float32), (5, torch.int64)]
    """
    if len(dtypes) > len(shapes):
        raise ConfigError(f"{len(dtypes)} --input-dtype for {len(shapes)} --input-shape; give one for each at most.")
    generator = torch.Generator().manual_seed(seed)
    names = dtypes + ["float32"] * (len(shapes) - len(dtypes))
    return tuple(_example(shape, name, generator) for shape, name in zip(shapes, names, strict=True))


def _example(text: str, name: str, generator: torch.Generator) -> torch.Tensor:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text.replace(" ", "")):
        raise ConfigError(f"--input-shape {text}: write whole numbers with commas, batch first, like 1,3,224,224.")
    shape = [int(n) for n in text.split(",")]
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--input-dtype {name}: a torch dtype is needed, like float32 or int64.")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)
