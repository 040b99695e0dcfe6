"""An adapter on disk: adapter_config.json and adapter_model.safetensors, under PEFT's names. Knows no verbs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..core import ArtifactError, InputError, atomic
from ._config import LoraConfig, parse_config
from ._layer import LoraLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT's wrappers put before a module's path.
PREFIX = "base_model.model."


def layer_tensors(layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors at one layer, under the names that follow the layer's path in the file."""
    a, b = layer.matrices(adapter)
    if adapter in layer.lora_embedding_A:
        found = {"lora_embedding_A": a.data, "lora_embedding_B": b.data}
    else:
        found = {"lora_A.weight": a.data, "lora_B.weight": b.data}
    if (magnitude := layer.magnitude(adapter)) is not None:
        found["lora_magnitude_vector"] = magnitude.data
    return found


def write(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write an adapter, each file whole or not at all; other files in the folder stay.

    Raises:
        InputError: a tensor has values that are not finite, or the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save_pretrained: {folder} is a file; give a directory.")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"save_pretrained: {name} has values that are not finite; the adapter was not written.")
    # Clones: two names may share one tensor, which the format refuses.
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    origin = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    about = {
        "auto_mapping": None, "base_model_name_or_path": origin, "inference_mode": True, "peft_type": "LORA",
        "revision": None, **config.to_dict(),
    }  # fmt: skip
    atomic.write_bytes(folder / WEIGHTS, save(plain, metadata={"format": "pt"}))
    atomic.write_json(folder / CONFIG, dict(sorted(about.items())))


def read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter.

    Raises:
        ArtifactError: a file is missing, damaged, carries code, or is of another kind of adapter.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS and (folder / "adapter_model.bin").is_file()
            hint = " (adapter_model.bin is a pickle, which is not opened; convert it with PEFT)" if pickled else ""
            raise ArtifactError(f"{folder} has no {name}{hint}; give a directory that save_pretrained or PEFT wrote.")
    config = parse_config((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"{folder / WEIGHTS} is damaged or no safetensors file: {e}") from e
    return config, tensors


def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Copy an adapter's tensors to their places; nothing is copied unless all fit.

    Tensors of the base model that PEFT put into the file too (resized embeddings) go there.

    Raises:
        InputError: the first tensor that is missing, left over, of another shape, or not finite, by name.
    """
    if missing := next((name for name in places if name not in tensors), None):
        raise InputError(f"{where} is of another architecture or config: it has no {missing}.")
    base = model.state_dict(keep_vars=True)
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, tensor in tensors.items():
        # With bias="all" PEFT writes the biases of its wrappers of whole modules a second and third time.
        if name not in places and (".original_module." in name or ".modules_to_save." in name):
            continue
        place = places.get(name, base.get(name.removeprefix(PREFIX)))
        if place is None:
            raise InputError(f"{where} is of another architecture: the model has no place for {name}.")
        if place.shape != tensor.shape:
            raise InputError(
                f"{where} is of another architecture or config: {name} is {list(tensor.shape)} in the file, and "
                f"{list(place.shape)} is needed."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: {name} has values that are not finite.")
        pairs.append((place, tensor))
    with torch.no_grad():
        for place, tensor in pairs:
            place.copy_(tensor)


def metadata(text: str | None, where: str) -> Any:
    """JSON of a file's metadata.

    Raises:
        ArtifactError: it has none, or no JSON.
    """
    try:
        return json.loads(text or "")
    except ValueError as e:
        raise ArtifactError(f"{where} does not say how its layers are stored; it was not written by save_base.") from e
