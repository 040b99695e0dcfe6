"""Which modules of a model a `LoraConfig` means. Reads names and types; changes nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..core import InputError
from ..nn import CastLinear, NF4Linear, QuantizedLinear
from ._config import ALL_LINEAR, LoraConfig
from ._layer import LoraLayer
from ._saved import SavedModule

#: Names that query and value projections have in common architectures; the first pair of which a model has all is taken
#: where the config names no targets, as in the LoRA paper's experiments.
_ATTENTION = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_proj", "value_proj"), ("query_key_value",),
    ("qkv_proj",), ("c_attn",), ("Wqkv",), ("in_proj",), ("qkv",), ("to_q", "to_v"), ("q", "v"),
)  # fmt: skip
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
LINEAR = (nn.Linear, CastLinear, NF4Linear, QuantizedLinear)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's `Conv1D`, a linear layer with its weight stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of whatever storage."""
    return isinstance(module, LINEAR) or is_conv1d(module)


def can_adapt(module: nn.Module) -> bool:
    """Whether there is an adapter for a module of this type."""
    return is_linear(module) or isinstance(module, (nn.Embedding, *CONVOLUTION))


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, where the model tells it; as it was before adapters."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    if isinstance(found, SavedModule):
        return found.original_module
    if isinstance(found, LoraLayer):
        return found.base_layer
    return found if isinstance(found, nn.Module) else None


def _named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def matches(path: str, wanted: Sequence[str] | str | None) -> bool:
    """Whether a path is meant by names (it ends in one) or by a regular expression (of the whole path).

    Example:
        >>> matches("h.0.q_proj", ["q_proj"]), matches("h.0.q_proj", r".*\\.q_proj"), matches("h.0.q_proj", ["proj"])
        (True, True, False)
    """
    if wanted is None:
        return False
    return bool(re.fullmatch(wanted, path)) if isinstance(wanted, str) else _named(path, wanted)


def saved_modules(modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained in full, those of the task included; outermost ones only.

    Raises:
        InputError: a name of `modules_to_save` that no module has.
    """
    heads = _HEADS.get(config.task_type or "", ())
    for name in config.modules_to_save or ():
        # A task's heads have several usual names, of which a model has one; PEFT writes them all.
        if name not in heads and not any(_named(path, (name,)) for path in modules):
            raise InputError(f"LoraConfig(modules_to_save): no module is called {name!r}.{_near(name, list(modules))}")
    wanted = (*(config.modules_to_save or ()), *heads)
    found = [path for path in modules if _named(path, wanted)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def find_targets(modules: Mapping[str, nn.Module], config: LoraConfig, last: nn.Module | None = None) -> list[str]:
    """Paths of the layers that get adapters, in the model's order.

    Args:
        modules: the model's modules by path.
        last: the layer that "all-linear" leaves out.

    Raises:
        InputError: nothing matches, or a match is a module that no adapter fits.
    """
    closed, saved = inside_attention(modules), saved_modules(modules, config)
    kept = {p: m for p, m in modules.items() if not _below(p, saved) and not matches(p, config.exclude_modules)}
    wanted = config.target_modules if config.target_modules is not None else _attention(kept)
    if wanted == ALL_LINEAR:
        found = [p for p, m in kept.items() if is_linear(m) and m is not last and p not in closed]
    else:
        found = [p for p in kept if matches(p, wanted) and _in_layers(p, config)]
    if not found:
        raise InputError(_nothing(wanted, modules))
    for path in found:
        if path in closed:
            raise InputError(
                f"{path} is part of a torch.nn.MultiheadAttention, which reads its weight without calling it, so an "
                "adapter there would do nothing; leave it out of target_modules, or use exclude_modules."
            )
        if not can_adapt(modules[path]):
            inside = [p for p, m in modules.items() if p.startswith(f"{path}.") and can_adapt(m)]
            hint = f" Layers in it: {', '.join(inside[:8])}." if inside else ""
            raise InputError(
                f"{path} is a {type(modules[path]).__name__}; adapters fit Linear, Embedding, Conv1d, Conv2d, Conv3d, "
                f"CastLinear, NF4Linear, QuantizedLinear and transformers' Conv1D.{hint}"
            )
    return found


def unmatched(modules: Mapping[str, nn.Module], config: LoraConfig) -> str:
    """A sentence about the first of several names of targets that no module has; empty if all are found.

    Example:
        >>> unmatched({"h.q_proj": nn.Identity()}, LoraConfig(target_modules=["q_proj", "k_proj"]))
        "LoraConfig(target_modules): 'k_proj' matches no layer. Did you mean 'q_proj'?"
    """
    names = config.target_modules
    for name in names if not isinstance(names, str) and names else ():
        if not any(_named(path, (name,)) for path in modules):
            return f"LoraConfig(target_modules): {name!r} matches no layer.{_near(name, list(modules))}"
    return ""


def inside_attention(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of layers inside torch.nn.MultiheadAttention."""
    outer = tuple(f"{path}." for path, module in modules.items() if isinstance(module, nn.MultiheadAttention))
    return {path for path in modules if outer and path.startswith(outer)}


def _below(path: str, tops: Sequence[str]) -> bool:
    return any(path == top or path.startswith(f"{top}.") for top in tops)


def _in_layers(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    names = config.layers_pattern
    names = [names] if isinstance(names, str) else names
    each = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] if names else [r".*?\.?[^.]+\.(\d+)\."]
    hits = (re.match(pattern, path) for pattern in each)
    hit = next((h for h in hits if h), None)
    chosen = config.layers_to_transform
    return hit is not None and int(hit[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _attention(modules: Mapping[str, nn.Module]) -> Sequence[str]:
    last = {path.rpartition(".")[2] for path, module in modules.items() if is_linear(module)}
    for names in _ATTENTION:
        if last.issuperset(names):
            return names
    raise InputError(
        "LoraConfig(target_modules=None): the model has no attention layers with names that are known. Name the layers"
        f", or use 'all-linear'. {_listing(modules)}"
    )


def _nothing(wanted: Any, modules: Mapping[str, nn.Module]) -> str:
    why = ""
    if any(matches(p, wanted) for p in modules) or wanted == ALL_LINEAR:
        why = " (exclude_modules, layers_to_transform or modules_to_save leave nothing)"
    given = list(wanted) if isinstance(wanted, tuple) else wanted
    near = "" if isinstance(wanted, str) else _near(wanted[0], list(modules))
    return f"LoraConfig(target_modules={given!r}) matches no layer{why}.{near} {_listing(modules)}"


def _listing(modules: Mapping[str, nn.Module]) -> str:
    """The last names of the layers that could be targets, with their number."""
    counts: dict[str, int] = {}
    for path, module in modules.items():
        if can_adapt(module):
            name = re.sub(r"^\d+$", path, path.rpartition(".")[2])
            counts[name] = counts.get(name, 0) + 1
    listed = [f"{name} ({n})" if n > 1 else name for name, n in counts.items()]
    more = f", and {len(listed) - 30} more" if len(listed) > 30 else ""
    return f"Layers that adapters fit: {', '.join(listed[:30]) or 'none'}{more}."


def _near(name: str, paths: Sequence[str]) -> str:
    ends = {path.rpartition(".")[2] for path in paths}
    near = difflib.get_close_matches(name, sorted(ends), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
