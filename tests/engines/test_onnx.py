"""Programs as ONNX: names, integer kernels, nothing of the user's machine left in the file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from deepseek_r1 import deploy, runtime
from deepseek_r1.core import Report, UnsupportedOpError
from deepseek_r1.engines import ENGINES, Executable, compile_program, to_onnx
from deepseek_r1.engines._onnx_integer import retarget
from deepseek_r1.graph import capture, simplify
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import quantize
from deepseek_r1.runtime import RUNTIMES


def activations(model):
    """Types of the zero points of all pairs whose input is computed."""
    constants = {i.name: i for i in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [numpy_helper.to_array(constants[n.input[2]]).dtype for n in pairs if n.input[0] not in constants]


def session(model, **options):
    return RUNTIMES.get("onnxruntime")(model.SerializeToString(), **options)


def optimised(model, folder):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


def test_activations_are_unsigned_everywhere(quantised):
    found = activations(to_onnx(quantised))
    assert len(found) > 10
    assert set(found) == {np.dtype("uint8")}


def test_every_convolution_becomes_an_integer_kernel(quantised, tmp_path):
    kinds = optimised(to_onnx(quantised), tmp_path)
    assert kinds.count("QLinearConv") == 4
    assert "Conv" not in kinds
    assert "FusedConv" not in kinds
    assert kinds.count("QLinearAdd") + kinds.count("Add") == 2


def test_digits_too(tmp_path):
    torch.manual_seed(0)
    net = DigitsNet(width=8)
    kinds = optimised(to_onnx(quantize(net, dataset=[torch.randn(32, 1, 8, 8)])), tmp_path)
    assert kinds.count("QLinearConv") == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert "Conv" not in kinds


def test_linear_layers_become_integer_kernels(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    kinds = optimised(to_onnx(quantize(net, dataset=[torch.randn(64, 16)])), tmp_path)
    assert not {"Gemm", "MatMul"} & set(kinds), kinds


def test_retarget_is_exact(quantised, monkeypatch):
    """The same graph before the shift, and after: the same answers up to one step of the last scale."""
    from deepseek_r1.engines import _onnx

    with monkeypatch.context() as patch:
        patch.setattr(_onnx, "retarget", lambda model: 0)
        before = to_onnx(quantised)
    assert set(activations(before)) == {np.dtype("int8")}
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert retarget(after) == len(activations(before))
    assert retarget(after) == 0, "a second time there is nothing to do"
    x = {"x": np.random.default_rng(0).normal(size=(8, 3, 10, 10)).astype(np.float32)}
    a, b = session(before).run(x)[0], session(after).run(x)[0]
    assert np.abs(a - b).max() <= 0.02 * np.abs(a).max()
    with torch.no_grad():
        program = quantised(torch.from_numpy(x["x"])).numpy()
    assert np.abs(b - program).max() <= 0.05 * np.abs(program).max()


def test_the_shift_alone_changes_nothing():
    """QuantizeLinear and back, int8 against uint8, over every stored value and beyond."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    constants = [numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.int8(-100), "z")]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    feeds = {"x": np.linspace(-10, 15, 4001).astype(np.float32)}
    before = session(model).run(feeds)[0]
    assert retarget(model) == 2
    onnx.checker.check_model(model)
    assert np.array_equal(before, session(model).run(feeds)[0])
    assert [i.name for i in model.graph.initializer] == ["s", "z_u8"]


def test_names_of_inputs_outputs_and_sizes():
    class Two(nn.Module):
        def forward(self, ids, *, mask):
            return {"sum": ids + mask, "pair": (ids * 2, mask * 2)}

    axes = {0: "batch", 1: "sequence"}
    inputs = {"ids": torch.randn(2, 3), "mask": torch.randn(2, 3)}
    model = to_onnx(capture(Two(), inputs, dynamic_shapes={"ids": axes, "mask": axes}))
    assert [i.name for i in model.graph.input] == ["ids", "mask"]
    assert [o.name for o in model.graph.output] == ["output_0", "output_1", "output_2"]
    dims = [[d.dim_param for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)]
    assert {d[0] for d in dims} == {"batch"}
    assert {d[1] for d in dims} == {"dim_1"}
    single = to_onnx(capture(nn.Linear(3, 2), torch.randn(2, 3)))
    assert [o.name for o in single.graph.output] == ["output"]
    assert [d.dim_param or d.dim_value for d in single.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3]


def test_nothing_of_the_users_machine_is_left(quantised, residual):
    for program in (quantised, quantised.parent, residual):
        data = to_onnx(program).SerializeToString()
        for word in (b"test_onnx", b"/work", b"/home", b"site-packages", b"forward", b"File ", b".py"):
            assert word not in data, word


