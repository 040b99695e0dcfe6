"""Operators of C++ libraries as operators of torch, and as modules.

An operator is known to torch as `dr1::<name>`: one kernel for CPU and CUDA, one for tracing, and autograd through a
second operator `dr1::<name>_backward`, so that compiled training graphs hold both as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..core import InputError
from ..core.atomic import sha256_file
from ._kernels import Kernels
from ._library import Attribute, Description, Library

NAMESPACE = "dr1"


class CustomOp(torch.nn.Module):
    """Base of the modules made for custom operators. They have no weights; attributes are given by name.

    Raises:
        InputError: an attribute that the operator does not have.
    """

    about: ClassVar[Description]
    function: ClassVar[Callable[..., Any]]

    def __init__(self, **attributes: float | int | bool) -> None:
        super().__init__()
        known = {a.name: a for a in self.about.attributes}
        if unknown := sorted(set(attributes) - set(known)):
            raise InputError(
                f"{type(self).__name__} has no attribute {unknown[0]!r}; it has {sorted(known) or 'none'}."
            )
        self.attributes = {
            name: _converted(a, attributes.get(name, a.default), type(self).__name__) for name, a in known.items()
        }

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The operator on `inputs`."""
        return type(self).function(*inputs, *self.attributes.values())

    def extra_repr(self) -> str:
        """The attributes."""
        return ", ".join(f"{k}={v!r}" for k, v in self.attributes.items())


@dataclass(frozen=True)
class _Registered:
    library: Library
    kernels: Kernels
    module: type[CustomOp]
    function: Callable[..., Any]


_OPS: dict[str, _Registered] = {}
_LOADED: dict[Path, Library] = {}
#: torch forgets what was registered through an object of this kind that is gone.
_SCOPE: list[torch.library.Library] = []


def register_custom_op(name: str, path: str | os.PathLike[str]) -> type[CustomOp]:
    """Make an operator of a C++ library an operator of torch.

    Afterwards it is `torch.ops.dr1.<name>`, `deepseek_r1.ops.<name>` as a function and `deepseek_r1.ops.<Name>` as a
    module (`gated_norm` becomes `GatedNorm`). It runs in eager mode, under torch.compile, in captured programs, and it
    trains. Registering the same file again does nothing.

    Args:
        name: the name in `DR1_REGISTER_OP`.
        path: the library, as `build_op` writes it. It is loaded into this process: its code runs.

    Returns:
        The module's class.

    Raises:
        InputError: no library of operators, of another ABI version, without that operator, or the name is taken by
            another file.
    """
    file = Path(path).resolve()
    if name in _OPS:
        return _again(name, file)
    library = _LOADED.get(file) or Library(file)
    _check_unchanged(library, file)
    if name not in library.ops:
        raise InputError(f"{file} has no operator {name!r}; it has {', '.join(library.ops) or 'none'}.")
    _check_free(name)
    kernels = Kernels(library, name)
    function = _define(kernels)
    about = library.ops[name][1]
    members = {"about": about, "function": staticmethod(function), "__doc__": f"The operator {name!r} of {file.name}."}
    module = type(class_name(name), (CustomOp,), {**members, "__module__": "deepseek_r1.ops"})
    _LOADED[file] = library
    _OPS[name] = _Registered(library, kernels, module, function)
    return module


def libraries() -> dict[str, Path]:
    """The library file of each registered operator.

    A process that loads a saved program with custom operators registers the same files first.
    """
    return {name: entry.library.path for name, entry in _OPS.items()}


def kernels_of(name: str) -> Kernels:
    """The passes of a registered operator. Raises InputError if it is not registered."""
    if name not in _OPS:
        raise InputError(f"there is no operator {name!r}; register_custom_op(name, library) comes first.")
    return _OPS[name].kernels


def registered(attribute: str) -> Any:
    """The module class or function behind a name of `deepseek_r1.ops`, or None."""
    for name, entry in _OPS.items():
        if attribute == entry.module.__name__:
            return entry.module
        if attribute == name:
            return entry.function
    return None


def registered_names() -> list[str]:
    """Names that `registered` knows."""
    return [n for name, entry in _OPS.items() for n in (name, entry.module.__name__)]


def class_name(name: str) -> str:
    """The module's name for an operator's.

    Example:
        >>> class_name("gated_norm")
        'GatedNorm'
    """
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _again(name: str, file: Path) -> type[CustomOp]:
    entry = _OPS[name]
    if entry.library.path != file:
        raise InputError(
            f"the operator {name!r} is registered from {entry.library.path} already, not from {file}. A process keeps "
            "an operator once it has it: use another name, or start a new process."
        )
    _check_unchanged(entry.library, file)
    return entry.module


