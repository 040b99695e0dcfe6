"""`load_keras`: a Keras model or its file as a torch module, checked against Keras before it is handed out.

The file is data: code inside it (Lambda layers) is refused before Keras sees it. Knows nothing about the layers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from ..core import ArtifactError, InputError, MissingExtraError, Report, UnsafeFileError
from ..core.errors import missing_extra
from ._conversion import Array, Loss, Source, compare_with, first_line
from ._keras_build import build, build_whole, is_graph
from ._keras_values import to_array

_ENDINGS = (".keras", ".h5", ".hdf5")


def load_keras(
    source: Any,
    *,
    example_inputs: Any = None,
    labels: Any = None,
    loss: Loss | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """A Keras 3 model, or its `.keras` or `.h5` file, as a module of plain torch layers with the layers' names.

    Inputs keep Keras' layout (channels last). `module.meta["report"]` has the measured parity and says which layers
    stayed Keras layers because torch has none like them; without such, Keras is not needed afterwards.

    Args:
        source: a path or a built model, whatever backend Keras runs on. For a path Keras is imported on the torch
            backend, unless it was imported before or KERAS_BACKEND says otherwise.
        example_inputs: a tensor, a tuple, or a dict of name -> tensor for the check; made at random without it.
        labels, loss: for the comparison of losses, `loss(outputs, labels)`; mean squared error to random numbers
            without them.
        custom_objects: classes of your own that the file names.

    Raises:
        MissingExtraError: Keras, or its backend, is not installed.
        InputError: no such file, no Keras model, or inputs that do not fit.
        ArtifactError, UnsafeFileError: the file is damaged, or carries code.
        UnsupportedOpError: a layer has no torch form, and Keras does not run on torch.
        CheckFailedError: outputs or loss differ from Keras' by more than 1e-5.

    Example:
        >>> load_keras("absent.keras")
        Traceback (most recent call last):
        deepseek_r1.core.errors.InputError: absent.keras does not exist; give the path of a .keras or .h5 file.
    """
    if isinstance(source, str | os.PathLike):
        file = Path(source)
        _refuse_other_files(file)
        keras = import_keras(f"reading {file.name}")
        model, title = _read(keras, file, custom_objects), file.name
    else:
        keras = _keras_of(source)
        model, title = source, type(source).__name__
    report = Report(f"from_keras {title}", facts={"keras": keras.__version__, "backend": keras.backend.backend()})
    module = _convert(keras, model, example_inputs)
    _describe(report, model, module)
    compare_with(
        _source(keras, model, module, title),
        lambda feeds: keras.tree.flatten(module(*feeds)),
        report, example_inputs=example_inputs, loss=loss, labels=labels,
    )  # fmt: skip
    module.meta["report"] = report
    return module


def import_keras(purpose: str) -> Any:
    """Keras 3, on the backend that it has already, or that KERAS_BACKEND names, or on torch. The environment stays."""
    if "keras" not in sys.modules and importlib.util.find_spec("keras") is None:
        raise missing_extra(purpose, "keras", "keras")
    before = os.environ.get("KERAS_BACKEND")
    # Keras reads it once, when it is imported; its own default may be a backend that is not installed.
    os.environ["KERAS_BACKEND"] = before or "torch"
    try:
        keras: Any = importlib.import_module("keras")
    except (ImportError, ValueError) as e:  # a ValueError for a backend that does not exist
        raise MissingExtraError(
            f"{purpose}: Keras cannot be imported on its backend {os.environ['KERAS_BACKEND']!r}: {first_line(e)} "
            "Unset KERAS_BACKEND (torch is taken then), or run: pip install 'deepseek-r1[keras]'"
        ) from e
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
    if int(keras.__version__.split(".")[0]) < 3:
        raise MissingExtraError(
            f"{purpose} needs Keras 3, installed is {keras.__version__}. Run: pip install 'deepseek-r1[keras]'"
        )
    return keras


def _keras_of(model: Any) -> Any:
    """The Keras that made the model."""
    keras = sys.modules.get("keras")
    if keras is not None and int(keras.__version__.split(".")[0]) >= 3 and isinstance(model, keras.Model):
        return keras
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if "keras" in kind:
        raise InputError(
            f"from_keras was given a {kind}, which is no Keras 3 model. Save it (model.save('model.keras')) and give "
            "the path, or build it with Keras 3."
        )
    raise InputError(f"from_keras needs a Keras 3 model or the path of a .keras or .h5 file, given {kind}.")


def _refuse_other_files(file: Path) -> None:
    if not file.exists():
        raise InputError(f"{file} does not exist; give the path of a .keras or .h5 file.")
    if file.is_dir() and (file / "saved_model.pb").is_file():
        raise InputError(f"{file} is a SavedModel of TensorFlow; use DSModule.from_tensorflow.")
    if file.suffix not in _ENDINGS or file.is_dir():
        raise InputError(f"{file} is no Keras file; its name must end in {', '.join(_ENDINGS)}.")


def _read(keras: Any, file: Path, custom_objects: Mapping[str, Any] | None) -> Any:
    _refuse_code(_config(file), file)
    try:
        # The loss and optimizer it was compiled with may be the user's own, and are not needed.
        return keras.saving.load_model(file, custom_objects=dict(custom_objects or {}), compile=False, safe_mode=True)
    except Exception as e:  # Keras raises whatever its layers raise
        raise InputError(
            f"{file}: Keras {keras.__version__} cannot load it: {first_line(e)} Classes of your own go into "
            "custom_objects={'Name': Name}; a file of Keras 1 or 2 may have to be saved again by the version it is of."
        ) from e


def _config(file: Path) -> Any:
    """The file's description of the model."""
    try:
        if file.suffix == ".keras":
            with zipfile.ZipFile(file) as archive:
                return json.loads(archive.read("config.json"))
        h5py: Any = importlib.import_module("h5py")
        with h5py.File(file, "r") as archive:
            text = archive.attrs.get("model_config")
    except ImportError as e:
        raise missing_extra(f"reading {file.name}", "h5py", "keras") from e
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError, RuntimeError, EOFError) as e:
        raise ArtifactError(f"{file} is damaged or no Keras file: {first_line(e)} Save or download it again.") from e
    if text is None:
        raise InputError(f"{file} holds weights without a model. Save the whole model: model.save('model.keras').")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{file} is damaged: {first_line(e)} Save or download it again.") from e


