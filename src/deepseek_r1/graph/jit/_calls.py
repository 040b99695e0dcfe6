"""Following calls from a rewritten function: the user's functions are rewritten too, a library's stay as they are."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _convert, _names, _source
from ._expressions import RUNTIME
from ._iteration import Enumerated, Iteration, Range, Rows, Zipped
from ._tracing import Site, Tracing, current

_MUTATORS = {
    "append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "add", "discard", "setdefault", "sort",
    "reverse", "appendleft", "extendleft", "popleft", "__setitem__", "__delitem__",
}  # fmt: skip
_EFFECTS: tuple[Any, ...] = (print, input, open, exec, eval, builtins.__import__)
_FRAMES: tuple[Any, ...] = (locals, globals, vars)
_MATH: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    math.sqrt: torch.sqrt, math.exp: torch.exp, math.log: torch.log, math.sin: torch.sin, math.cos: torch.cos,
    math.tanh: torch.tanh, math.fabs: torch.abs,
}  # fmt: skip
_DEEPEST = 40


class Rewritten:
    """A function's rewritten code, its text, and the outside names it reads."""

    def __init__(self, function: types.FunctionType) -> None:
        _source.refuse_generators(function)
        node = _source.function_node(function)
        tree = _convert.convert(function, node)
        self.text = ast.unparse(tree)
        self.code = _convert.compiled(function, tree)
        self.outside = sorted(_names.reads(node))


#: By code and file: code objects of two files are equal if they do the same.
_REWRITTEN: dict[tuple[types.CodeType, str], Rewritten] = {}
_MOST = 4096


def rewritten(function: types.FunctionType) -> Rewritten:
    """The rewritten form of a function; made once for each code object.

    Raises:
        CaptureError: no source, or a statement that cannot be kept.
    """
    key = (function.__code__, function.__code__.co_filename)
    if key not in _REWRITTEN:
        if len(_REWRITTEN) >= _MOST:
            _REWRITTEN.clear()
        _REWRITTEN[key] = Rewritten(function)
    return _REWRITTEN[key]