def test_outputs_that_are_repeated_or_inputs_or_weights():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(3.0))

        def forward(self, x, unused, flag):
            y = x + 1
            return (y, None, y, x, self.table) if flag else y

    program = capture(Odd(), (torch.randn(2, 3), torch.randn(2, 3), True))
    model = to_onnx(program)
    onnx.checker.check_model(model)
    x = np.ones((4, 3), np.float32)
    feeds = {n: x for n in ("x", "unused") if n in [i.name for i in model.graph.input]}
    outputs = session(model).run(feeds)
    expected = [v for v in program(torch.ones(4, 3), torch.ones(4, 3), True) if isinstance(v, torch.Tensor)]
    assert len(outputs) == len(expected) == 4
    for a, b in zip(outputs, expected):
        assert np.array_equal(a, b.detach().numpy())


def test_what_has_no_onnx_form_is_named():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(UnsupportedOpError, match=r"'Spectrum' has no ONNX form: .*svd"):
        to_onnx(capture(Spectrum(), torch.randn(2, 3, 3)))


def test_outputs_that_are_no_tensors_are_refused():
    class Plain(nn.Module):
        def forward(self, x):
            return x + 1, 7

    with pytest.raises(UnsupportedOpError, match=r"'Plain' gives \[7\] beside its tensors"):
        to_onnx(capture(Plain(), torch.randn(2, 3)))


def test_models_that_are_too_large_are_refused(monkeypatch):
    from deepseek_r1.engines import _onnx

    monkeypatch.setattr(_onnx, "_LIMIT_BYTES", 10)
    with pytest.raises(UnsupportedOpError, match="an ONNX file holds at most 2"):
        to_onnx(capture(nn.Linear(3, 2), torch.randn(2, 3)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_stay_one_operator_of_any_length(kind):
    net = getattr(torch.nn, kind)(3, 5, batch_first=True).eval()
    program = capture(net, torch.randn(2, 6, 3))
    run = compile_program(ENGINES.get("onnxruntime")(), program)
    for shape in ((2, 6, 3), (1, 1, 3), (4, 11, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(run([x])[0], net(x)[0], rtol=1e-4, atol=1e-5)
    assert kind in {node.op_type for node in to_onnx(program).graph.node}


@pytest.mark.parametrize("name", ["inductor", "executorch"])
def test_engines_that_unroll_recurrent_layers_take_a_fixed_length_only(name):
    engine, net, x = ENGINES.get(name)(), torch.nn.GRU(3, 5, batch_first=True).eval(), torch.randn(2, 6, 3)
    assert "runs over a length that varies" in engine.unsupported(capture(net, x))
    assert engine.unsupported(capture(net, x, dynamic_shapes={"input": {0: "batch"}})) == ""


class Words(nn.Module):
    """Two linear layers that read one value, one behind them without a bias, and one on rows only."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        return self.head((y + x).mean(1))


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    return quantize(Words(), dataset=[torch.randn(16, 5, 8)])


def test_activations_that_are_quantised_at_run_time(words):
    model = to_onnx(words, precision="int8-dynamic")
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulInteger") == 4
    assert kinds.count("DynamicQuantizeLinear") == 3, "two layers share one"
    assert not {"QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm"} & set(kinds)
    assert not any("dequantize" in i.name for i in model.graph.initializer)
    engine = ENGINES.get("onnxruntime")()
    assert engine.precisions(words) == ["int8", "int8-dynamic"]
    assert engine.precisions(words.parent) == ["fp32"]
    x = torch.randn(7, 9, 8)
    wanted = words.parent(x).detach()
    static, dynamic = (compile_program(engine, words, p)([x])[0] for p in engine.precisions(words))
    errors = [float((y - wanted).norm() / wanted.norm()) for y in (static, dynamic)]
    assert errors[1] < errors[0] < 0.2


def test_convolutions_keep_their_fixed_ranges(quantised):
    assert ENGINES.get("onnxruntime")().precisions(quantised) == ["int8"]


def test_the_run_time_form_is_what_is_shipped(words, tmp_path):
    engine = ENGINES.get("onnxruntime")()
    fast = Executable(
        words, "onnxruntime", compile_program(engine, words, "int8-dynamic"), Report("fast"), precision="int8-dynamic"
    )
    deploy.export(fast, tmp_path / "words")
    shipped = runtime.load(tmp_path / "words")
    assert shipped.manifest.precision == "int8-dynamic"
    x = torch.randn(3, 5, 8)
    np.testing.assert_allclose(shipped(x.numpy()), fast(x).numpy(), atol=1e-6)


class Biased(nn.Module):
    """Self-attention with a learned bias, one for all of the batch, as T5 and Swin have it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.slope = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        far = torch.arange(x.shape[1])
        bias = -(far[:, None] - far).abs().to(x.dtype) * self.slope[:, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.out(y.transpose(1, 2).contiguous().reshape(*x.shape[:2], -1).contiguous())


@pytest.mark.parametrize("is_simple", [False, True])
def test_attention_with_a_learned_bias(is_simple):
    torch.manual_seed(0)
    net = Biased().eval()
    program = capture(net, torch.randn(2, 7, 16))
    run = compile_program(ENGINES.get("onnxruntime")(), simplify(program) if is_simple else program)
    for shape in ((2, 7), (1, 1), (5, 12)):
        x = torch.randn(*shape, 16)
        torch.testing.assert_close(run([x])[0], net(x), rtol=1e-4, atol=1e-5)
