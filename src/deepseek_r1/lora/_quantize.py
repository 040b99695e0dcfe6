"""The frozen weights under adapters in fewer bits: bfloat16, NF4 or 4-bit integers, and files of such models.

Knows which layers of a model may be stored so; how a weight is rounded is the business of `ops` and `nn`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core import UINT4, ArtifactError, ConfigError, InputError, Int4Weight, LayerFormat, atomic
from ..core.formats import GROUP_SIZES
from ..nn import CastLinear, NF4Linear, QuantizedLinear
from ..ops import nf4_table
from ._file import metadata
from ._put import outline, replace_module
from ._targets import CONVOLUTION, inside_attention, is_conv1d, matches, output_layer

BASE_DTYPES = ("bf16", "fp16", "nf4", "int4")
_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_KEY = "deepseek_r1.base"


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is stored in fewer bits than a float has."""
    return isinstance(module, NF4Linear | QuantizedLinear)


def weight_count(model: nn.Module) -> int:
    """Parameters of a model; a quantised weight counts as what it stands for."""
    stored = (m for m in model.modules() if is_quantised(m))
    return sum(p.numel() for p in model.parameters()) + sum(int(m.in_features * m.out_features) for m in stored)  # type: ignore


def quantize_base(
    model: nn.Module, dtype: str = "nf4", *, target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
) -> nn.Module:  # fmt: skip
    """Changes the model: its linear layers are frozen and stored in fewer bits. Gives the model back.

    Args:
        dtype: "nf4" (4.13 bits a weight; QLoRA, 2023), "int4" (4-bit integers in groups of 64 inputs, 4.63 bits a
            weight, rounded to the nearest), "bf16" or "fp16".
        target_modules: names or a regular expression of paths; None: every linear layer but the output layer of a
            language model and layers that share their weight with an embedding.
        exclude_modules: layers that are left alone.

    Raises:
        ConfigError: another dtype.
        InputError: nothing matches, a match is no linear layer, or a weight has values that are not finite.

    Example:
        >>> model = quantize_base(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), "nf4")
        >>> [type(layer).__name__ for layer in model]
        ['NF4Linear', 'ReLU', 'NF4Linear']
    """
    if dtype not in BASE_DTYPES:
        raise ConfigError(f"quantize_base(dtype={dtype!r}): one of {', '.join(map(repr, BASE_DTYPES))} is needed.")
    modules = outline(model)
    for path in _chosen(model, modules, target_modules, exclude_modules):
        layer = modules[path]
        linear = _as_linear(layer) if is_conv1d(layer) else layer
        try:
            replace_module(model, layer, _stored(linear, dtype))
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
    return model


def _chosen(
    model: nn.Module, modules: dict[str, nn.Module], wanted: Sequence[str] | str | None,
    excluded: Sequence[str] | str | None,
) -> list[str]:  # fmt: skip
    plain = [p for p, m in modules.items() if _is_plain(m) and not matches(p, excluded)]
    if wanted is None:
        last = output_layer(model)
        tied = {id(m.weight) for m in modules.values() if isinstance(m, (nn.Embedding, *CONVOLUTION))}  # type: ignore
        left = tied | ({id(last.weight)} if last is not None else set())
        closed = inside_attention(modules)
        found = [p for p in plain if id(modules[p].weight) not in left and p not in closed]
    else:
        found = [p for p in plain if matches(p, wanted)]
    if not found and not any(isinstance(m, CastLinear | NF4Linear | QuantizedLinear) for m in modules.values()):
        what = "" if wanted is None else f" that {wanted!r} means"
        raise InputError(f"quantize_base: the model has no linear layer{what}; the layers are {plain[:20]}.")
    return found


