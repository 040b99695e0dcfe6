"""`trace`: a Python function or module with its control flow kept, captured for each kind of call it meets."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree

from ...core import CaptureError, InputError
from .._capture import as_inputs, capture
from ..program import Program
from . import _calls, _source
from ._reach import Holder
from ._record import Recorder, own_error
from ._variant import Variant, described, differentiable, weights_of, within


class Traced:
    """A function or module whose control flow on tensors is kept; made by `trace`.

    Called like the original. Each kind of call is captured once: types, number of dimensions and fixed sizes of the
    tensors, and the Python values that the function reads. With gradients, loops that a tensor ends run the original
    (torch 2.13 differentiates a loop of no turns wrongly), and so does everything while a module is in training mode.

    Attributes:
        target: the original.
        max_variants: how many graphs are kept before a call with yet another Python value or shape is refused.
    """

    #: Traced functions that call this one follow the original.
    is_traced = True

    def __init__(
        self,
        target: Callable[..., Any],
        *,
        dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
        max_variants: int = 8,
    ) -> None:
        self.target = target
        self._dynamic_shapes = dynamic_shapes
        self.max_variants = max_variants
        self._variants: list[Variant] = []
        self._last: Variant | None = None
        self._bound: WeakKeyDictionary[Any, Traced] = WeakKeyDictionary()
        self._function, self._owner = _followed(target)
        _calls.rewritten(self._function)
        # What a function reaches may change; it is looked up again for each capture.
        self._module = target if isinstance(target, torch.nn.Module) else Holder(target)
        self._signature = inspect.signature(target.forward if isinstance(target, torch.nn.Module) else target)
        functools.update_wrapper(self, self._function)

    @property
    def source(self) -> str:
        """The rewritten source of the function, for reading."""
        return _calls.rewritten(self._function).text

    @property
    def program(self) -> Program:
        """The Program of the last capture. Raises InputError before the first one."""
        if self._last is None:
            raise InputError("nothing was captured yet: call the traced function once, or give trace example_inputs.")
        return self._last.program

    @property
    def programs(self) -> list[Program]:
        """Every Program that is kept, the oldest first."""
        return [v.program for v in self._variants]

    @property
    def kept(self) -> dict[str, int]:
        """How many branches (`cond`) and loops (`while_loop`) the last capture kept."""
        return dict(self._last.kept) if self._last is not None else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that fits, capturing it first if there is none."""
        if any(module.training for module in self._module.modules()):
            return self.target(*args, **kwargs)
        args, kwargs = self._normal(args, kwargs)
        variant = self._variant(args, kwargs)
        if not variant.differentiable and torch.is_grad_enabled() and self._wants_gradients(args, kwargs):
            return self.target(*args, **kwargs)
        return variant.run(args, kwargs)

    def _wants_gradients(self, args: Any, kwargs: Any) -> bool:
        given = (v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor))
        return any(t.requires_grad for t in given) or any(p.requires_grad for p in self._module.parameters())

    def _normal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call by position only, or by keyword only, as capturing wants it."""
        bound = self._signature.bind(*args, **kwargs)
        if not kwargs:
            return args, {}
        kinds = {p.kind for p in self._signature.parameters.values()}
        if not args and inspect.Parameter.VAR_KEYWORD not in kinds:
            return (), dict(bound.arguments)
        if inspect.Parameter.KEYWORD_ONLY not in kinds and not bound.kwargs:
            return bound.args, {}
        if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds:
            raise InputError(f"{self._function.__qualname__}: give the inputs by position only, or by keyword only.")
        return (), {**bound.arguments, **bound.arguments.pop("kwargs", {})}

    def _variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        self._variants = [v for v in self._variants if not v.outdated()]
        why = []
        for variant in reversed(self._variants):
            reason = variant.misfit(tree, leaves)
            if reason is None:
                return variant
            why.append(reason)
        if len(self._variants) >= self.max_variants:
            raise CaptureError(
                f"{self._function.__qualname__} was captured {len(self._variants)} times already, and none fits: "
                f"{why[0]}. Make what changes a tensor input, or raise max_variants."
            )
        for leaf in leaves:
            if not isinstance(leaf, _INPUTS):
                raise InputError(
                    f"{self._function.__qualname__} was given a {type(leaf).__name__}. Inputs are tensors, numbers, "
                    "text and nests of them; let the function read other objects from self or an enclosing function."
                )
        made = self._capture(args, kwargs)
        self._variants.append(made)
        self._last = made
        return made

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        recorder = Recorder(self.target, self._function, self._owner, self._signature)
        # The function may change its inputs in place; examples are copies so that this happens once.
        example = _copies(kwargs) or _copies(args)
        name = self._function.__name__
        try:
            with recorder.installed() as module:
                weights = weights_of(module)
                program = capture(module, example, dynamic_shapes=self._dynamic_shapes, name=name)
        except Exception as e:
            if (refused := own_error(e)) is not None:
                raise refused from None
            self._fails_itself(args, kwargs)
            raise
        self._module = module
        leaves, tree = pytree.tree_flatten((args, kwargs))
        return Variant(
            program=program,
            tree=tree,
            leaves=described(leaves, program),
            guards=recorder.guards,
            weights=weights,
            numbers=recorder.numbers_out,
            kept=recorder.kept,
            differentiable=recorder.differentiable and differentiable(program),
            within=within(program),
        )

    def _fails_itself(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError if the original fails on these inputs too."""
        try:
            with torch.no_grad():
                self.target(*_copies(args), **_copies(kwargs))
        except Exception as e:
            raise InputError(
                f"{self._function.__qualname__} itself fails on these inputs: {type(e).__name__}: {e}"
            ) from e

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A method of an instance, traced for each instance on its own."""
        if instance is None:
            return self
        if instance not in self._bound:
            method = types.MethodType(self._function, instance)
            self._bound[instance] = Traced(method, dynamic_shapes=self._dynamic_shapes, max_variants=self.max_variants)
        return self._bound[instance]

    def __repr__(self) -> str:
        return f"Traced({self._function.__qualname__}, {len(self._variants)} captured)"


_INPUTS = (torch.Tensor, bool, int, float, str, type(None))


def _copies(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, values)


def _followed(target: Callable[..., Any]) -> tuple[types.FunctionType, Any]:
    function = target.forward if isinstance(target, torch.nn.Module) else target
    while isinstance(function, functools.partial):
        function = function.func
    found, owner = _calls.followed(function)
    if found is None and isinstance(target, torch.nn.Module):
        found, owner = _source.underlying(function), target
    if found is None:
        raise CaptureError(
            f"{target!r} is not written in Python, so there is no source to rewrite. Give a Python function or an "
            "nn.Module."
        )
    return found, owner


def trace(
    fn: Callable[..., Any] | torch.nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    max_variants: int = 8,
) -> Traced:
    """Compile a Python function or module with its control flow on tensors kept, not burnt in.

    `if`, `while`, `for` over a tensor or a range of one, `and`, `or`, `not`, chained comparisons, conditional
    expressions and early returns become `torch.cond` and `while_loop` where a tensor decides. Where a Python value
    decides, the choice is made at capture and checked at each call; another value captures again.

    Args:
        fn: a function, method or module whose source can be read.
        example_inputs: a tensor, a tuple of positional inputs or a mapping of keyword inputs; without them the first
            call captures.
        dynamic_shapes: as for `capture`: which dimensions vary, by argument name. By default the batch does.
        max_variants: how many graphs are kept before one more is refused.

    Raises:
        CaptureError: no source, or something that cannot be kept; the message has the line and what to do.
        InputError: the example inputs do not fit the function.

    Example:
        >>> def steps(x):
        ...     count = 0
        ...     while x.sum() > 1:
        ...         x = x / 2
        ...         count += 1
        ...     return count
        >>> traced = trace(steps)
        >>> traced(torch.ones(4)), traced(torch.ones(64)), traced.kept
        (2, 6, {'while_loop': 1})
    """
    if not callable(fn):
        raise InputError(f"trace needs a function or an nn.Module, given {type(fn).__name__}.")
    traced = Traced(fn, dynamic_shapes=dynamic_shapes, max_variants=max_variants)
    if example_inputs is not None:
        args, kwargs = as_inputs(example_inputs)
        traced._variant(*traced._normal(args, kwargs))
    return traced
