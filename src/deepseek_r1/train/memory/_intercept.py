"""Putting something around the calls of modules, reversibly and without a trace on the modules' own surface.

`nn.Module.__call__` looks for a compiled form of the call first; a wrapper is put there, on the instance. Forward
methods, hooks, classes, parameters and names in the state dict stay what they are, and a module that was compiled with
`module.compile()` is wrapped around its compiled form. Knows nothing about memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_PLACE = "_compiled_call_impl"
#: Given a name, the module's own call and its arguments.
Handler = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Wrapped calls of some modules, until `remove`.

    Example:
        >>> seen, net = [], nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> def handler(name, run, args, kwargs):
        ...     seen.append(name)
        ...     return run(*args, **kwargs)
        >>> with Interception({"0": net[0]}, handler):
        ...     _ = net(torch.ones(1, 2))
        >>> seen
        ['0']
    """

    def __init__(self, modules: Mapping[str, nn.Module], handler: Handler, *, compiled: bool = False) -> None:
        self._before: list[tuple[nn.Module, bool, Any]] = []
        for name, module in modules.items():
            there, own = _PLACE in module.__dict__, module.__dict__.get(_PLACE)
            self._before.append((module, there, own))
            run = own if own is not None else module._call_impl
            if compiled and own is None and next(module.children(), None) is not None:
                # What was compiled is kept with the code: a plan put on again finds it.
                run = torch.compile(run)
            # Past the module's own __setattr__: a compiled module passes attributes on to the one inside.
            module.__dict__[_PLACE] = _wrapper(handler, name, run)

    def remove(self) -> None:
        """Take the wrappers off; twice does no harm."""
        for module, there, own in reversed(self._before):
            if there:
                module.__dict__[_PLACE] = own
            else:
                module.__dict__.pop(_PLACE, None)
        self._before = []

    def __enter__(self) -> Interception:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _wrapper(handler: Handler, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return handler(name, run, args, kwargs)

    # The compiler leaves the wrapper to Python and goes on inside; asking it properly would import it.
    intercepted._torchdynamo_disable = True  # type: ignore[attr-defined]
    return intercepted


def undisturbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, kept from the compiler, which would trace what autograd calls while compiled code runs."""
    # Nothing is compiled where the compiler was never imported, and importing it takes a second.
    return torch._dynamo.disable(function) if "torch._dynamo" in sys.modules else function