def _is_plain(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or is_conv1d(module)


def _as_linear(layer: Any) -> nn.Linear:
    inputs, out = layer.weight.shape
    linear = nn.Linear(inputs, out, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    linear.bias = layer.bias
    return linear.train(layer.training)


def _stored(linear: Any, dtype: str) -> nn.Module:
    if dtype in _FLOATS:
        return CastLinear.from_linear(linear, _FLOATS[dtype])
    return NF4Linear.from_linear(linear) if dtype == "nf4" else _int4(linear)


def _int4(linear: nn.Linear) -> QuantizedLinear:
    """Each group between its smallest and largest value, zero among the values that can be stored."""
    out, inputs = linear.weight.shape
    size = next((s for s in (64, *GROUP_SIZES) if inputs % s == 0), None)
    if size is None:
        raise InputError(
            f"{inputs} inputs do not divide into groups of {', '.join(map(str, GROUP_SIZES))}, which 'int4' needs; use "
            "'nf4', or exclude_modules."
        )
    groups = linear.weight.detach().float().reshape(out, -1, size)
    if not bool(torch.isfinite(groups).all()):
        raise InputError("the weight has values that are not finite.")
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / UINT4[1]).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = (-low / scales).round().clamp(*UINT4)
    values = (groups / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(*UINT4)
    layer = QuantizedLinear(inputs, out, linear.bias is not None, format=Int4Weight(group_size=size))
    layer = layer.to(linear.weight.device).train(linear.training)
    layer.store_(values.to(torch.uint8).reshape(out, inputs), scales, zeros.to(torch.int8))
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer


def float_linear(layer: Any, weight: Tensor) -> nn.Linear:
    """A plain layer in the place of a quantised one."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = layer.bias
    return linear.train(layer.training)


# Files.


def save_base(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model whose layers `quantize_base` stored in fewer bits, without adapters; whole or not at all.

    A tensor under several names is stored once for each.

    Raises:
        InputError: another ending than .safetensors, or a model that has adapters.

    Example:
        >>> import tempfile
        >>> model = quantize_base(nn.Sequential(nn.Linear(64, 64)), "nf4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_base(nn.Sequential(nn.Linear(64, 64)), save_base(model, f"{folder}/base.safetensors"))
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"save_base({str(target)!r}): the name must end in .safetensors.")
    inner = outline(model)
    if any(model.get_submodule(p) is not m for p, m in inner.items()):
        raise InputError("save_base: the model has adapters; save the base before they are put in, or after unload().")
    formats = {p: f for p, m in inner.items() if (f := _format(m)) is not None}
    state = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    with atomic.atomic_path(target) as tmp:
        save_file(state, tmp, metadata={_KEY: json.dumps(formats)})
    return target


def load_base(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Changes a fresh float model of the same architecture: it gets the layers and weights of a file by `save_base`.

    The model's own weights are not looked at, so its parameters may be on the meta device.

    Raises:
        ArtifactError: the file is damaged or was not written by `save_base`.
        InputError: it is of another model; the first layer or tensor that does not fit is named.
    """
    try:
        with safe_open(path, framework="pt") as found:
            text = (found.metadata() or {}).get(_KEY)
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {e}") from e
    formats = metadata(text, str(path))
    expected = {p: _like(model, p, f, str(path)) for p, f in formats.items()}
    for name, place in model.state_dict().items():
        inside = name.rpartition(".")[0] in expected
        if not inside and (name not in tensors or tensors[name].shape != place.shape):
            found_shape = list(tensors[name].shape) if name in tensors else "missing"
            raise InputError(f"{path} is of another model: {name} is {found_shape}, {list(place.shape)} is needed.")
    for layer_path, layer in expected.items():
        old = model.get_submodule(layer_path)
        replace_module(model, old, layer.to_empty(device=old.weight.device))  # type: ignore[arg-type]
    bare = any(p.is_meta for p in model.parameters())
    try:
        # Copied, not assigned: parameters that are one stay one.
        model.load_state_dict(tensors, assign=bare)
    except RuntimeError as e:
        raise InputError(f"{path} is of another model: {e}") from e
    if bare and callable(tie := getattr(model, "tie_weights", None)):
        tie()
    for layer in expected.values():
        if isinstance(layer, NF4Linear):
            layer.table = nf4_table(layer.packed.device)
    return model


def _format(module: nn.Module) -> dict[str, Any] | None:
    if isinstance(module, NF4Linear):
        return {"kind": "nf4"}
    if isinstance(module, CastLinear):
        return {"kind": "cast", "dtype": str(module.weight.dtype).removeprefix("torch.")}
    return {"kind": "integers", **module.format.to_dict()} if isinstance(module, QuantizedLinear) else None


def _like(model: nn.Module, path: str, described: dict[str, Any], where: str) -> nn.Module:
    """A layer without values of the described format, of the sizes of the one that stands there."""
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError as e:
        raise InputError(f"{where} is of another model: there is no layer {path}.") from e
    if not _is_plain(layer):
        raise InputError(f"{where} is of another model: {path} is a {type(layer).__name__} and no linear layer.")
    out, inputs = layer.weight.shape[::-1] if is_conv1d(layer) else layer.weight.shape
    rest = dict(described)
    kind = rest.pop("kind", None)
    with torch.device("meta"):
        if kind == "nf4":
            made: nn.Module = NF4Linear(inputs, out, layer.bias is not None)
        elif kind == "cast":
            dtype = getattr(torch, str(rest["dtype"]), None)
            made = CastLinear(inputs, out, layer.bias is not None, dtype=dtype)  # type: ignore[arg-type]
        elif kind == "integers":
            made = QuantizedLinear(inputs, out, layer.bias is not None, format=LayerFormat.from_dict(rest))
        else:
            raise ArtifactError(f"{where}: the layer {path} has the unknown format {described}.")
    return made.train(layer.training)