def _check_unchanged(library: Library, file: Path) -> None:
    if not file.is_file() or sha256_file(file) != library.sha256:
        raise InputError(
            f"{file} was changed or removed after it was loaded; this process goes on with what it loaded. Start a new "
            "process for the new file, or build it under another name."
        )


def _check_free(name: str) -> None:
    taken = {entry.module.__name__: other for other, entry in _OPS.items()}
    if (other := taken.get(class_name(name))) is not None:
        raise InputError(f"the operators {name!r} and {other!r} would both be {class_name(name)}; rename one of them.")
    if f"{NAMESPACE}::{name}" in torch._C._dispatch_get_all_op_names():
        raise InputError(f"torch has an operator {NAMESPACE}::{name} already, from elsewhere; choose another name.")


def _converted(attribute: Attribute, value: Any, where: str) -> float | int | bool:
    allowed: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,)}
    right = isinstance(value, allowed[attribute.kind]) and isinstance(value, bool) == (attribute.kind == "bool")
    if not right:
        raise InputError(f"{where}({attribute.name}={value!r}): a {attribute.kind} is needed.")
    return float(value) if attribute.kind == "float" else value  # type: ignore[no-any-return]


def _schemas(about: Description) -> tuple[str, str]:
    """The operator's and its backward's, in torch's language."""
    names = ["input"] if about.inputs == 1 else [f"input{i}" for i in range(about.inputs)]
    with_defaults = "".join(f", {a.kind} {a.name}={a.default!r}" for a in about.attributes)
    plain = "".join(f", {a.kind} {a.name}" for a in about.attributes)
    result = "Tensor" if about.outputs == 1 else f"({', '.join(['Tensor'] * about.outputs)})"
    forward = f"{about.name}({', '.join(f'Tensor {n}' for n in names)}{with_defaults}) -> {result}"
    lists = "Tensor[] gradients, Tensor[] inputs, Tensor[] outputs"
    return forward, f"{about.name}_backward({lists}{plain}, bool[] wanted) -> Tensor[]"


def _define(kernels: Kernels) -> Callable[..., Any]:
    about, n = kernels.about, kernels.about.inputs
    scope = torch.library.Library(NAMESPACE, "FRAGMENT")
    forward, backward = _schemas(about)
    for schema in (forward, backward):
        scope.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    one = about.outputs == 1

    def run(*args: Any) -> Any:
        outputs = kernels.forward(args[:n], _filled(about, args[n:]))
        return outputs[0] if one else tuple(outputs)

    def traced(*args: Any) -> Any:
        outputs = kernels.allocate(args[:n], _filled(about, args[n:]))
        return outputs[0] if one else tuple(outputs)

    def run_backward(gradients: Any, inputs: Any, outputs: Any, *rest: Any) -> Any:
        return kernels.gradients(gradients, inputs, outputs, rest[:-1], rest[-1])

    def traced_backward(gradients: Any, inputs: Any, outputs: Any, *rest: Any) -> Any:
        return kernels.allocate_gradients(inputs, rest[-1])

    for op, kernel, fake in ((about.name, run, traced), (f"{about.name}_backward", run_backward, traced_backward)):
        for device in ("CPU", "CUDA"):
            torch.library.impl(scope, op, device)(kernel)
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=scope)
    _define_autograd(scope, about)
    _SCOPE.append(scope)
    function: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), about.name).default
    return function


def _filled(about: Description, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """All attributes: torch leaves out what equals its default, from the end."""
    return (*given, *[a.default for a in about.attributes[len(given) :]])


def _define_autograd(scope: torch.library.Library, about: Description) -> None:
    n = about.inputs
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{about.name}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if about.outputs == 1 else tuple(output)
        ctx.save_for_backward(*inputs[:n], *(outputs if about.backward else ()))
        ctx.attributes = _filled(about, inputs[n:])

    def gradients(ctx: Any, *incoming: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        wanted = [bool(w) for w in ctx.needs_input_grad[:n]]
        found = backward_op(list(incoming), list(saved[:n]), list(saved[n:]), *ctx.attributes, wanted)
        return (*[g if w else None for g, w in zip(found, wanted)], *[None] * len(about.attributes))

    def no_more(ctx: Any, *incoming: Any) -> Any:
        raise InputError(f"the operator {about.name!r} can be differentiated once; its second derivative is not known.")

    torch.library.register_autograd(f"{NAMESPACE}::{about.name}", gradients, setup_context=keep, lib=scope)
    torch.library.register_autograd(f"{NAMESPACE}::{about.name}_backward", no_more, lib=scope)
