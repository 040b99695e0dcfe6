"""`load_tensorflow`: a signature of a SavedModel as a torch module, checked against TensorFlow before it is handed out.

TensorFlow freezes the signature's graph, tf2onnx (an extra) writes it as ONNX, and the ONNX importer builds the module.
Knows nothing about the operators.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.numpy_helper
import torch
from google.protobuf.message import DecodeError
from torch import fx

from ..core import ArtifactError, InputError, MissingExtraError, Report, UnsafeFileError, UnsupportedOpError
from ..core.errors import missing_extra
from ._conversion import Array, Loss, Source, compare_with, first_line
from ._onnx_build import build, refuse_unknown
from ._onnx_check import index_bounds

_OLDEST = (2, 12)
_OPSET = 17
#: Operators that reach outside the graph: files by any name, or Python of the process.
_UNSAFE = ("EagerPyFunc", "MatchingFiles", "PyFunc", "PyFuncStateless", "ReadFile", "WriteFile")


def load_tensorflow(
    path: str | os.PathLike[str],
    *,
    signature: str | None = None,
    example_inputs: Any = None,
    labels: Any = None,
    loss: Loss | None = None,
) -> torch.nn.Module:
    """One signature of a TensorFlow SavedModel as a module that can be run, captured, and trained further.

    Inputs are positional in alphabetical order (TensorFlow's own), or by name; several outputs are a tuple in that
    order too. Variables are parameters, as far as TensorFlow has not folded them into others. Needs TensorFlow 2.12 or
    later and tf2onnx for the conversion, not afterwards. `module.meta["report"]` has the measured parity.

    Args:
        path: the directory that holds saved_model.pb.
        signature: which one; by default "serving_default", or the only one.
        example_inputs: a tensor, a tuple, or a dict of name -> tensor for the check; made at random without it.
        labels, loss: for the comparison of losses, `loss(outputs, labels)`; mean squared error to random numbers
            without them.

    Raises:
        MissingExtraError: TensorFlow or tf2onnx is not installed, or too old.
        InputError: no SavedModel, no such signature, or inputs that do not fit.
        ArtifactError, UnsafeFileError: the file is damaged, or its graph reads or writes files.
        UnsupportedOpError: an operator has no translation.
        CheckFailedError: outputs or loss differ from TensorFlow's by more than 1e-5.

    Example:
        >>> load_tensorflow("absent")
        Traceback (most recent call last):
        deepseek_r1.core.errors.InputError: absent does not exist; give the directory of a SavedModel.
    """
    folder = Path(path)
    _refuse_other_files(folder)
    tf = _import_tensorflow(f"reading {folder.name}")
    _refuse_code(folder)
    with tf.device("/CPU:0"):
        try:
            loaded = tf.saved_model.load(str(folder))
        except Exception as e:  # TensorFlow's errors have no base class of their own
            raise ArtifactError(
                f"{folder}: TensorFlow {tf.__version__} cannot load it: {first_line(e)} Save or download it again."
            ) from e
        name, function = _signature(loaded, signature, folder)
        title = f"{folder.name}:{name}"
        model = _as_onnx(tf, function, title)
        module = _module(model, function, title)
        report = Report(f"from_tensorflow {title}", facts={"tensorflow": tf.__version__, "signature": name})
        report.add("parameters", sum(p.numel() for p in module.parameters()), how="numbers, after folding")
        compare_with(
            _source(tf, function, module, model, title),
            lambda feeds: _as_list(module(*feeds)),
            report, example_inputs=example_inputs, loss=loss, labels=labels,
        )  # fmt: skip
    module.meta["report"] = report
    return module


def _refuse_other_files(folder: Path) -> None:
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the directory of a SavedModel.")
    if folder.suffix in (".keras", ".h5", ".hdf5"):
        raise InputError(f"{folder} is a Keras file; use DSModule.from_keras.")
    if folder.is_file() and folder.name == "saved_model.pb":
        raise InputError(f"{folder}: give its directory, {folder.parent}; the variables are beside it.")
    if not (folder / "saved_model.pb").is_file():
        raise InputError(
            f"{folder} is no SavedModel: there is no saved_model.pb in it. Write one with tf.saved_model.save, or with "
            "Keras' model.export(directory)."
        )


def _import_tensorflow(purpose: str) -> Any:
    for package in ("tensorflow", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(purpose, package, "tensorflow")
    try:
        tf: Any = importlib.import_module("tensorflow")
    except ImportError as e:
        raise MissingExtraError(
            f"{purpose}: TensorFlow is installed but cannot be imported: {first_line(e)} "
            "Run: pip install --force-reinstall 'deepseek-r1[tensorflow]'"
        ) from e
    if tuple(int(n) for n in tf.__version__.split(".")[:2]) < _OLDEST:
        raise MissingExtraError(
            f"{purpose} needs TensorFlow {'.'.join(map(str, _OLDEST))} or later, installed is {tf.__version__}. "
            "Run: pip install 'deepseek-r1[tensorflow]'"
        )
    return tf


def _refuse_code(folder: Path) -> None:
    """Raise UnsafeFileError where an operator of any graph inside reaches beyond the graph."""
    protos: Any = importlib.import_module("tensorflow.core.protobuf.saved_model_pb2")
    saved = protos.SavedModel()
    try:
        saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    except DecodeError as e:
        raise ArtifactError(
            f"{folder / 'saved_model.pb'} is damaged: {first_line(e)} Save or download it again."
        ) from e
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        found = sorted({node.op for node in nodes if node.op in _UNSAFE})
        if found:
            raise UnsafeFileError(
                f"{folder} holds operators that reach files or Python ({', '.join(found)}). It was not loaded. Save it "
                "again without them: reading files belongs before the model."
            )


def _signature(loaded: Any, wanted: str | None, folder: Path) -> tuple[str, Any]:
    names = list(getattr(loaded, "signatures", {}))
    if not names:
        raise InputError(
            f"{folder} has no signatures. Save it with some: tf.saved_model.save(model, folder, "
            "signatures={'serving_default': function})."
        )
    name = wanted or ("serving_default" if "serving_default" in names else names[0] if len(names) == 1 else None)
    if name is None or name not in names:
        near = difflib.get_close_matches(str(wanted), names, n=1)
        given = f"no signature {wanted!r}.{f' Did you mean {near[0]!r}?' if near else ''}" if wanted else "several."
        raise InputError(f"{folder} has {given} Its signatures are {', '.join(names)}; choose one with signature=....")
    return name, loaded.signatures[name]


def _as_onnx(tf: Any, function: Any, title: str) -> onnx.ModelProto:
    """The frozen graph of a signature in ONNX, its inputs and outputs under the signature's names."""
    convert: Any = importlib.import_module("tf2onnx.convert")
    specs = function.structured_input_signature[1]
    for name, spec in specs.items():
        if spec.dtype == tf.string:
            raise InputError(f"{title}: the input {name!r} is text; save a signature that begins behind it.")
    # from_function wants what tf.function gives; a signature is such a function already resolved.
    resolved = types.SimpleNamespace(get_concrete_function=lambda *_: function)
    try:
        model, _ = convert.from_function(resolved, input_signature=list(specs.values()), opset=_OPSET)
    except Exception as e:  # tf2onnx raises whatever its handlers raise
        raise UnsupportedOpError(
            f"{title}: tf2onnx cannot write it as ONNX: {type(e).__name__}: {first_line(e)}"
        ) from e
    captured = {inside.name: outside for outside, inside in function.graph.captures}
    _tidy_(model.graph, captured, sorted(function.structured_outputs))
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _module(model: onnx.ModelProto, function: Any, title: str) -> fx.GraphModule:
    try:
        refuse_unknown(model)
        return build(model, "TensorFlowModel")
    except UnsupportedOpError as e:
        loops = any(node.op_type in ("Loop", "If", "Scan") for node in model.graph.node)
        advice = (
            " A loop comes from a recurrent layer as a rule: where there is a Keras file, DSModule.from_keras keeps it."
            if loops
            else ""
        )
        raise UnsupportedOpError(f"{title}: {e}{advice}") from e


def _tidy_(graph: onnx.GraphProto, captured: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Changes the graph: constants in place of captured tensors, no Erfc, and names that people gave."""
    for info in [i for i in graph.input if i.name in captured]:
        # Tensors that a Keras layer holds beside its variables come as inputs of the frozen graph.
        graph.initializer.append(onnx.numpy_helper.from_array(captured[info.name].numpy(), info.name))
        graph.input.remove(info)
    nodes = [part for node in graph.node for part in (_without_erfc(node) if node.op_type == "Erfc" else [node])]
    taken = {name for node in nodes for name in (*node.input, *node.output)} | {i.name for i in graph.input}
    for output, name in zip(graph.output, outputs, strict=True):
        if name not in taken:
            nodes.append(onnx.helper.make_node("Identity", [output.name], [name], name=name))
            output.name = name
    names = _weight_names(graph, nodes)
    for weight in graph.initializer:
        weight.name = names[weight.name]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)


def _without_erfc(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """1 - erf(x): ONNX has no Erfc, which is in TensorFlow's GELU."""
    one, erf = f"{node.name}/one", f"{node.name}/erf"
    return [
        onnx.helper.make_node("Constant", [], [one], value_float=1.0),
        onnx.helper.make_node("Erf", list(node.input), [erf], name=erf),
        onnx.helper.make_node("Sub", [one, erf], list(node.output), name=node.name),
    ]


#: What a weight is to the operator that takes it, by place.
_PLACES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), ("", "weight", "bias")),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), ("", "input_weight", "state_weight", "bias")),
}


