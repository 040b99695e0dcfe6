"""Every layer format on every engine that takes it, and the ONNX form that ONNX Runtime has kernels for."""

import onnx
import pytest
import torch
from torch import nn

from deepseek_r1.core import Budget, Float32, Int4Dynamic, Int4Weight, Int8Dynamic, Int8Static, Int8Weight
from deepseek_r1.deploy import export
from deepseek_r1.engines import ENGINES, RaceConfig, optimize, to_onnx
from deepseek_r1.engines._float_weights import floats_of_groups
from deepseek_r1.engines._inductor import _rounded_rows
from deepseek_r1.engines.base import compile_program
from deepseek_r1.graph import capture
from deepseek_r1.quantization import PTQConfig, quantize
from deepseek_r1.runtime import RUNTIMES

FORMATS = [Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(), Int4Weight(group_size=32, symmetric=True),
           Int4Dynamic()]  # fmt: skip
#: Smallest ratio of signal to noise, in dB, against the program: engines with 8-bit kernels round activations too.
CLOSE = {"eager": 140, "onnxruntime": 30, "openvino": 30, "executorch": 30, "inductor": 50}


class Block(nn.Module):
    """A feed-forward block: products of three and of two dimensions, with and without a bias."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128, bias=False)
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, 64)

    def forward(self, x):
        return self.out(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))


def block(rank):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 128) if rank == 3 else torch.randn(8, 128)
    return capture(Block(rank).eval(), x), x


def decibels(expected, found):
    expected, found = expected.detach(), found.detach()
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino", "executorch"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_answers_are_those_of_the_program(engine, fmt):
    plugin = ENGINES.get(engine)()
    if reason := plugin.unavailable():
        pytest.skip(reason)
    program, x = block(3)
    stored = quantize(program, dataset=[x], config=PTQConfig(format=fmt))
    run = compile_program(plugin, stored)
    for rows in (1, 3, 0):
        with torch.no_grad():
            expected = stored(x[:rows])
        (found,) = run([x[:rows]])
        assert found.shape == expected.shape
        if rows:
            assert decibels(expected, found) > CLOSE[engine]


def test_inductor_takes_every_format_in_one_program():
    plugin = ENGINES.get("inductor")()
    if reason := plugin.unavailable():
        pytest.skip(reason)
    program, x = block(3)
    config = PTQConfig(format=Int4Dynamic(group_size=32), layers={"up": Int8Weight(), "down": Int8Dynamic()})
    stored = quantize(program, dataset=[x], config=config)
    (found,) = compile_program(plugin, stored)([x[:3]])
    with torch.no_grad():
        assert decibels(stored(x[:3]), found) > CLOSE["inductor"]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    ("fmt", "bits"), [(Int4Weight(), 4), (Int4Dynamic(group_size=32), 4), (Int8Weight(), 8)], ids=str
)
def test_onnx_runtime_reads_stored_weights_in_one_kernel(rank, fmt, bits, tmp_path):
    program, x = block(rank)
    stored = quantize(program, dataset=[x], config=PTQConfig(format=fmt))
    model = to_onnx(stored)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == 21
    kinds = [onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.INT8]
    matrices = [i for i in model.graph.initializer if i.data_type in kinds and i.dims[0] >= 64]
    assert len(matrices) == 3
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    RUNTIMES.get("onnxruntime")(tmp_path / "model.onnx", write_optimised=tmp_path / "optimised.onnx")
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    kernels = [n for n in nodes if n.op_type == "MatMulNBits"]
    assert len(kernels) == 3
    assert {a.i for n in kernels for a in n.attribute if a.name == "bits"} == {bits}


def test_a_mixture_keeps_each_layer_in_its_own_form():
    program, x = block(3)
    config = PTQConfig(format=Int4Weight(), layers={"up": Int8Static(), "down": Int8Dynamic()})
    stored = quantize(program, dataset=[x], config=config)
    ops = [n.op_type for n in to_onnx(stored).graph.node]
    assert ops.count("MatMulInteger") == 1
    assert ops.count("DynamicQuantizeLinear") == 1
    assert ops.count("QuantizeLinear") >= 1
    (found,) = compile_program(ENGINES.get("onnxruntime")(), stored)([x[:3]])
    with torch.no_grad():
        assert decibels(stored(x[:3]), found) > CLOSE["onnxruntime"]


@pytest.mark.parametrize("fmt", [Int4Weight(), Int8Dynamic(), Int8Weight()], ids=str)
def test_exported_files_agree_in_the_target_and_are_small(fmt, tmp_path):
    program, x = block(2)
    stored = quantize(program, dataset=[x], config=PTQConfig(format=fmt))
    report = export(stored, tmp_path / "model.onnx", dataset=[x])
    assert report.ok
    weights = sum(fmt.weight_bytes(o, i) for o, i in ((192, 128), (128, 192), (64, 128)))
    # Biases, the norm, scales that are repeated, and the graph itself.
    assert (tmp_path / "model.onnx").stat().st_size < weights * 1.1 + 8_000


def test_a_budget_of_bytes_is_met_by_what_stays_small():
    program, x = block(2)
    stored = quantize(program, bits=4, dataset=[x])
    assert floats_of_groups(stored) == 4 * 57_344 - sum(
        Int4Weight().weight_bytes(o, i) for o, i in ((192, 128), (128, 192), (64, 128))
    )
    size = stored.parameters_bytes * 1.05 / 1e6
    found = optimize(
        stored, example_inputs=x, dataset=[x], budget=Budget(size_mb=size, accuracy_drop=1),
        engines=["onnxruntime", "executorch"], race=RaceConfig(rounds=8, cache=False),
    )  # fmt: skip
    assert (found.engine, found.precision) == ("onnxruntime", "int4")
    reasons = dict(found.report.skipped)
    assert "the budget is" in reasons["onnxruntime fp32"]
    if ENGINES.get("executorch")().unavailable() == "":
        assert "the budget is" in reasons["executorch int4"]


def test_rows_are_rounded_as_torch_does():
    q = torch.ops.quantized_decomposed
    x = torch.randn(200, 64) * torch.logspace(-4, 4, 200)[:, None] + torch.linspace(-3, 3, 200)[:, None]
    x[0] = 0
    scale, zero = q.choose_qparams_per_token_asymmetric(x, torch.int8)
    stored = q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    expected = q.dequantize_per_token(stored, scale, zero, -128, 127, torch.int8, torch.float32)
    found = _rounded_rows(x)
    # A number that lies between two steps may fall to either.
    assert ((found - expected).abs() < 0.01 * scale).float().mean() > 0.999
    assert ((found - expected).abs() < 1.01 * scale).all()


@pytest.mark.parametrize("fixed", [False, True], ids=["free batch", "fixed sizes"])
def test_every_static_layer_is_an_integer_kernel_in_onnxruntime(fixed, tmp_path):
    """With fixed sizes ONNX Runtime joins product and bias, and then wants the bias to be an integer as well."""
    torch.manual_seed(0)
    x = torch.randn(8, 5, 128)
    program = capture(Block(3).eval(), (x,), dynamic_shapes={} if fixed else None)
    engine, quantised = ENGINES.get("onnxruntime")(), quantize(program, dataset=[x])
    engine.build(quantised, tmp_path, quantised.precision)
    assert engine.integer_kernels(tmp_path) == 3
    found = engine.open(tmp_path, lambda: quantised)([x])[0]
    assert decibels(quantised(x), found) > CLOSE["onnxruntime"]


@pytest.mark.parametrize("dims", [1, 2])
def test_a_float_layer_between_integer_ones_keeps_its_weights_in_onnxruntime(dims, tmp_path):
    """ONNX Runtime by itself rounds such weights, with one scale for all output channels."""
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 4, 3), nn.ReLU()).eval()
    with torch.no_grad():
        # Channels of different size, of which one scale for all would lose the small ones.
        net[2].weight.mul_(torch.logspace(-2, 0, 8).reshape(-1, *[1] * (dims + 1)))
    x = torch.randn(4, 3, *[12] * dims)
    config = PTQConfig(layers={"2": Float32(), "4": Int8Static()})
    program = quantize(capture(net, (x,)), dataset=[x], config=config)
    engine = ENGINES.get("onnxruntime")()
    engine.build(program, tmp_path, program.precision)
    found = engine.open(tmp_path, lambda: program)([x])[0]
    assert decibels(program(x), found) > 80


def test_a_dead_channel_leaves_its_layer_an_integer_kernel_in_onnxruntime(tmp_path):
    """Its weights are so small that its bias is more of their steps than int32 holds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight[2].mul_(1e-12)
        net[0].bias[2] = 1.5
        net[0].bias[3] = -0.5
    x = torch.randn(4, 3, 12, 12)
    program = quantize(capture(net, (x,)), dataset=[x])
    engine = ENGINES.get("onnxruntime")()
    engine.build(program, tmp_path, program.precision)
    assert engine.integer_kernels(tmp_path) == 1, "the last one gives floats"
    found = engine.open(tmp_path, lambda: program)([x])[0]
    assert decibels(program(x), found) > CLOSE["onnxruntime"]