def _refuse_code(config: Any, file: Path) -> None:
    """Raise UnsafeFileError where the description holds Python byte code."""
    found = [config]
    while found:
        part = found.pop()
        if isinstance(part, dict):
            inner = part.get("config")
            legacy = isinstance(inner, dict) and inner.get("function_type") == "lambda"
            if part.get("class_name") == "__lambda__" or legacy:
                name = inner.get("name", "") if isinstance(inner, dict) else ""
                raise UnsafeFileError(
                    f"{file} carries Python code (a Lambda layer{f', {name!r}' * bool(name)}), which loading it would "
                    "run. It was not loaded. Have it saved with keras.ops or a registered layer class instead."
                )
            found.extend(part.values())
        elif isinstance(part, list):
            found.extend(part)


def _convert(keras: Any, model: Any, example_inputs: Any) -> fx.GraphModule:
    if is_graph(model):
        return build(keras, model)
    if example_inputs is None:
        raise InputError(
            f"{type(model).__name__} has a call of its own or was not built, so its inputs are not known. Give "
            "example_inputs=(tensor, ...)."
        )
    count = len(example_inputs) if isinstance(example_inputs, tuple | list | Mapping) else 1
    return build_whole(keras, model, count)


def _source(keras: Any, model: Any, module: fx.GraphModule, title: str) -> Source:
    """Keras' side of the check: its outputs in inference, flat."""
    graph = getattr(model, "_functional", None) or model
    names = module.meta["input_names"]
    if hasattr(graph, "_inputs_struct"):
        inputs = [(n, tuple(t.shape), str(t.dtype)) for n, t in zip(names, model.inputs, strict=True)]
    else:
        inputs = [(n, (), "") for n in names]

    def run(feeds: list[Array]) -> list[Array]:
        tensors = [keras.ops.convert_to_tensor(v) for v in feeds]
        with torch.no_grad():
            if hasattr(graph, "_inputs_struct"):
                outputs = model(keras.tree.pack_sequence_as(graph._inputs_struct, tensors), training=False)
            else:
                outputs = model(*tensors)
        return [to_array(y) for y in keras.tree.flatten(outputs)]

    return Source(
        title=title, engine=f"Keras on {keras.backend.backend()}", inputs=inputs,
        outputs=getattr(model, "output_names", None) or [], run=run, bounds=module.meta["bounds"],
    )  # fmt: skip


def _describe(report: Report, model: Any, module: fx.GraphModule) -> None:
    """Changes the report: what came over, and what did not."""
    ours = sum(p.numel() for p in module.parameters() if p.requires_grad)
    theirs = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    report.add("trained parameters", ours, before=theirs, how="numbers; torch's LSTM has a second bias")
    for name, why in module.meta["kept"].items():
        report.note(f"{name} stays a Keras layer ({why}); Keras on torch is needed to run it")
    for note in module.meta["notes"]:
        report.note(note)
    if module.meta["frozen"]:
        report.note(f"not trained, as in Keras: {', '.join(module.meta['frozen'])}")
    punished = [layer.name for layer in model.layers if getattr(layer, "kernel_regularizer", None) is not None]
    if punished:
        report.skip("regularisation", f"the losses of {', '.join(punished)} are the trainer's business here")
