"""`DSModule`, `@model` and `load_model`: the façade that gives a module the verbs of the house.

Knows not how the verbs work.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from .core import Budget, InputError, Report, open_artifact
from .core.artifact import is_artifact
from .deploy import export
from .engines import Executable, optimize
from .graph import PLAIN, Program, StaticOptions, load_pt2, run_static
from .models import SOURCES, load_factory, load_hf, load_keras, load_onnx, load_tensorflow

#: A short name, or a repository `org/name`.
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DSModule(torch.nn.Module):
    """An `nn.Module` with `.optimize()`, `.export()` and `.report`. Subclass it, or wrap a module with `from_torch`.

    Example:
        >>> net = DSModule.from_torch(torch.nn.Linear(4, 2))
        >>> fast = net.optimize(example_inputs=torch.randn(3, 4))
        >>> net.report.title
        'optimize Linear'
    """

    def __init__(self) -> None:
        super().__init__()
        self._report: Report | None = None

    @classmethod
    def from_torch(cls, module: torch.nn.Module) -> DSModule:
        """Wrap a module; parameters are shared and keep their names.

        Raises:
            InputError: not a torch.nn.Module.
        """
        wrapped = _Wrapped(module)
        wrapped._report = Report(f"from_torch {type(module).__name__}")
        count = sum(p.numel() for p in module.parameters())
        wrapped._report.add("parameters", count, before=count, how="shared with the module given")
        wrapped._report.note("the module itself is used, so there is nothing to convert or to compare")
        return wrapped

    @classmethod
    def from_onnx(cls, path: str | os.PathLike[str], *, example_inputs: Any = None) -> DSModule:
        """Convert an ONNX file; checked against ONNX Runtime within 1e-5. See `models.load_onnx` for errors."""
        return _converted(load_onnx(path, example_inputs=example_inputs))

    @classmethod
    def from_keras(cls, source: Any, **options: Any) -> DSModule:
        """Convert a Keras 3 model or its `.keras` or `.h5` file; checked against Keras within 1e-5.

        See `models.load_keras` for the options (`example_inputs`, `labels`, `loss`, `custom_objects`) and errors.
        """
        return _converted(load_keras(source, **options))

    @classmethod
    def from_tensorflow(cls, path: str | os.PathLike[str], **options: Any) -> DSModule:
        """Convert a signature of a SavedModel directory; checked against TensorFlow within 1e-5.

        See `models.load_tensorflow` for the options (`signature`, `example_inputs`, `labels`, `loss`) and errors.
        """
        return _converted(load_tensorflow(path, **options))

    @property
    def report(self) -> Report:
        """The Report of the last verb.

        Raises:
            InputError: a subclass of which no verb was called yet.
        """
        report = self.__dict__.get("_report")
        if report is None:
            raise InputError("this module has no report yet; call .optimize() or .export() first.")
        return report

    def optimize(
        self,
        method: str = "static",
        example_inputs: Any = None,
        dataset: Iterable[Any] | None = None,
        budget: Budget | None = None,
        **options: Any,
    ) -> Executable:
        """See `deepseek_r1.optimize`, for the further options (`engines`, `race`) too."""
        executable = optimize(_bare(self), method, example_inputs, dataset, budget, **options)
        self._report = executable.report
        return executable

    def export(self, path: str | os.PathLike[str], **options: Any) -> Report:
        """See `deepseek_r1.deploy.export`."""
        self._report = export(_bare(self), path, **options)
        return self._report


def _converted(module: torch.nn.Module) -> DSModule:
    """A converted module with the report of its check."""
    wrapped = _Wrapped(module)
    meta: Any = module.meta
    wrapped._report = meta["report"]
    return wrapped


class _Wrapped(DSModule):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"DSModule.from_torch needs a torch.nn.Module, given {type(module).__name__}.")
        self.module = module
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's, without a prefix."""
        return self.module.state_dict(*args, **kwargs)


