"""`StaticGraphs`: the graphs of one module, captured as they are needed and run in its place. Knows no engine.

A graph shares the module's parameters and buffers, so that it trains and is trained. It is taken again for inputs of
the same nest, ranks, dtypes and devices, in the same mode, whatever their sizes, if the module is as it was.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import CaptureError, InputError
from ._capture import capture_as_is
from ._dimensions import batch_of
from ._tracing import followed, line_by_line
from ._watch import Watch, hooked
from .program import Program

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

#: Graphs kept for one module; the one that was used longest ago goes first.
MOST_GRAPHS = 16
_OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STORE = "_static_graphs"
#: Where a static forward keeps the function that it stands for.
PLAIN = "__line_by_line__"
_LOCK = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class StaticOptions:
    """How the instances of a class become static.

    Attributes:
        dynamic_shapes: see `capture`; None makes every size vary that the model does not fix.
        fallback: run line by line what cannot be captured, instead of raising.
    """

    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None
    fallback: bool = False


class StaticGraphs:
    """The graphs of one module. A copy or a pickle of it is empty: graphs are captured again.

    Args:
        owner: the module.
    """

    def __init__(self, owner: torch.nn.Module | None = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._graphs: list[_Graph] = []
        self._refused: set[Any] = set()

    def belongs_to(self, module: torch.nn.Module) -> bool:
        """Whether these are the graphs of this very module, not of one it was copied from."""
        return self._owner is not None and self._owner() is module

    def __reduce__(self) -> Any:
        return StaticGraphs, ()

    def __deepcopy__(self, memo: Any) -> StaticGraphs:
        return StaticGraphs()

    @property
    def programs(self) -> list[Program]:
        """What was captured and is still held, the last used first."""
        return [graph.program for graph in self._graphs]

    def run(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs, options: StaticOptions) -> Any:
        """The module's answer, by a graph; captures one if none fits.

        Raises:
            CaptureError: the module cannot be a static graph, and `options.fallback` is not set.
        """
        owner = self._owner() if self._owner is not None else None
        assert owner is not None, "a module that runs is alive"
        # The order of keyword inputs says nothing; sorted, it makes no new graph.
        kwargs = dict(sorted(kwargs.items()))
        leaves, tree = pytree.tree_flatten((args, kwargs))
        key = _key(tree, leaves)
        if key in self._refused:
            return _stepwise(forward, owner, args, kwargs)
        graph = self._find(key, leaves)
        if graph is None and (batch_of(args, kwargs) == 0 or _borrows(owner)):
            return _stepwise(forward, owner, args, kwargs)
        if graph is None:
            try:
                graph = self._capture(owner, key, args, kwargs, options)
            except CaptureError:
                if not options.fallback:
                    raise
                self._refused.add(key)
                return _stepwise(forward, owner, args, kwargs)
        return graph.program.module()(*args, **kwargs)

    def _find(self, key: Any, leaves: list[Any]) -> _Graph | None:
        for number, graph in enumerate(self._graphs):
            if graph.key == key and not graph.program.outside(leaves) and graph.watch.unchanged() and _follow(graph):
                if number:
                    self._graphs.insert(0, self._graphs.pop(number))
                return graph
        return None

    def _capture(self, owner: torch.nn.Module, key: Any, args: Args, kwargs: Kwargs, options: StaticOptions) -> _Graph:
        with _LOCK, _without_own_hooks(owner):
            try:
                program = capture_as_is(
                    owner, args, kwargs, dynamic_shapes=options.dynamic_shapes, grad=torch.is_grad_enabled(),
                    stateless=True,
                )  # fmt: skip
            except InputError as e:
                # What the module itself raises is the caller's to see, as from any module.
                if e.__cause__ is not None:
                    raise e.__cause__ from None
                raise
        graph = _Graph(key=key, program=program, watch=Watch(owner), links=_links(owner, program))
        self._graphs = [graph, *(g for g in self._graphs if g.watch.same_parts())][:MOST_GRAPHS]
        return graph


@dataclass(frozen=True, kw_only=True)
class _Link:
    """One parameter or buffer, in the module's store and in the graph's."""

    store: dict[str, Any]
    own: dict[str, Any]
    key: str
    kind: Any

    def follow(self) -> bool:
        """Let the graph use the tensor that the module has now; False if it is of another kind than at capture."""
        tensor = self.store.get(self.key)
        if not isinstance(tensor, torch.Tensor) or _kind(tensor) != self.kind:
            return False
        if self.own[self.key] is not tensor:
            self.own[self.key] = tensor
        return True


@dataclass(frozen=True, kw_only=True)
class _Graph:
    key: Any
    program: Program
    watch: Watch
    links: list[_Link]


def _follow(graph: _Graph) -> bool:
    return all(link.follow() for link in graph.links)


def _borrows(module: torch.nn.Module) -> bool:
    """Whether somebody lends the module other tensors for one call (torch.func.functional_call)."""
    return any(not isinstance(p, torch.nn.Parameter) for p in module.parameters())


def _kind(tensor: torch.Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.shape


def _key(tree: Any, leaves: list[Any]) -> Any:
    """What asks for a graph of its own: the nest, each input's kind, and the modes of torch that graphs depend on."""
    kinds = tuple(
        (v.ndim, v.dtype, v.device) if isinstance(v, torch.Tensor) else (type(v), _hashable(v)) for v in leaves
    )
    modes = (torch.is_grad_enabled(), *_autocast())
    return tree, kinds, modes


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _autocast() -> Iterator[Any]:
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        yield torch.get_autocast_dtype(device) if on else None


def _stepwise(forward: Callable[..., Any], owner: torch.nn.Module, args: Args, kwargs: Kwargs) -> Any:
    with line_by_line():
        return forward(owner, *args, **kwargs)


@contextlib.contextmanager
def _without_own_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the module has no hooks of its own: they run around the graph, not in it."""
    held = {name: module.__dict__[name] for name in _OWN_HOOKS}
    module.__dict__.update({name: type(hooks)() for name, hooks in held.items()})
    try:
        yield
    finally:
        module.__dict__.update(held)


def _links(model: torch.nn.Module, program: Program) -> list[_Link]:
    parts = dict(model.named_modules())
    found = []
    for prefix, part in program.module().named_modules():
        for kind in ("_parameters", "_buffers") if prefix in parts else ():
            store, own = parts[prefix].__dict__[kind], part.__dict__[kind]
            found += [_Link(store=store, own=own, key=key, kind=_kind(own[key])) for key in own if key in store]
    return found


def run_static(
    module: torch.nn.Module, forward: Callable[..., Any], args: Args, kwargs: Kwargs, options: StaticOptions
) -> Any:
    """Run `forward` of a module as a static graph, or line by line where somebody follows or listens to its parts."""
    # super().forward() of a subclass is not the module's whole forward, which a graph would be.
    if followed() or getattr(type(module).forward, PLAIN, None) is not forward:
        return forward(module, *args, **kwargs)
    if hooked(module):
        return _stepwise(forward, module, args, kwargs)
    graphs = module.__dict__.get(_STORE)
    if graphs is None or not graphs.belongs_to(module):
        graphs = module.__dict__[_STORE] = StaticGraphs(module)
    return graphs.run(forward, args, kwargs, options)


def static_programs(module: torch.nn.Module) -> list[Program]:
    """The programs that an instance of a `@model` class was captured as so far, the last used first.

    Example:
        >>> static_programs(torch.nn.Linear(2, 2))
        []
    """
    graphs = module.__dict__.get(_STORE)
    return graphs.programs if isinstance(graphs, StaticGraphs) and graphs.belongs_to(module) else []
