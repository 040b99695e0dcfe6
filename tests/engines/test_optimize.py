"""`optimize` and what it returns: who may win, what is reported, what is refused."""

import copy
import time

import pytest
import torch
from torch import nn

from deepseek_r1.core import Budget, CaptureError, CheckFailedError, ConfigError, InputError, PluginError
from deepseek_r1.engines import ENGINES, Executable, _rungs, compile_program, optimize
from deepseek_r1.engines._accuracy import judge
from deepseek_r1.engines._eager import EagerEngine, eager_runner
from deepseek_r1.graph import Program, capture
from deepseek_r1.measure import paired_turns
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import quantize


class Rival(EagerEngine):
    """Eager's answers with something done to them, faster or slower than eager."""

    name = "rival"
    change = staticmethod(lambda outputs: outputs)
    slow = 0.0
    calls = 0

    def open(self, folder, program):
        run = super().open(folder, program)
        kept = {}

        def call(leaves):
            type(self).calls += 1
            if self.slow:
                time.sleep(self.slow)
            # Remembering the answer makes a cheap rival that is surely faster.
            key = tuple((v.data_ptr(), tuple(v.shape)) for v in leaves)
            if key not in kept:
                kept[key] = (leaves, self.change(run(leaves)))
            return kept[key][1]

        return call


@pytest.fixture(autouse=True)
def _short_races(monkeypatch):
    """Fewer rounds: these tests are about who may win, by margins that few rounds show."""
    short = lambda turns, rounds, **_: paired_turns(turns, rounds=min(rounds, 12), max_seconds=0.5, pause_s=0)  # noqa: E731
    monkeypatch.setattr(_rungs, "paired_turns", short)


@pytest.fixture
def rival():
    """Registers a subclass of Rival with the given attributes."""
    names = []

    def register(name="rival", **attributes):
        ENGINES.register(name, type("Made", (Rival,), {"name": name, **attributes}))
        names.append(name)
        return name

    yield register
    for name in names:
        ENGINES.unregister(name)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


X = torch.randn(16, 64)


def reasons(executable):
    return dict(executable.report.skipped)


def test_a_right_and_faster_rival_wins(net, rival):
    fast = optimize(net, example_inputs=X, engines=[rival()])
    assert (fast.engine, fast.precision) == ("rival", "fp32")
    assert "chosen: rival fp32" in fast.report.notes
    assert fast.report["winner"].before == "eager fp32"
    assert fast.report["latency, rival fp32"].after < fast.report["latency, rival fp32"].before
    torch.testing.assert_close(fast(X), net(X))
    assert "noise of the race" in fast.report.facts


def test_a_wrong_rival_never_wins_and_is_reported(net, rival):
    fast = optimize(net, example_inputs=X, engines=[rival(change=staticmethod(lambda o: [v + 1e-2 for v in o]))])
    assert fast.engine == "eager"
    assert reasons(fast)["rival fp32"].startswith("wrong: error")
    assert "chosen: eager, because no candidate was right and surely faster" in fast.report.notes
    torch.testing.assert_close(fast(X), net(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: [v * float("nan") for v in o], "wrong: error inf"),
        (lambda o: o + o, "wrong outputs: 1 reference outputs against 2"),
        (lambda o: [v[:1] for v in o], "wrong outputs: output 0: shape"),
        (lambda o: 1 / 0, "failed: ZeroDivisionError"),
        (lambda o: None, "failed: TypeError"),
    ],
)
def test_rivals_that_give_something_else(net, rival, change, message):
    fast = optimize(net, example_inputs=X, engines=[rival(change=staticmethod(change))])
    assert fast.engine == "eager"
    assert reasons(fast)["rival fp32"].startswith(message)


def test_a_rival_that_cannot_compile_or_run_costs_only_itself(net, rival):
    def refuse(self, program, folder, precision):
        raise MemoryError("no room")

    bad = rival("bad", build=refuse)
    absent = rival("absent", unavailable=lambda self: "no such chip")
    picky = rival("picky", unsupported=lambda self, program: "not this program")
    fast = optimize(net, example_inputs=X, engines=[bad, absent, picky, rival()])
    assert fast.engine == "rival"
    assert reasons(fast)["bad fp32"] == "compiling failed: MemoryError: no room"
    assert reasons(fast)["absent fp32"] == "no such chip"
    assert reasons(fast)["picky fp32"] == "not this program"


