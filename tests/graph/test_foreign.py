"""Foreign `.pt2` files, and `.dr1` files with the same graphs: tampered ones are refused and run nothing.

Every payload below writes a marker file when it runs. Each is first aimed at torch's own reader where that shows that
the payload is real.
"""

import copy
import io
import json
import pickle
import sys
import warnings
import zipfile

import pytest
import torch
from torch import nn

from deepseek_r1.core import ArtifactError, UnsafeFileError
from deepseek_r1.graph import Program, capture, load_pt2
from deepseek_r1.graph._checks import check_expression, check_tree, checked_graph

CODE = "__import__('pathlib').Path('MARK').touch()"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("lost", torch.ones(4), persistent=False)

    def forward(self, x, *, table=None):
        return {"y": self.linear(x) * self.lost + table["z"] * torch.tensor([2.0, 1, 1, 1])}


class Payload:
    """Unpickling it runs the code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (CODE.replace("MARK", str(self.marker)),)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net(), {"x": torch.randn(3, 4), "table": {"z": torch.randn(3, 4)}})


@pytest.fixture(scope="module")
def good(program, tmp_path_factory):
    """Entries of a good file without the archive's folder."""
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program.exported, path)
    with zipfile.ZipFile(path) as archive:
        return {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


@pytest.fixture
def marker(tmp_path):
    """A file that only a payload makes."""
    return tmp_path / "marker"


def written(parts, path, folder="model"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(f"{folder}/{name}", data)
    return path


def edited(parts, change):
    """The parts with the graph's JSON changed in place by `change`."""
    graph = json.loads(parts["models/model.json"])
    change(graph)
    return {**parts, "models/model.json": json.dumps(graph).encode()}


def refused(parts, tmp_path, marker, error=UnsafeFileError, match=None):
    path = written(parts, tmp_path / "bad.pt2")
    with pytest.raises(error, match=match) as caught:
        program = load_pt2(path)
        # Whatever gets through must at least run nothing when it is used.
        program(x=torch.ones(2, 4), table={"z": torch.ones(2, 4)})
    assert not marker.exists(), "the payload ran"
    assert "bad.pt2" in str(caught.value)


def test_a_good_file_loads_and_is_the_same(program, good, tmp_path):
    back = load_pt2(written(good, tmp_path / "fine.pt2"))
    assert back.name == "fine"
    for batch in (0, 1, 5):
        inputs = {"x": torch.randn(batch, 4), "table": {"z": torch.randn(batch, 4)}}
        assert torch.equal(back(**inputs)["y"], program(**inputs)["y"])
    assert back.content_hash() == program.content_hash()
    again = Program.load(back.save(tmp_path / "again.dr1"))
    assert again.content_hash() == program.content_hash()


def test_tied_and_pickled_weights_of_a_good_file(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    program = capture(net, torch.randn(2, 4))
    path = tmp_path / "tied.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program.exported, path)
    x = torch.randn(3, 4)
    assert torch.equal(load_pt2(path)(x), net(x))


# --- pickles -----------------------------------------------------------------------------------------------------


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickled_weight(parts, data):
    """The first weight turned into a pickled one."""
    name = "data/weights/model_weights_config.json"
    config = json.loads(parts[name])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    return {**parts, name: json.dumps(config).encode(), f"data/weights/{entry['path_name']}": data}


def test_a_pickled_weight_with_code(good, tmp_path, marker):
    for data in (torch_saved(Payload(marker)), pickle.dumps(Payload(marker)), torch_saved([Payload(marker)])):
        refused(with_pickled_weight(good, data), tmp_path, marker, match="restricted unpickler")


def test_a_pickled_weight_that_is_no_tensor(good, tmp_path, marker):
    refused(with_pickled_weight(good, torch_saved({"a": 1})), tmp_path, marker, match="no tensor")


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: ((p,), {}), lambda p: ((), {"x": p})])
def test_sample_inputs_with_code(good, tmp_path, marker, wrap):
    parts = {**good, "data/sample_inputs/model.pt": torch_saved(wrap(Payload(marker)))}
    refused(parts, tmp_path, marker, match="restricted unpickler")


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_sample_inputs_that_hide_a_second_pickle(good, tmp_path, marker, kind):
    """torch takes bytes for a pickle of their own, and opens that without restriction when the safe way fails."""
    inner = kind(torch_saved(((Payload(marker),), {})))
    data = torch_saved(inner)
    assert type(torch.load(io.BytesIO(data), weights_only=True)) is kind, "the outer pickle passes the safe way"
    refused({**good, "data/sample_inputs/model.pt": data}, tmp_path, marker, match="example inputs")


@pytest.mark.parametrize("value", [None, (), {}, [(), {}], ((1,),), ((), {}, ()), ((torch.ones(1),), {})])
def test_sample_inputs_of_another_form(good, tmp_path, marker, value):
    parts = {**good, "data/sample_inputs/model.pt": torch_saved(value)}
    refused(parts, tmp_path, marker, ArtifactError, match="example inputs")


# --- operators ---------------------------------------------------------------------------------------------------

OPERATORS = [
    "torch.os.system", "torch.sys.exit", "torch.load", "torch.save", "torch.hub.load", "torch.ops.load_library",
    "torch.ops.aten.from_file.default", "torch.ops.aten.from_file", "torch.ops.aten.from_file.out",
    "torch.ops.aten.relu", "torch.ops.aten.relu.default.__call__", "torch.ops.aten.__class__.default",
    "torch.ops.higher_order.cond.__call__", "torch.ops.higher_order.print",
    "torch.ops.higher_order.triton_kernel_wrapper_functional",
    "torch.ops.inductor._reinterpret_tensor.default", "torch.ops.debugprims.load_tensor.default",
    "torch.ops.profiler._record_function_enter.default", "torch.ops.nowhere.op.default", "torch.ops.aten.relu.nope",
    "torch._C._jit_get_operation", "torch._C.PyTorchFileReader", "torch._dynamo.eval_frame.sys.modules", "torch",
    "_operator.attrgetter", "_operator.methodcaller", "_operator.call", "_operator.setitem", "operator.add", "math",
    "math.__loader__.load_module", "builtins.eval", "eval", "#ext:op", "", "torch.ops.aten.relu.default\nimport os",
    "torch.ops.\u0430ten.relu.default", "torch.sym_sum.__globals__", "_operator.getitem.__self__",
]  # fmt: skip


@pytest.mark.parametrize("target", OPERATORS)
def test_operators_that_are_not_allowed(good, tmp_path, marker, target):
    def change(graph):
        graph["graph_module"]["graph"]["nodes"][0]["target"] = target

    refused(edited(good, change), tmp_path, marker, match="the graph calls")


@pytest.mark.parametrize("hidden", ["as_operator", "nested", "metadata", "subgraph"])
def test_operators_hidden_among_the_arguments(good, tmp_path, marker, hidden):
    bad = {"as_operator": "torch.os.system"}
    node = {"target": "torch.os.system", "inputs": [], "outputs": [], "metadata": {}}
    inner = {
        "inputs": [],
        "outputs": [],
        "nodes": [node],
        "tensor_values": {},
        "sym_int_values": {},
        "sym_bool_values": {},
    }
    arguments = {
        "as_operator": bad,
        "nested": {"as_string_to_argument": {"a": bad}},
        "metadata": {"as_string_to_argument": {"metadata": bad}},
        "subgraph": {"as_string_to_argument": {"metadata": {"as_graph": {"name": "g", "graph": inner}}}},
    }

    def change(graph):
        graph["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = arguments[hidden]

    refused(edited(good, change), tmp_path, marker, match=r"the graph calls 'torch\.os\.system'")


def test_a_registered_operator_of_a_user_is_allowed_unless_it_takes_text(good):
    library = torch.library.Library("dr1test", "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.define("write(Tensor x, str path) -> Tensor")
        from deepseek_r1.graph import _checks

        _checks._registered.cache_clear()
        graph = json.loads(good["models/model.json"])
        node = graph["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.dr1test.twice.default"
        checked_graph(json.dumps(graph).encode(), "here")
        node["target"] = "torch.ops.dr1test.write.default"
        with pytest.raises(UnsafeFileError, match="not an allowed operator"):
            checked_graph(json.dumps(graph).encode(), "here")
    finally:
        library._destroy()
        _checks._registered.cache_clear()


# --- expressions -------------------------------------------------------------------------------------------------


def wide(word):
    """The word in fullwidth letters."""
    return "".join(chr(ord(letter) + 0xFEE0) for letter in word)


EXPRESSIONS = [
    CODE, "__import__('os').system('touch x')", "s0.__class__", "s0 .func", "s0.\nfunc", "().__class__", "[s0]",
    "lambda: 0", "exec('1')", "eval", "open('x')", "print(s0)", "s0; import os", "Symbol('x').func", "Symbol(s0.name)",
    "Symbol('x', cls=eval)", "Symbol('x'+'y')", "Symbol(\"x\")", "os", "S('1')", "sympify('1')", "Lambda(s0, s0)",
    "s0 if s0 else s0", "x", "1e5j", "a" * 3000, "s0\\\n", "s0 # c", "f'{s0}'", "`s0`", "s0!",
    # Python reads these letters as ASCII ones.
    f"s0.{wide('func')}", f"{wide('eval')}(s0)", f"s0.{wide('expand')}()", wide("os"),
    # torch counts up to the number in a symbol's name.
    "u99999999999",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_that_are_no_arithmetic(text):
    with pytest.raises(UnsafeFileError, match="is not plain arithmetic"):
        check_expression(text, "here")


@pytest.mark.parametrize(
    "text",
    ["s77", "2*s0 + 1", "Symbol('s77', positive=True, integer=True)", "FloorDiv(s0, 2)", "Mod(s0 - 1, 3)", "s0**2",
     "Max(1, u0)", "Eq(s0, 4)", "(s0 + 1)//2", "CeilToInt(IntTrueDiv(s0, 3))", "-int_oo", "1.5*zf0"],
)  # fmt: skip
def test_expressions_that_are(text):
    check_expression(text, "here")


@pytest.mark.parametrize("text", [3, None, [], {}])
def test_expressions_that_are_no_text(text):
    with pytest.raises(UnsafeFileError, match="not text"):
        check_expression(text, "here")


def test_an_expression_with_code_is_real_for_torch_and_refused_here(good, tmp_path, marker):
    code = CODE.replace("MARK", str(marker))

    def change(graph):
        values = graph["graph_module"]["graph"]["tensor_values"]
        values["x"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 3}}}

    path = written(edited(good, change), tmp_path / "real.pt2")
    with warnings.catch_warnings(), pytest.raises(Exception):  # noqa: B017  whatever torch says, it comes too late
        warnings.simplefilter("ignore")
        torch.export.load(path)
    assert marker.exists(), "torch's own reader runs it"
    marker.unlink()
    refused(edited(good, change), tmp_path, marker, match="not plain arithmetic")


@pytest.mark.parametrize("name", ["metadata", "expr_str", "nodes", "target", "as_string"])
def test_an_expression_under_a_value_with_a_misleading_name(good, tmp_path, marker, name):
    """Names of values are the file's to choose, so none of them may switch a check off."""
    code = CODE.replace("MARK", str(marker))

    def change(graph):
        inner = graph["graph_module"]["graph"]
        meta = copy.deepcopy(inner["tensor_values"].pop("x"))
        meta["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 3}}}
        inner["tensor_values"][name] = meta
        text = json.dumps(inner).replace('{"name": "x"}', json.dumps({"name": name}))
        graph["graph_module"]["graph"] = json.loads(text)

    refused(edited(good, change), tmp_path, marker, match="not plain arithmetic")


def test_keys_of_the_ranges_and_guards(good, tmp_path, marker):
    code = CODE.replace("MARK", str(marker))

    def ranges(graph):
        graph["range_constraints"][code] = {"min_val": 0, "max_val": 3}

    refused(edited(good, ranges), tmp_path, marker, match="not plain arithmetic")

    def guards(graph):
        graph["guards_code"] = [code]
        graph["graph_module"]["metadata"] = {"custom": code}
        for node in graph["graph_module"]["graph"]["nodes"]:
            node["metadata"] = {"source_fn_stack": f"a,torch.os.{code}", "stack_trace": f"\n{code}\n", "custom": code}

    program = load_pt2(written(edited(good, guards), tmp_path / "guards.pt2"))
    program(x=torch.ones(2, 4), table={"z": torch.ones(2, 4)})
    assert program.exported._guards_code == []
    assert not marker.exists()


# --- names that torch writes into source ---------------------------------------------------------------------------


def test_names_of_values_with_code(good, tmp_path, marker):
    code = f"x={CODE.replace('MARK', str(marker))}"

    def change(graph):
        text = json.dumps(graph).replace('"name": "x"', f'"name": {json.dumps(code)}')
        graph.clear()
        graph.update(json.loads(text))
        values = graph["graph_module"]["graph"]["tensor_values"]
        values[code] = values.pop("x")

    refused(edited(good, change), tmp_path, marker, match="where a plain name must")


@pytest.mark.parametrize("where", ["arguments", "keyword", "output", "node", "weight", "module", "symbol", "trace"])
def test_other_names_with_code(good, tmp_path, marker, where):
    code = f"a={CODE.replace('MARK', str(marker))}"

    def change(graph):
        module = graph["graph_module"]
        signature = module["module_call_graph"][0]["signature"]
        first = module["graph"]["nodes"][0]
        if where == "arguments":
            signature["forward_arg_names"] = [code]
        elif where == "keyword":
            tree = json.loads(signature["in_spec"])
            tree[1]["children_spec"][1]["context"] = json.dumps([code, "table"])
            signature["in_spec"] = json.dumps(tree)
            signature["forward_arg_names"] = None
        elif where == "output":
            first["outputs"][0]["as_tensor"]["name"] = code
        elif where == "node":
            first["name"] = code
        elif where == "weight":
            spec = next(s for s in module["signature"]["input_specs"] if "parameter" in s)
            spec["parameter"]["parameter_name"] = f'linear.a") or {code} or ("'
        elif where == "module":
            module["module_call_graph"][0]["fqn"] = f'"{code}'
        elif where == "symbol":
            module["graph"]["sym_int_values"][code] = {"as_int": 3}
        else:
            first["metadata"] = {"nn_module_stack": f"a,b,c\n{code}"}

    refused(edited(good, change), tmp_path, marker)


def test_keyword_names_of_higher_order_operators(good, tmp_path, marker):
    code = f"a={CODE.replace('MARK', str(marker))}, b"

    def change(graph):
        node = graph["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.higher_order.cond"
        node["inputs"] = [{"name": code, "arg": {"as_int": 1}, "kind": 2}]

    refused(edited(good, change), tmp_path, marker, match="where a plain name must")


# --- nests ---------------------------------------------------------------------------------------------------------


def nest(kind, context, children=()):
    return {"type": kind, "context": context, "children_spec": list(children)}


FACTORY = {"default_factory_module": "evil_module", "default_factory_name": "f", "dict_context": []}
ENUM = {"__enum__": True, "fqn": "evil_module:Kind", "name": "A"}
NESTS = [
    nest("collections.defaultdict", FACTORY),
    nest("collections.defaultdict", json.dumps(FACTORY)),
    nest("builtins.dict", json.dumps(ENUM)),
    nest("builtins.dict", json.dumps([ENUM])),
    nest("builtins.dict", json.dumps(ENUM).replace("__enum__", "\\u005f_enum__")),
    nest("builtins.dict", ENUM),
    nest("builtins.list", json.dumps([[ENUM]])),
    nest("torch.Size", json.dumps(ENUM)),
    nest(None, json.dumps(ENUM)),
    nest("nobody.registered.this", "null"),
]


@pytest.mark.parametrize("evil", NESTS)
@pytest.mark.parametrize("field", ["in_spec", "out_spec"])
def test_nests_that_import_modules(good, tmp_path, marker, monkeypatch, evil, field):
    (tmp_path / "evil_module.py").write_text(CODE.replace("MARK", str(marker)))
    monkeypatch.syspath_prepend(tmp_path)

    def change(graph):
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        tree = json.loads(signature[field])
        tree[1]["children_spec"].append(evil)
        signature[field] = json.dumps(tree)

    refused(edited(good, change), tmp_path, marker, match="nested inputs of type")
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[1, 3]", '[1, {"type": null}]', "null", "[" * 10_000, None, 3])
def test_nests_that_are_damaged(text):
    with pytest.raises(ArtifactError, match="damaged"):
        check_tree(text, "here")


# --- objects and entries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["values", "argument", "input", "spec"])
def test_custom_objects(good, tmp_path, marker, where):
    thing = {"name": "x", "class_fqn": "__torch__.evil"}

    def change(graph):
        module = graph["graph_module"]
        if where == "values":
            module["graph"]["custom_obj_values"] = {"x": thing}
        elif where == "argument":
            module["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_custom_obj": thing}
        elif where == "input":
            module["graph"]["inputs"][0] = {"as_custom_obj": thing}
        else:
            module["signature"]["input_specs"][0] = {"custom_obj": {"arg": thing, "custom_obj_name": "x"}}

    refused(edited(good, change), tmp_path, marker, match="holds a custom object")


@pytest.mark.parametrize(
    "name",
    ["data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/a.so", "evil.so", "../evil",
     "../../etc/passwd", "models/../../x.json", "data/weights/weight_0/../../x", "code/a.py", "data.pkl", "/abs"],
)  # fmt: skip
def test_entries_that_a_graph_does_not_need(good, tmp_path, marker, name):
    refused(
        {**good, name: pickle.dumps(Payload(marker))}, tmp_path, marker, match="which a captured graph does not need"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive_format": b"zip"}, "no .pt2 file"),
        ({"models/model.json": b"{"}, "damaged"),
        ({"models/model.json": b"{}"}, "not one that torch.export wrote"),
        ({"models/other.json": b"{}"}, "holds 2 graphs"),
        ({"data/weights/model_weights_config.json": b"{}"}, "damaged"),
        ({"data/weights/weight_0": b"abc"}, "damaged"),
        ({"data/weights/weight_0": b""}, "damaged"),
        ({"data/sample_inputs/model.pt": b""}, "restricted unpickler"),
        ({"serialized_exported_program.json": b"{}"}, "layout of an old torch"),
    ],
)
def test_damaged_and_old_files(good, tmp_path, marker, change, message):
    refused({**good, **change}, tmp_path, marker, ArtifactError, match=message)


def test_files_that_are_truncated_compressed_or_absent(good, tmp_path):
    path = written(good, tmp_path / "cut.pt2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"cut\.pt2 is truncated or damaged"):
        load_pt2(path)
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/models/model.json", bytes(10**7))
    with pytest.raises(ArtifactError, match="is compressed"):
        load_pt2(tmp_path / "bomb.pt2")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_pt2(tmp_path / "absent.pt2")


def test_weights_that_point_outside_their_bytes(good, tmp_path, marker):
    for field, value in (("sizes", 10**6), ("strides", 10**6), ("storage_offset", 10**6), ("sizes", -1)):
        name = "data/weights/model_weights_config.json"
        config = json.loads(good[name])
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta[field] = {"as_int": value} if field == "storage_offset" else [{"as_int": value} for _ in meta[field]]
        refused({**good, name: json.dumps(config).encode()}, tmp_path, marker, ArtifactError, match="damaged")


# --- the same graphs in our own container ----------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["operator", "expression", "name", "metadata", "nest", "tree"])
def test_our_own_files_are_checked_alike(program, tmp_path, marker, monkeypatch, attack):
    (tmp_path / "evil_module.py").write_text(CODE.replace("MARK", str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    code = CODE.replace("MARK", str(marker))
    path = program.save(tmp_path / "bad.dr1")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    graph, about = json.loads(parts["graph.json"]), json.loads(parts["program.json"])
    inner = graph["graph_module"]["graph"]
    if attack == "operator":
        inner["nodes"][0]["target"] = "torch.os.system"
    elif attack == "expression":
        inner["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 3}}}
    elif attack == "metadata":
        meta = {**inner["tensor_values"]["x"], "sizes": [{"as_expr": {"expr_str": code, "hint": None}}]}
        inner["tensor_values"]["metadata"] = meta
    elif attack == "name":
        inner["nodes"][0]["name"] = code
    elif attack == "nest":
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, nest("builtins.dict", json.dumps(ENUM))])
    else:
        about["tree"] = json.dumps([1, nest("collections.defaultdict", FACTORY)])
    parts |= {"graph.json": json.dumps(graph).encode(), "program.json": json.dumps(about).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(UnsafeFileError, match=r"bad\.dr1"):
        Program.load(path)
    assert not marker.exists()
    assert "evil_module" not in sys.modules
