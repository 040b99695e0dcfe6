"""Operators as plain functions on tensors: the door for operators written in C++, packed integers, 4-bit floats (NF4),
kernels for products of integers, linear layers around a frozen weight, and losses. Knows no layers.

After `register_custom_op("swish", path)` this package has the operator as `swish` and as the module `Swish`.
"""

from __future__ import annotations

from typing import Any

from ._bound import BoundOp
from ._build import BuildError, MissingCompilerError, build_op, include_dir
from ._frozen_linear import Dense, LowRank, cast_weight, compute_dtype, frozen_linear
from ._integer_linear import FUNCTIONS, ISAS, MOST_INPUTS, integer_linear, pack_int4, pack_int8
from ._library import Attribute, Description, describe
from ._linear_cross_entropy import known_labels, linear_cross_entropy
from ._native import native_library, native_missing, native_problem
from ._nf4 import NF4, NF4_BLOCK, NF4_GROUP, NF4_LEVELS, dequantize_nf4, nf4_shapes, nf4_table, quantize_nf4
from ._packing import pack_uint4, unpack_uint4
from ._register import NAMESPACE, CustomOp, libraries, register_custom_op, registered, registered_names
from ._rows import gather_int8, gather_uint4

__all__ = [
    "FUNCTIONS",
    "ISAS",
    "MOST_INPUTS",
    "NAMESPACE",
    "NF4",
    "NF4_BLOCK",
    "NF4_GROUP",
    "NF4_LEVELS",
    "Attribute",
    "BoundOp",
    "BuildError",
    "CustomOp",
    "Dense",
    "Description",
    "LowRank",
    "MissingCompilerError",
    "build_op",
    "cast_weight",
    "compute_dtype",
    "dequantize_nf4",
    "describe",
    "frozen_linear",
    "gather_int8",
    "gather_uint4",
    "include_dir",
    "integer_linear",
    "known_labels",
    "libraries",
    "linear_cross_entropy",
    "native_library",
    "native_missing",
    "native_problem",
    "nf4_shapes",
    "nf4_table",
    "pack_int4",
    "pack_int8",
    "pack_uint4",
    "quantize_nf4",
    "register_custom_op",
    "unpack_uint4",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("__") and (found := registered(name)) is not None:
        return found
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; an operator is there after register_custom_op(name, library)"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *registered_names()})
