"""Inductor's code for a CUDA device, kept as its own compiled artifact: kernels of Triton and the calls between them.

Opening an AOTInductor package ends the process in some builds of PyTorch with CUDA (seen in 2.11.0+cu130, where a
linear layer suffices); this form of the same code opens there. Weights lie beside it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from ..graph import Program
from ..graph.quiet import quiet_torch
from .base import Runner

_CODE, _FIXED, _WEIGHTS, _SHAPES = "code", "fixed", "weights.safetensors", "shapes.json"


def build(program: Program, folder: Path) -> None:
    """Compile, with every weight an input, for any sizes and once more for those of the example; write it all."""
    exported = program.exported
    stores: dict[str, Any] = {**exported.state_dict, **exported.constants}
    examples = iter([*pytree.tree_leaves(program.example_inputs)])
    symbolic: list[Any] = []
    values: list[Any] = []
    weights: dict[str, torch.Tensor] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for number, (node, spec) in enumerate(zip(placeholders, exported.graph_signature.input_specs, strict=True)):
        if spec.kind is InputKind.USER_INPUT:
            values.append(next(examples))
            symbolic.append(node.meta["val"])
        else:
            assert spec.target is not None, "what is no input of the user's has a name in the store"
            weights[str(number)] = stores[spec.target].detach()
            values.append(weights[str(number)])
            symbolic.append(weights[str(number)])
    shapes = [list(v.shape) for v in pytree.tree_leaves(program.example_inputs) if isinstance(v, torch.Tensor)]
    module = _tensors_only(exported.graph_module)
    _compile(module, values, "from_example_inputs", folder / _FIXED)
    if any(isinstance(size, str) for shape in program.input_shapes() for size in shape):
        # Code for sizes that vary computes its indices as it runs, which costs; it serves all other sizes.
        _compile(module, symbolic, "from_graph", folder / _CODE)
    (folder / _SHAPES).write_text(json.dumps(shapes))
    # A clone each, because two names of one tied weight may not go into one file.
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / _WEIGHTS)


def _tensors_only(module: GraphModule) -> GraphModule:
    """A copy that answers with its tensors alone; the compiler asks each answer for its shape."""
    copied = copy.deepcopy(module)
    (output,) = [n for n in copied.graph.nodes if n.op == "output"]
    output.args = (tuple(v for v in pytree.tree_leaves(output.args[0]) if isinstance(v, Node)),)
    copied.recompile()
    return copied


def _compile(module: GraphModule, values: list[Any], shapes: Any, path: Path) -> None:
    with quiet_torch(), torch.no_grad():
        artifact = torch._inductor.standalone_compile(module, values, dynamic_shapes=shapes)
        artifact.save(path=str(path), format="unpacked")


def open_runner(folder: Path) -> Runner:
    """The code on flat inputs."""
    shapes = json.loads((folder / _SHAPES).read_text())
    stored = {int(name): tensor.cuda() for name, tensor in load_file(folder / _WEIGHTS).items()}
    with quiet_torch():
        fixed = torch._inductor.CompiledArtifact.load(path=str(folder / _FIXED), format="unpacked")
        general = fixed
        if (folder / _CODE).exists():
            general = torch._inductor.CompiledArtifact.load(path=str(folder / _CODE), format="unpacked")

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        tensors = [v.detach().contiguous() for v in leaves if isinstance(v, torch.Tensor)]
        code = fixed if [list(v.shape) for v in tensors] == shapes else general
        given = iter(tensors)
        values = [stored[i] if i in stored else next(given) for i in range(len(stored) + len(tensors))]
        with torch.no_grad():
            outputs = code(*values)
        return [v for v in outputs if isinstance(v, torch.Tensor)]

    return run
