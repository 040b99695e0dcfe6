"""Which modules of a model are its blocks: the children of lists and sequences, else the model's own children.

Knows the structure of modules; which of them are called, and in which order, is seen in a run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: A sequence of so many plain layers is a chain of its own; a shorter one is part of a block.
_LONG = 4


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks of a model by name, none inside another, in the order of their registration.

    Of a model with lists or sequences of blocks (several, and nested, too) these blocks, and what stands beside them;
    of others the direct children.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> list(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([Block(), Block()]))))
        ['0', '1.0', '1.1']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    children = [(name, child) for name, child in model.named_children() if child is not None]
    for name, child in children:
        _collect(name, child, found, seen)
    return found if children else {"": model}


def _collect(name: str, module: nn.Module, found: dict[str, nn.Module], seen: set[int]) -> None:
    if id(module) in seen:
        return
    if not _has_chain(module) and (not isinstance(module, nn.ModuleList | nn.ModuleDict) or not len(module)):
        seen.add(id(module))
        found[name] = module
        return
    children = list(module.named_children())
    repeated = _repeated([child for _, child in children]) if isinstance(module, _CONTAINERS) else set()
    for own, child in children:
        if id(child) in repeated:
            if id(child) not in seen:
                seen.add(id(child))
                found[f"{name}.{own}"] = child
        else:
            _collect(f"{name}.{own}", child, found, seen)


def _has_chain(module: nn.Module) -> bool:
    """Whether a list or sequence worth cutting is somewhere in a module."""
    for inner in module.modules():
        if isinstance(inner, _CONTAINERS):
            children = list(inner.children())
            composite = [child for child in children if next(child.children(), None) is not None]
            if len(children) >= _LONG or len(composite) >= 2 or (composite and isinstance(inner, nn.ModuleList)):
                return True
    return False


def _repeated(children: list[nn.Module]) -> set[int]:
    """Blocks, whatever is inside them: children that occur more than once, and others of their class."""
    shapes = {
        id(child): structure(child)
        for child in children
        if next(child.children(), None) is not None and not isinstance(child, _CONTAINERS)
    }
    count = Counter(shapes.values())
    classes = {shape[0] for shape in shapes.values() if count[shape] > 1}
    return {key for key, shape in shapes.items() if shape[0] in classes}


def structure(module: nn.Module) -> tuple[Any, ...]:
    """What two equal blocks have in common: class, settings, shapes and modes, not values.

    Example:
        >>> one, other = nn.Linear(2, 3), nn.Linear(3, 2)
        >>> structure(one) == structure(nn.Linear(2, 3)), structure(one) == structure(other)
        (True, False)
    """
    tensors = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())
    modes = tuple(inner.training for inner in module.modules())
    return type(module), repr(module), tensors, modes