def _with_prefix(wrapper: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Changes `state_dict`: names as `_Wrapped.state_dict` gives them become those that torch looks for."""
    for name in [n for n in state_dict if n.startswith(prefix)]:
        state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def _bare(module: DSModule) -> torch.nn.Module:
    return module.module if isinstance(module, _Wrapped) else module


_Class = TypeVar("_Class", bound=type[torch.nn.Module])


@overload
def model(cls: _Class) -> _Class:
    """`@model`."""


@overload
def model(
    *, dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None, fallback: bool = False
) -> Callable[[_Class], _Class]:
    """`@model(fallback=True)`."""


def model(
    cls: Any = None, *, dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None, fallback: bool = False
) -> Any:
    """Class decorator: instances run as static graphs, captured at the first call.

    The class stays the class it was. Parameters and buffers are shared with the graphs, so that instances train; what
    runs in training and in evaluation are two graphs. Another size of a dimension that varies takes no new graph;
    another rank, dtype, device or nest of the inputs does, and so does a plain attribute or a part that was changed.
    While a part of the module has hooks of the user's, it runs line by line, so that they are called.

    Args:
        cls: a subclass of `nn.Module`.
        dynamic_shapes: see `deepseek_r1.capture`; by default every size varies that the model does not fix.
        fallback: run what cannot be captured line by line, instead of raising.

    Raises:
        InputError: not a subclass of `nn.Module`.
        CaptureError: at a call, if the module cannot be a static graph; the message names the line and the way out.

    Example:
        >>> @model
        ... class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         return torch.relu(self.linear(x))
        >>> net = Net()
        >>> net(torch.randn(3, 4)).sum().backward()
        >>> _ = net(torch.randn(8, 4))
        >>> from deepseek_r1.graph import static_programs
        >>> [str(program.signature) for program in static_programs(net)]  # doctest: +ELLIPSIS
        ['x: float32[s..., 4] on cpu']
    """
    options = StaticOptions(dynamic_shapes=dynamic_shapes, fallback=fallback)
    if cls is None:
        return lambda decorated: _make_static(decorated, options)
    return _make_static(cls, options)


def _make_static(cls: Any, options: StaticOptions) -> Any:
    """Changes `cls`, which it gives back: a new class could not be pickled under the old one's name."""
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        raise InputError(
            f"@model stands before a class that derives from torch.nn.Module, given {cls!r}. For a module that exists "
            "already use deepseek_r1.capture or deepseek_r1.optimize; for a function, deepseek.jit.trace."
        )
    static: Any = cls
    static.forward = _static(static.forward, options)
    own = static.__dict__.get("__init_subclass__")

    def init_subclass(sub: Any, **kwargs: Any) -> None:
        inherited = super(static, sub).__init_subclass__ if own is None else own.__get__(None, sub)
        inherited(**kwargs)
        if "forward" in sub.__dict__:
            sub.forward = _static(sub.forward, options)

    static.__init_subclass__ = classmethod(init_subclass)
    return static


def _static(forward: Callable[..., Any], options: StaticOptions) -> Callable[..., Any]:
    plain = getattr(forward, PLAIN, forward)

    @functools.wraps(plain)
    def static_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_static(self, plain, args, kwargs, options)

    setattr(static_forward, PLAIN, plain)
    return static_forward


def load_model(spec: str | os.PathLike[str]) -> torch.nn.Module | Program:
    """A model from where users keep it.

    Args:
        spec: `file.py:factory` (a function or class that gives a module), `model.onnx`, `program.pt2` (a captured
            graph by torch.export.save), `program.dr1`, `model.keras`, `model.h5`, the directory of an Artifact or a
            SavedModel of TensorFlow, or `source:what` with a registered source. A short name (`gpt2`, `llama-7b`), a
            repository `org/name` or a directory with a `config.json` is one of `hf:`.

    Raises:
        InputError: none of these, or the file or factory is missing; for a name, where it was looked for.
        ArtifactError, UnsafeFileError: the file is damaged, or carries code.
        PluginError: unknown source.
    """
    text = os.fspath(spec)
    path = Path(text)
    if is_artifact(path):
        return load_onnx(open_artifact(path).model_path)
    if (path / "saved_model.pb").is_file():
        return load_tensorflow(path)
    scheme, colon, rest = text.partition(":")
    from_source = bool(colon) and scheme in SOURCES
    if not from_source and (".py:" in text or text.endswith(".py")):
        return load_factory(text)
    readers: dict[str, Callable[[Any], torch.nn.Module | Program]] = {
        ".onnx": load_onnx,
        ".pt2": load_pt2,
        ".dr1": Program.load,
        ".keras": load_keras,
        ".h5": load_keras,
    }
    if path.suffix in readers and not from_source:
        if not path.is_file():
            raise InputError(f"{text} does not exist.")
        return readers[path.suffix](path)
    if colon and len(scheme) > 1:
        loaded: torch.nn.Module = SOURCES.get(scheme)(rest)
        return loaded
    if path.suffix in (".pt", ".pth", ".safetensors", ".bin"):
        raise InputError(
            f"{text} holds weights without a model. Give the model as file.py:factory and these as its weights."
        )
    if path.is_dir() and (path / "config.json").is_file():
        return load_hf(path)
    if path.is_dir():
        raise InputError(
            f"{text} is a directory without a manifest.json, so it is no Artifact, without a saved_model.pb, so it is "
            "no SavedModel, and without a config.json, so it is no model in the layout of Hugging Face."
        )
    forms = (
        "file.py:factory, a .onnx, .pt2, .dr1, .keras or .h5 file, the directory of an Artifact or a SavedModel, or "
        f"one of the sources {', '.join(SOURCES.names())} as source:name"
    )
    if path.exists() or not _NAME.fullmatch(text):
        raise InputError(f"{text!r} is no model that can be loaded. Give a name such as gpt2 or org/name, {forms}.")
    try:
        return load_hf(text)
    except InputError as e:
        raise InputError(f"{e} A model may also be {forms}.") from e