def test_a_rival_that_fails_in_the_middle_of_the_race(net, rival):
    def tired(self, folder, program):
        run, left = eager_runner(program()), [10]

        def call(leaves):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("tired")
            return run(leaves)

        return call

    fast = optimize(net, example_inputs=X, engines=[rival("tired", open=tired), rival()])
    assert fast.engine == "rival"
    assert reasons(fast)["tired fp32"] == "failed: RuntimeError: tired"


def test_a_slow_rival_does_not_win(net, rival):
    fast = optimize(net, example_inputs=X, engines=[rival(slow=0.003)])
    assert fast.engine == "eager"
    assert reasons(fast)["rival fp32"].startswith("not surely faster than eager")
    assert "latency, rival fp32" in fast.report


def test_the_null_engine_races_only_when_named_and_is_wrong(net):
    fast = optimize(net, example_inputs=X, engines="null")
    assert fast.engine == "eager"
    assert reasons(fast)["null fp32"].startswith("wrong")


def test_a_program_and_a_module_and_keywords(net, rival):
    name = rival()
    program = capture(net, X)
    assert optimize(program, engines=[name]).program is program
    assert optimize(program, example_inputs=X[:1], engines=[name])(X[:3]).shape == (3, 10)
    fast = optimize(net, example_inputs={"input": X}, engines=[name])
    torch.testing.assert_close(fast(input=X), net(X))
    fast = optimize(net, dataset=[(X, torch.zeros(16, dtype=torch.int64))], engines=[name])
    torch.testing.assert_close(fast(X), net(X))


def test_capture_waits_for_the_first_call(net, rival):
    fast = optimize(net, engines=[rival()])
    assert repr(fast) == "Executable(not captured yet, engine='eager')"
    with pytest.raises(InputError, match="nothing was captured yet"):
        _ = fast.program
    torch.testing.assert_close(fast(X[:1]), net(X[:1]))
    assert fast.engine == "rival"
    assert "chosen: rival fp32" in fast.report.notes
    program = fast.program
    torch.testing.assert_close(fast(X), net(X))
    assert fast.program is program, "captured once"


def test_the_dynamic_method_keeps_eager_and_captures_nothing():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, sign=1):
            return {"y": self.drop(x)} if x.sum() > 0 else -x * sign

    net = Branch().train()
    with pytest.raises(CaptureError, match="method='dynamic'"):
        optimize(net, example_inputs=X)
    kept = optimize(net, method="dynamic", example_inputs=X)
    assert torch.equal(kept(torch.ones(2, 2))["y"], torch.ones(2, 2)), "evaluation mode, as everywhere"
    assert torch.equal(kept(-torch.ones(2, 2), sign=2), torch.full((2, 2), 2.0))
    assert net.training
    assert (kept.engine, kept.precision) == ("eager", "fp32")
    assert any("dynamic" in note for note in kept.report.notes)
    with pytest.raises(InputError, match="captures nothing"):
        _ = kept.program
    assert "Branch as it is" in repr(kept)
    assert optimize(capture(nn.Linear(4, 2), torch.randn(2, 4)), method="dynamic").engine == "eager"


def test_wrong_use(net):
    with pytest.raises(ConfigError, match='"static" or "dynamic" is needed'):
        optimize(net, method="fast", example_inputs=X)
    with pytest.raises(PluginError, match=r"unknown engine 'onnxruntme'. Did you mean 'onnxruntime'\?"):
        optimize(net, example_inputs=X, engines=["onnxruntme"])
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module or a Program, given function"):
        optimize(lambda x: x, example_inputs=X)
    with pytest.raises(InputError, match="the dataset is empty"):
        optimize(net, example_inputs=X, dataset=[])
    with pytest.raises(InputError, match="the example inputs do not fit"):
        optimize(capture(net, X), example_inputs=torch.randn(2, 3))
    with pytest.raises(InputError, match="dataset: input 0"):
        optimize(net, example_inputs=X, dataset=[torch.randn(2, 3)])


def test_results_keep_their_form(rival):
    class Many(nn.Module):
        def forward(self, x, table):
            return {"a": x + 1, "none": None, "deep": (x * 2, [x.sum(-1), 3]), "b": x + 1}

    for engines in (["onnxruntime"], [rival()]):
        fast = optimize(Many(), example_inputs=(X, {"t": X}), engines=engines)
        got, want = fast(X, {"t": X}), Many()(X, {"t": X})
        assert list(got) == list(want)
        assert got["none"] is None
        assert isinstance(got["deep"], tuple)
        assert got["deep"][1][1] == 3
        torch.testing.assert_close([got["a"], got["deep"][0], got["deep"][1][0]], [X + 1, X * 2, X.sum(-1)])