def _weight_names(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """A new name for each initializer: its layer's path, without the steps by which TensorFlow reads a variable."""
    users = {name: (node, place) for node in reversed(nodes) for place, name in enumerate(node.input)}
    names: dict[str, str] = {}
    for weight in graph.initializer:
        plain = weight.name
        if re.fullmatch(r"\w+__\d+", plain) and plain in users:
            # tf2onnx made it, out of several as a rule: it is named by what takes it.
            node, place = users[plain]
            places = _PLACES.get(node.op_type, ())
            plain = f"{node.name}/{places[place] if place < len(places) else f'value_{place}'}"
        plain = plain.removeprefix("StatefulPartitionedCall/")
        plain = re.sub(r"/(Cast|MatMul|Conv2D|convolution)/ReadVariableOp(_\d+)?:0$", "/kernel", plain)
        plain = re.sub(r"/BiasAdd/ReadVariableOp(_\d+)?:0$", "/bias", plain)
        plain = re.sub(r"/ReadVariableOp(_\d+)?:0$", "", plain).removesuffix(":0").replace("/", ".")
        while plain in names.values():
            plain += "_"
        names[weight.name] = plain
    return names


def _as_list(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _source(tf: Any, function: Any, module: fx.GraphModule, model: onnx.ModelProto, title: str) -> Source:
    """TensorFlow's side of the check."""
    specs = function.structured_input_signature[1]
    inputs = []
    for name in module.meta["input_names"]:
        shape = specs[name].shape
        dims = tuple(shape.as_list()) if shape.rank is not None else None
        if dims is None:
            raise InputError(f"{title}: the rank of the input {name!r} is open; save a signature that fixes it.")
        inputs.append((name, dims, specs[name].dtype.name))

    def run(feeds: list[Array]) -> list[Array]:
        values = {name: tf.constant(v) for (name, _, _), v in zip(inputs, feeds, strict=True)}
        outputs = function(**values)
        return [outputs[name].numpy() for name in sorted(outputs)]

    return Source(
        title=title, engine=f"TensorFlow {tf.__version__}", inputs=inputs, outputs=sorted(function.structured_outputs),
        run=run, bounds=index_bounds(model),
    )  # fmt: skip
