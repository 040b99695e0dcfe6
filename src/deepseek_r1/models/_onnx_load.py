"""`load_onnx`: an ONNX file as a torch module, checked against onnxruntime before it is handed out.

The file is data: nothing in it is executed, and external data is read from the file's own directory only (onnx holds
that). Knows nothing about training or engines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import torch
from google.protobuf.message import DecodeError

from ..core import ArtifactError, InputError
from ._conversion import first_line
from ._onnx_build import build, refuse_unknown
from ._onnx_check import check, open_session


def load_onnx(path: str | os.PathLike[str], *, example_inputs: Any = None) -> torch.nn.Module:
    """The model of an ONNX file as a module that can be run, captured by torch.export, and trained further.

    Inputs are positional in the file's order, or by name (characters that Python does not allow become underscores).
    Float initializers are parameters under the file's names; integers, scalars, quantisation scales and batch-norm
    statistics are not trained. `module.meta["report"]` has the measured parity.

    Args:
        example_inputs: a tensor, a tuple, or a dict of name -> tensor for the check; made at random without it.

    Raises:
        InputError: there is no such file, or no inputs for the check could be made.
        ArtifactError: the file is damaged, is no ONNX model, or wants data from outside its directory.
        UnsupportedOpError: an operator has no translation; the message names the nodes.
        CheckFailedError: the module's outputs differ from onnxruntime's.

    Example:
        >>> load_onnx("absent.onnx")
        Traceback (most recent call last):
        deepseek_r1.core.errors.InputError: absent.onnx does not exist; give the path of an .onnx file.
    """
    file = Path(path)
    model = read_model(file)
    refuse_unknown(model)
    session = open_session(file)
    module = build(model)
    module.meta["report"] = check(module, session, file, model, example_inputs)
    return module


def read_model(file: Path) -> onnx.ModelProto:
    """The parsed model, with local functions inlined."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the path of an .onnx file.")
    try:
        model = onnx.load(file)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as e:
        raise ArtifactError(f"{file} is damaged or no ONNX model: {first_line(e)} Export or download it again.") from e
    if not model.graph.output:
        raise ArtifactError(f"{file} is damaged or no ONNX model: it has no outputs. Export or download it again.")
    return onnx.inliner.inline_local_functions(model) if model.functions else model