def test_inputs_that_do_not_fit_are_input_errors(net, rival):
    for engines in (["onnxruntime"], [rival()], []):
        fast = optimize(net, example_inputs=X, engines=engines)
        for bad in ((torch.randn(2, 3),), (X.double(),), (X, X), (), (X.numpy(),)):
            with pytest.raises(InputError):
                fast(*bad)
        with pytest.raises(InputError):
            fast(x=X)
        assert fast(X[:0]).shape == (0, 10)


# --- weights that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [["onnxruntime"], []])
@pytest.mark.parametrize("how", ["in place", "step", "load", "data"])
def test_changed_weights_are_noticed(net, engines, how):
    mine = copy.deepcopy(net)
    fast = optimize(mine, example_inputs=X, engines=engines)
    if engines and fast.engine != "onnxruntime":
        # The race may be lost on a busy machine; what is tested here is what a winner does.
        program = fast.program
        watch = list(program.exported.state_dict.values())
        runner = compile_program(ENGINES.get("onnxruntime")(), program)
        fast = Executable(program, "onnxruntime", runner, fast.report, watch=watch)
    before = fast(X)
    if how == "in place":
        with torch.no_grad():
            mine[0].weight.mul_(1.5)
    elif how == "step":
        optimizer = torch.optim.AdamW(mine.parameters(), lr=0.1)
        mine(X).sum().backward()
        optimizer.step()
    elif how == "load":
        mine.load_state_dict({k: v + 0.1 for k, v in mine.state_dict().items()})
    else:
        mine[0].weight.data = mine[0].weight.data * 2
    after = fast(X)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, mine(X), rtol=1e-4, atol=1e-5)
    notes = [n for n in fast.report.notes if "compiled again" in n]
    assert len(notes) == (fast.engine == "onnxruntime")
    fast(X)
    assert len([n for n in fast.report.notes if "compiled again" in n]) == len(notes), "once is enough"


def test_changed_buffers_that_are_not_saved_are_noticed():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(3), persistent=False)

        def forward(self, x):
            time.sleep(2e-3)  # what the captured graph does not do, so that it wins
            return x + self.shift

    net = Shift()
    program = capture(net, torch.randn(2, 3))
    stores = {**program.exported.constants, **program.exported.state_dict}
    run = compile_program(ENGINES.get("onnxruntime")(), program)
    assert torch.equal(run([torch.zeros(1, 3)])[0], torch.zeros(1, 3))
    ENGINES.register("again", type("Again", (Rival,), {"name": "again"}))
    try:
        fast = optimize(net, example_inputs=torch.randn(2, 3), engines=["again"])
        assert fast.engine == "again"
        assert len(fast._watch) == len(stores) == 1
        net.shift.add_(1)
        assert torch.equal(fast(torch.zeros(1, 3)), torch.ones(1, 3))
    finally:
        ENGINES.unregister("again")


# --- lower precisions and budgets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return quantize(net, dataset=[torch.randn(256, 64)])


def labelled(program, n=512):
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(3))
    return [(x, program(x).argmax(-1))]


def test_int8_without_a_dataset_is_not_chosen(int8, rival):
    fast = optimize(int8, engines=[rival()])
    assert fast.precision == "fp32"
    assert "no dataset to check its accuracy on" in reasons(fast)["rival int8"]
    assert "no dataset" in reasons(fast)["rival int8"]


def test_int8_that_keeps_the_accuracy_may_win(int8, rival):
    name = rival(unsupported=lambda self, program: "" if program.precision == "int8" else "int8 only")
    fast = optimize(int8, dataset=labelled(int8.parent), budget=Budget(accuracy_drop=0.05), engines=[name])
    assert (fast.engine, fast.precision) == (name, "int8")
    assert fast.report["accuracy, rival int8"].before == 1.0
    assert "accuracy on 512 labels" in fast.report["accuracy, rival int8"].how


def test_int8_that_loses_accuracy_is_refused(int8, rival):
    spoil = staticmethod(lambda outputs: [v.flip(-1) for v in outputs])
    name = rival(change=spoil, unsupported=lambda self, program: "" if program.precision == "int8" else "int8 only")
    fast = optimize(int8, dataset=labelled(int8.parent), engines=[name])
    assert fast.precision == "fp32"
    assert reasons(fast)["rival int8"].startswith("loses ")
    assert "allowed 0.0050" in reasons(fast)["rival int8"]


