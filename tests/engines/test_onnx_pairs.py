"""Pairs of quantize and dequantize that cost time and accuracy and buy nothing are not exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_r1.engines import ENGINES, compile_program, to_onnx
from deepseek_r1.quantization import PTQConfig, quantize


class Padded(nn.Module):
    """Convolutions with an uneven padding and a pooling between them, as networks made for TensorFlow have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2)
        self.third = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(nn.functional.relu(self.first(x)), (0, 1, 0, 1))
        return self.third(nn.functional.max_pool2d(nn.functional.relu(self.second(x)), 2))


class Words(nn.Module):
    """Linear layers in a row, behind functions that have no integer form, and beside an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.b(nn.functional.gelu(self.a(x))))
        y = self.c(x)
        return nn.functional.layer_norm(y + self.d(y), (32,))


def kinds(program) -> list[str]:
    return [node.op_type for node in to_onnx(program).graph.node]


def test_a_convolution_pads_by_itself() -> None:
    torch.manual_seed(0)
    net, x = Padded().eval(), torch.randn(8, 3, 16, 16)
    program = quantize(net, dataset=[x])
    assert "Pad" not in kinds(program)
    model = to_onnx(program)
    pads = [
        list(a.ints) for node in model.graph.node if node.op_type == "Conv" for a in node.attribute if a.name == "pads"
    ]
    assert [0, 0, 1, 1] in pads
    expected = program(x).detach()
    answer = compile_program(ENGINES.get("onnxruntime")(), program)([x])[0]
    assert float((answer - expected).norm()) < 0.01 * float(expected.norm())


def test_products_are_read_as_floats_by_what_wants_floats() -> None:
    torch.manual_seed(0)
    net, x = Words().eval(), torch.randn(16, 5, 32)
    program = quantize(net, dataset=[x], config=PTQConfig(scaling="off"))
    back = sum("dequantize_per_tensor" in str(n.target) for n in program.exported.graph.nodes)
    constants = {i.name for i in to_onnx(program).graph.initializer}
    read = [n for n in to_onnx(program).graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    # The addition reads what the layer before it gives, and only the layer beside it the integers.
    assert len(read) == back - 1
    with torch.no_grad():
        exact, expected = net(x), program(x)
    answer = compile_program(ENGINES.get("onnxruntime")(), program)([x])[0]
    assert float((answer - exact).norm()) <= 1.1 * float((expected - exact).norm())


@pytest.mark.parametrize("pad", [{"value": 1.0}, {"mode": "replicate"}])
def test_other_paddings_stay(pad: dict[str, object]) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(nn.functional.pad(nn.functional.relu(self.first(x)), (1, 1, 1, 1), **pad))

    torch.manual_seed(0)
    net, x = Other().eval(), torch.randn(4, 3, 8, 8)
    program = quantize(net, dataset=[x])
    expected = program(x).detach()
    answer = compile_program(ENGINES.get("onnxruntime")(), program)([x])[0]
    assert float((answer - expected).norm()) < 0.02 * float(expected.norm())
