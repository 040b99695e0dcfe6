"""Sizes of outputs: the postfix text of a C++ shape function, worked out on sizes that may be symbols."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core import InputError

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
    "%": operator.mod,
    "max": torch.sym_max,
    "min": torch.sym_min,
}


def output_shapes(text: str, shapes: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The outputs' sizes from what a shape function wrote, for inputs of these sizes.

    An output ends in a point, outputs are parted by semicolons, sizes by commas; `i0.1` is dimension 1 of input 0.

    Raises:
        InputError: the text is damaged, or divides by zero.

    Example:
        >>> output_shapes("i0.0,i0.1 2 /.;i0.0 1 +.", [(5, 8)])
        [[5, 4], [6]]
    """
    try:
        return [[_size(d, shapes) for d in part[:-1].split(",") if d] for part in text.split(";")]
    except (IndexError, ValueError, ZeroDivisionError) as e:
        raise InputError(f"the shape function gives {text!r}, which does not work for {list(shapes)}: {e}") from e


def _size(words: str, shapes: Sequence[Sequence[Any]]) -> Any:
    stack: list[Any] = []
    for word in words.split():
        if word in _BINARY:
            b, a = stack.pop(), stack.pop()
            stack.append(_BINARY[word](a, b))
        elif match := re.fullmatch(r"i(\d+)\.(\d+)", word):
            stack.append(shapes[int(match[1])][int(match[2])])
        else:
            stack.append(int(word))
    (size,) = stack
    return size