def test_a_metric_that_is_no_number_is_a_loss(int8, rival):
    spoil = staticmethod(lambda outputs: [v * float("nan") for v in outputs])
    name = rival(change=spoil, unsupported=lambda self, program: "" if program.precision == "int8" else "int8 only")
    fast = optimize(int8, dataset=labelled(int8.parent), engines=[name])
    assert fast.precision == "fp32"
    assert "not finite" in reasons(fast)["rival int8"]


def test_a_single_number_is_judged_by_its_value(rival):
    """With one output per row the place of the largest is always the same, whatever the number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    program = quantize(net, dataset=[x])
    spoil = staticmethod(lambda outputs: [v * 0 for v in outputs])
    name = rival(change=spoil, unsupported=lambda self, program: "" if program.precision == "int8" else "int8 only")
    fast = optimize(program, dataset=[(x, torch.randn(256, 1))], engines=[name])
    assert fast.precision == "fp32"
    assert reasons(fast)["rival int8"].startswith("loses ")
    honest = rival("honest", unsupported=lambda self, program: "" if program.precision == "int8" else "int8 only")
    fast = optimize(program, dataset=[(x, torch.randn(256, 1))], engines=[honest])
    assert fast.report["accuracy, honest int8"].after > 0.995
    assert "explained variance" in fast.report["accuracy, honest int8"].how


def test_the_first_output_is_judged_by_the_kind_of_labels():
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1]])
    y = torch.tensor([1, 1, 1])
    (score,) = judge([[logits]], [[logits]], [y])
    assert (score.value, score.how) == (pytest.approx(2 / 3), "accuracy on 3 labels")
    (score,) = judge([[logits]], [[logits.flip(0) * 2]], [None])
    assert (score.value, score.how) == (1.0, "agreement with the float model on 3 rows")
    # Quantities are judged by their worst column, whatever their largest entry is.
    values = torch.randn(50, 3)
    wrong = values.clone()
    wrong[:, 2] += 3
    (score,) = judge([[wrong]], [[values]], [torch.randn(50, 3)])
    assert score.value < 0
    assert "worst of 3 column(s)" in score.how
    assert judge([[values]], [[values]], [torch.randn(50, 3)])[0].value == 1.0
    # Maps of classes without labels are no rows of scores.
    maps = torch.randn(2, 3, 4, 4)
    assert "explained variance" in judge([[maps]], [[maps]], [None])[0].how


def test_the_kind_of_task_can_be_told():
    """Embeddings look like scores of classes, and scores along the last dimension like values."""
    values = torch.randn(50, 3)
    scaled = values * torch.tensor([1.0, 1.0, 1.5])
    assert "agreement" in judge([[scaled]], [[values]], [None])[0].how
    (score,) = judge([[scaled]], [[values]], [torch.zeros(50, dtype=torch.long)], "values")
    assert score.value == pytest.approx(0.75, abs=0.05)
    tokens = torch.randn(2, 5, 7)
    (score,) = judge([[tokens.flip(-1).flip(-1)]], [[tokens]], [None], "classes")
    assert (score.value, score.how) == (1.0, "agreement with the float model on 10 rows")


@pytest.mark.parametrize(
    ("samples", "drop", "allowed"), [(128, 0.005, 1 / 128), (64, 0.005, 0.005), (1000, 0.005, 0.005), (128, 0.0, 0)]
)
def test_what_is_counted_may_lose_one_sample(samples, drop, allowed):
    logits = torch.eye(2)[torch.randint(0, 2, (samples,))]
    (score,) = judge([[logits]], [[logits]], [None])
    assert score.allowed(drop) == pytest.approx(allowed)
    (values,) = judge([[logits]], [[logits]], [None], "values")
    assert values.allowed(drop) == drop


def test_every_output_is_judged():
    logits, value = torch.randn(40, 5), torch.randn(40, 1)
    labels = logits.argmax(1)
    first, second = judge([[logits, value + 1]], [[logits, value]], [labels])
    assert first.value == 1.0
    assert second.value < 0.5
    constant = torch.full((40, 1), 2.0)
    assert judge([[constant]], [[constant]], [None])[0].value == 1.0
    assert judge([[constant * 1.5]], [[constant]], [None])[0].value < 0.8


def test_the_plain_module_is_what_a_rival_must_beat(rival):
    """Not the captured graph, which costs more to call: for a tiny layer nothing is faster than the layer itself."""
    net = torch.nn.Linear(4, 2).eval()
    fast = optimize(net, example_inputs=torch.randn(1, 4), engines=["eager", "onnxruntime"])
    assert fast.engine == "eager"
    assert fast._module is net


def test_budgets_that_cannot_be_met_fail_with_all_measurements(int8, net, rival):
    with pytest.raises(CheckFailedError, match=r"latency budget: .* ms, budget 1e-06 ms") as caught:
        optimize(net, example_inputs=X, budget=Budget(latency_ms=1e-6), engines=["onnxruntime"])
    assert "latency, onnxruntime fp32" in caught.value.report
    assert not caught.value.report.ok
    with pytest.raises(CheckFailedError, match=r"size budget: 0\.34 MB, budget 0\.001 MB"):
        optimize(net, example_inputs=X, budget=Budget(size_mb=0.001), engines=[rival()])
    assert optimize(net, example_inputs=X, budget=Budget(latency_ms=1e4, size_mb=10), engines=[]).report.ok


def test_a_memory_budget_is_measured_in_fresh_processes(net, rival):
    report = optimize(net, example_inputs=X, budget=Budget(memory_gb=8), engines=["onnxruntime"]).report
    assert report.ok
    assert 50 < report["peak memory, onnxruntime fp32"].after < 8000
    with pytest.raises(CheckFailedError, match=r"memory budget: 0\.\d+ GB, budget 0\.01 GB"):
        optimize(net, example_inputs=X, budget=Budget(memory_gb=0.01), engines=[])
    report = optimize(net, example_inputs=X, budget=Budget(memory_gb=8), engines=[name := rival()]).report
    assert "could not be measured" in dict(report.skipped)[f"{name} fp32"]


def test_a_size_that_only_int8_meets_is_met_by_int8(int8, rival):
    """Even if it is no faster: it is right, and float would break the budget."""
    limit = (int8.parameters_bytes + int8.parent.parameters_bytes) / 2e6
    name = rival(slow=0.002)
    budget = Budget(size_mb=limit, accuracy_drop=0.05)
    fast = optimize(int8, dataset=labelled(int8.parent), budget=budget, engines=[name])
    assert (fast.engine, fast.precision) == (name, "int8")
    assert "MB, the budget is" in reasons(fast)["rival fp32"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_executable_comes_back(net, int8, tmp_path):
    for model, options in ((net, {"example_inputs": X}), (int8, {"dataset": labelled(int8.parent)})):
        fast = optimize(model, engines=["onnxruntime", "openvino"], **options)
        where = fast.save(tmp_path / "saved")
        back = Executable.load(where)
        assert (back.engine, back.precision) == (fast.engine, fast.precision)
        torch.testing.assert_close(back(X), fast(X))
        assert back.report.to_dict() == fast.report.to_dict()
        assert sorted(f.name for f in where.iterdir()) == ["executable.json", "program.dr1", "report.json"]
    fast.save(where)


def test_saving_over_something_else_is_refused(net, tmp_path):
    fast = optimize(net, example_inputs=X, engines=[])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match="with other things in it"):
            fast.save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    fast.save(tmp_path / "empty")


def test_saved_executables_that_cannot_be_loaded(net, tmp_path, rival):
    fast = optimize(net, example_inputs=X, engines=[rival()])
    where = fast.save(tmp_path / "e")
    ENGINES.unregister("rival")
    try:
        with pytest.raises(PluginError, match="unknown engine 'rival'"):
            Executable.load(where)
    finally:
        ENGINES.register("rival", type("Made", (Rival,), {"name": "rival", "unavailable": lambda self: "no chip"}))
    with pytest.raises(PluginError, match="cannot run it here: no chip"):
        Executable.load(where)
    (where / "executable.json").write_text('{"schema_version": 9, "engine": "eager"}')
    with pytest.raises(ValueError, match="schema version 9"):
        Executable.load(where)
    for text in ("{", "[]", "{}", "3"):
        (where / "executable.json").write_text(text)
        with pytest.raises(ValueError, match="is no saved executable"):
            Executable.load(where)
    (where / "executable.json").write_text('{"schema_version": 1, "engine": "eager"}')
    (where / "report.json").write_text('{"schema_version": 1, "rows": 3}')
    with pytest.raises(ValueError, match="report"):
        Executable.load(where)
    (where / "program.dr1").write_bytes(b"")
    with pytest.raises(ValueError, match=r"program\.dr1"):
        Executable.load(where)
    with pytest.raises(ValueError, match="is no saved executable"):
        Executable.load(tmp_path / "absent")


def test_a_residual_network_on_the_real_engines():
    torch.manual_seed(0)
    net = DigitsNet(width=8).eval()
    fast = optimize(net, example_inputs=torch.randn(4, 1, 8, 8))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert fast.engine in ENGINES.names()
    assert not any("null" in name for name in reasons(fast))
    assert isinstance(fast.program, Program)
