"""Nests of values that other libraries' models take and give, where torch does not know them by itself.

Imports no such library: what is not loaded cannot be among the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree


def register() -> None:
    """Let torch see the tensors in the caches of transformers, if that library is loaded."""
    caches = sys.modules.get("transformers.cache_utils")
    if caches is None:
        return
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:  # other releases register their caches themselves
        return
    register_dynamic_cache_export_support()
    pair = caches.EncoderDecoderCache
    if pair not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            pair,
            lambda cache: ([cache.self_attention_cache, cache.cross_attention_cache], _PAIR),
            lambda children, _: pair(*children),
            serialized_type_name=f"{pair.__module__}.{pair.__name__}",
            flatten_with_keys_fn=lambda cache: (
                [(pytree.GetAttrKey(name), getattr(cache, name)) for name in _PAIR],
                _PAIR,
            ),
        )


_PAIR = ["self_attention_cache", "cross_attention_cache"]


def described(value: Any, describe: Callable[[Any], Any]) -> Any:
    """`describe` of every leaf, nested as torch.export wants its `dynamic_shapes`: objects become lists."""
    kind = pytree._get_node_type(value)
    node = pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return describe(value)
    children, context = node.flatten_fn(value)
    made = [described(child, describe) for child in children]
    return node.unflatten_fn(made, context) if kind in pytree.BUILTIN_TYPES else made


def plain_(graph: Any) -> None:
    """Changes a graph's JSON: nests in it become plain as by `plain_nest`."""
    stack = [graph]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if key in ("in_spec", "out_spec") and isinstance(value, str):
                    item[key] = plain_nest(value)
                else:
                    stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)


def plain_nest(text: str) -> str:
    """The description of a nest with classes of transformers turned into plain mappings, where they must be.

    A model's answer of a class of its library is a mapping with attributes; where the library is not loaded, the
    mapping is what remains. Caches always become mappings: how to build one is not read out of a file.
    """
    try:
        version, root = json.loads(text)
        nodes = [root]
        while nodes:
            node = nodes.pop()
            _plain_(node)
            nodes.extend(node["children_spec"])
        return json.dumps([version, root])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return text  # damaged; whoever reads it next says so


def _plain_(node: dict[str, Any]) -> None:
    """Changes `node`."""
    kind, context = node["type"], node["context"]
    if not isinstance(kind, str) or not kind.startswith("transformers."):
        return
    known = kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    context = json.loads(context) if isinstance(context, str) else context
    if known and isinstance(context, list) and all(isinstance(n, str) for n in context) and context != _PAIR:
        return
    # A cache has its names first and its layout second.
    names = context[0] if isinstance(context, list) and context and isinstance(context[0], list) else context
    if isinstance(names, list) and len(names) == len(node["children_spec"]) and all(isinstance(n, str) for n in names):
        node.update(type="builtins.dict", context=json.dumps(names))