def instance(function: types.FunctionType, runtime: Callable[[types.FunctionType], Any]) -> types.FunctionType:
    """The rewritten function with the original's own globals, defaults and closure cells."""
    form = rewritten(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    cells[RUNTIME] = types.CellType(runtime(function))
    closure = tuple(cells[name] for name in form.code.co_freevars)
    made = types.FunctionType(form.code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def note_outside(tracing: Tracing, function: types.FunctionType) -> None:
    """Guard the global names and closure cells that a function reads."""
    names = rewritten(function).outside
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            tracing.guards.cell(cell, name, cell.cell_contents)
        except ValueError:
            continue
    for name in names:
        if name in function.__globals__ and name not in code.co_varnames and name not in code.co_freevars:
            value = function.__globals__[name]
            if not isinstance(value, types.ModuleType):
                tracing.guards.item(function.__globals__, name, value)


def call(site: Site, runtime: Callable[[types.FunctionType], Any], function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function from rewritten code, the way that fits it."""
    tracing = current()
    again = functools.partial(call, site, runtime)
    function = untraced(function)
    while isinstance(function, functools.partial):
        if "real_callable" in function.keywords:  # torch.export puts these in the place of max and min
            function = function.keywords["real_callable"]
            break
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    own = _own_way(tracing, site, function, args, kwargs, again)
    if own is not None:
        return own[0]
    if isinstance(function, torch.nn.Module):
        tracing.patch(function)
        return function(*args, **kwargs)
    target, owner = followed(function)
    if target is None:
        return tracing.fresh(_object(tracing, function, function(*args, **kwargs)))
    if owner is not None:
        args = (owner, *args)
    return run(tracing, target, args, kwargs, site, runtime)


def untraced(function: Any) -> Any:
    """What a traced function was made from; anything else as it is."""
    while getattr(type(function), "is_traced", False):
        function = function.target
    return function


def followed(function: Any) -> tuple[types.FunctionType | None, Any]:
    """The Python function to rewrite for a callable, and its first argument if it is bound."""
    function = untraced(function)
    if isinstance(function, types.MethodType):
        target, _ = followed(function.__func__)
        return target, function.__self__
    if isinstance(function, types.FunctionType):
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:
            return followed(original)
        if _source.is_users(function):
            return function, None
        # A library's decorator around a user's function, such as torch.no_grad(): both are followed.
        inner = getattr(function, "__wrapped__", None)
        return (function if inner is not None and followed(inner)[0] is not None else None), None
    if isinstance(function, functools._lru_cache_wrapper):
        return followed(function.__wrapped__)
    if isinstance(function, type | types.BuiltinFunctionType | torch.jit.ScriptFunction):
        return None, None
    method = inspect.getattr_static(type(function), "__call__", None)
    if isinstance(method, types.FunctionType) and _source.is_users(method):
        return method, function
    return None, None


def run(
    tracing: Tracing,
    target: types.FunctionType,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    site: Site,
    runtime: Callable[[types.FunctionType], Any],
) -> Any:
    """Run the rewritten form of a user's function."""
    if tracing.stack.count(target.__code__) > _DEEPEST:
        raise site.refuse(
            f"{target.__qualname__} calls itself, and a tensor decides how often. A graph has no recursion: write it "
            "as a `while` loop."
        )
    note_outside(tracing, target)
    tracing.stack.append(target.__code__)
    try:
        return instance(target, runtime)(*args, **kwargs)
    finally:
        tracing.stack.pop()


def _object(tracing: Tracing, function: Any, result: Any) -> Any:
    if isinstance(function, type) and hasattr(result, "__dict__"):
        tracing.region.fresh[id(result)] = result
    return result


def _own_way(
    tracing: Tracing, site: Site, function: Any, args: Any, kwargs: Any, again: Callable[..., Any]
) -> tuple[Any] | None:
    """Calls that mean something else for tensors: (result,), or None for any other call."""
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if isinstance(owner, torch.Tensor) and name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        return (_to_python(tracing, site, owner, name),)
    if isinstance(owner, list | dict | set) and name in _MUTATORS:
        may_change(tracing, site, owner, f".{name}(...)")
    if not callable(function) or getattr(function, "__hash__", None) is None:
        return None
    if function in _EFFECTS:
        raise site.refuse(
            f"{name}() is a side effect: a graph would not repeat it. Take it out, or call it outside the function."
        )
    if function in _FRAMES and not args:
        raise site.refuse(f"{name}() cannot be kept: the rewritten function has other local names. Name the values.")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if function in _BUILTINS:
        return _BUILTINS[function](tracing, site, args, kwargs, again)
    if tensors and function in (bool, int, float):
        return (_to_python(tracing, site, tensors[0], f"__{name}__"),)
    if tensors and function in _MATH and all(t in tracing.numbers for t in tensors):
        return (_MATH[function](*args),)
    return None


def may_change(tracing: Tracing, site: Site, owner: Any, how: str) -> None:
    """Raise CaptureError unless a container or object was made where it is now changed."""
    if id(owner) in tracing.region.fresh:
        return
    kind = type(owner).__name__
    if tracing.nested and id(owner) not in tracing.guards.outside:
        raise site.refuse(
            f"changing a {kind} ({how}) where a tensor decides whether, or how often, it happens: its content would "
            "depend on data. Write into a tensor of fixed size, or return the value."
        )
    raise site.refuse(
        f"changing a {kind} from outside the function ({how}) is a side effect: a graph would not repeat it. Return "
        "the value instead."
    )


def _to_python(tracing: Tracing, site: Site, tensor: torch.Tensor, name: str) -> torch.Tensor:
    if name == "tolist":
        raise site.refuse("tolist() makes Python numbers of data, which a graph cannot know. Keep it a tensor.")
    if any(n != 1 for n in tensor.shape):
        raise site.refuse(f"a tensor of shape {tuple(tensor.shape)} has no single value.")
    numbers, kinds = tracing.numbers, {"__bool__": torch.bool, "__int__": torch.int64, "__float__": torch.float64}
    with numbers.plainly():
        value = tensor.detach().reshape(())
        if name == "item":
            found = torch.float64 if value.is_floating_point() else torch.int64
            dtype = torch.bool if value.dtype == torch.bool else found
        else:
            dtype = kinds[name]
        value = value.trunc() if dtype == torch.int64 and value.is_floating_point() else value
        return numbers.mark(value != 0 if dtype == torch.bool else value.to(dtype, copy=True))


# --- builtins


def _range(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    if not any(isinstance(a, torch.Tensor | torch.SymInt) for a in args):
        return None
    start, stop, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    return (Range(start, stop, step, tracing.numbers),)


def _enumerate(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    start = kwargs.get("start", args[1] if len(args) > 1 else 0)
    inner = as_iteration(args[0], tracing)
    return None if inner is None else (Enumerated(inner, start),)


def _zip(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    parts = [as_iteration(a, tracing) for a in args]
    if not parts or all(p is None for p in parts):
        return None
    if any(p is None for p in parts):
        raise site.refuse("zip() of a tensor and a Python sequence cannot be kept. Make the sequence a tensor.")
    return (Zipped([p for p in parts if p is not None]),)


def as_iteration(value: Any, tracing: Tracing) -> Iteration | None:
    """A tensor or a range over one as something to loop over; None for a Python iterable."""
    if isinstance(value, Iteration):
        return value
    return Rows(value, tracing.numbers) if isinstance(value, torch.Tensor) else None


def _largest(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    return _extreme(tracing, site, args, lambda new, old: new > old)


def _smallest(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    return _extreme(tracing, site, args, lambda new, old: new < old)


def _extreme(tracing: Tracing, site: Site, args: Any, better: Callable[[Any, Any], Any]) -> tuple[Any] | None:
    values = list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)
    if len(values) < 2 or not any(isinstance(v, torch.Tensor) for v in values):
        return None
    best = values[0]
    for value in values[1:]:
        test = better(value, best)
        if not isinstance(test, torch.Tensor):
            best = value if test else best
            continue
        pair = (lambda v=value: (v,), lambda v=best: (v,))
        (best,) = tracing.cond(test.reshape(()), pair, (), ("the result",), site)
    return (best,)


def _isinstance(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    if isinstance(args[0], torch.Tensor) and args[0] in tracing.numbers:
        return (isinstance(tracing.numbers.kind(args[0])(), args[1]),)
    return None


def _map(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    if any(isinstance(a, Iteration | torch.Tensor) for a in args[1:]):
        raise site.refuse("map() over a tensor cannot be kept. Write a `for` loop.")
    return ([again(args[0], items, {}) for items in zip(*args[1:])],)


def _reduce(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    return (functools.reduce(lambda a, b: again(args[0], (a, b), {}), *args[1:]),)


def _getattr(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    value = getattr(*args)
    if id(args[0]) in tracing.guards.outside:
        tracing.guards.attribute(args[0], args[1], getattr(args[0], args[1], None))
    return (value,)


def _setattr(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    may_change(tracing, site, args[0], f".{args[1]} = ...")
    return None


def _cond(tracing: Tracing, site: Site, args: Any, kwargs: Any, again: Any) -> tuple[Any] | None:
    test, then, other, *rest = args
    operands = tuple(rest[0]) if rest else tuple(kwargs.get("operands", ()))
    if not isinstance(test, torch.Tensor):
        return (again(then if test else other, operands, {}),)
    pair = (lambda: (again(then, operands, {}),), lambda: (again(other, operands, {}),))
    return tracing.cond(test.reshape(()), pair, (), ("the result",), site)  # type: ignore[return-value]


_BUILTINS: dict[Any, Callable[..., tuple[Any] | None]] = {
    range: _range, enumerate: _enumerate, zip: _zip, max: _largest, min: _smallest, isinstance: _isinstance, map: _map,
    functools.reduce: _reduce, getattr: _getattr, setattr: _setattr, torch.cond: _cond,
}  # fmt: skip
