"""`advise_finetune`: the choice by samples, its correction by memory, and the formulas against real layers."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, Hardware, InputError, Report
from deepseek_r1.core.hardware import Gpu
from deepseek_r1.lora import advise_finetune, get_peft_model
from deepseek_r1.lora._memory import estimate, sizes_from_count, sizes_of

from .conftest import Net


def machine(memory_gb=None, name="NVIDIA H200", cores=4):
    gpu = Gpu(name=name, memory_bytes=int((memory_gb or 0) * 1e9), driver="", vendor="nvidia")
    return Hardware(cpu="", architecture="", isa=("avx2",), cores=cores, memory_bytes=64 * 10**9, system="",
                    gpus=(gpu,) if memory_gb else ())  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "method"),
    [(1, "lora"), (9_999, "lora"), (10_000, "qlora"), (100_000, "qlora"), (100_001, "full"), (10**7, "full")],
)
@pytest.mark.parametrize("model", [None, 125_000_000])
def test_the_number_of_samples_decides(samples, method, model):
    advice = advise_finetune(samples, machine(141), model)
    assert (advice.method, advice.fits) == (method, True)
    assert f"{samples:,} samples" in advice.reasons[0]
    assert advice.base_dtype == {"full": None, "lora": "bf16", "qlora": "nf4"}[method]


@pytest.mark.parametrize(
    ("samples", "memory", "size", "method", "fits"),
    [
        (200_000, 141, 7e9, "lora", True),
        (200_000, 24, 7e9, "lora", True),
        (200_000, 16, 7e9, "qlora", True),
        (5_000, 16, 7e9, "qlora", True),
        (5_000, 48, 70e9, "qlora", False),
        (50_000, 141, 70e9, "qlora", True),
    ],
)
def test_memory_corrects_it(samples, memory, size, method, fits):
    advice = advise_finetune(samples, machine(memory), int(size))
    assert (advice.method, advice.fits) == (method, fits)
    text = " ".join(advice.reasons)
    assert ("does not fit" in text) == (advice.method != advise_finetune(samples).method or not fits)
    assert "GB" in text
    assert advice.report().ok == fits
    assert advice.estimate.memory_bytes <= advice.memory_bytes or not fits


def test_micro_batches_shrink_before_the_method_changes():
    wide = advise_finetune(5_000, machine(141), 7_000_000_000, batch_size=16)
    narrow = advise_finetune(5_000, machine(22), 7_000_000_000, batch_size=16)
    assert wide.method == narrow.method == "lora"
    assert wide.estimate.micro_batch_size == 16
    assert narrow.estimate.micro_batch_size in (1, 2)
    assert "Micro-batches of" in " ".join(narrow.reasons)


def test_time():
    one = advise_finetune(20_000, machine(141), 2_000_000_000, epochs=1)
    three = advise_finetune(20_000, machine(141), 2_000_000_000, epochs=3)
    assert three.estimate.hours == pytest.approx(3 * one.estimate.hours)
    hours = {found.method: found.hours for found in one.estimates}
    assert hours["lora"] < hours["qlora"] < hours["full"]
    # 20,000 samples of 512 tokens with 6 operations a weight, at 0.4 of 989 TFLOP/s.
    assert hours["full"] == pytest.approx(20_000 * 512 * 6 * 2e9 / (0.4 * 989e12) / 3600)
    assert advise_finetune(5, machine(80, "Unheard-of 1"), 10**9).estimate.hours is None
    slow, fast = (advise_finetune(500, machine(cores=c), 10**8).estimate.hours for c in (2, 8))
    assert slow == pytest.approx(4 * fast)


def test_states_are_what_layers_hold():
    """The formulas against the bytes of parameters, buffers, gradients and moments of real models."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 256), *(nn.Linear(256, 256, bias=False) for _ in range(6)))
    options = {"memory_bytes": 1e12, "batch_size": 1, "sequence_length": 1, "samples": 1, "flops": None}
    for method, dtype in (("full", None), ("lora", "bf16"), ("qlora", "nf4")):
        found = estimate(method, sizes_of(model), **options)
        real = copy.deepcopy(model)
        if dtype:
            advice = advise_finetune(5_000 if method == "lora" else 50_000, machine(141), model)
            real = get_peft_model(real, advice.config, base_dtype=dtype)
        trained = [p for p in real.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        real(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
        optimizer.step()
        assert found.trained == sum(p.numel() for p in trained)
        moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        assert found.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments)
        assert found.gradients_bytes == sum(p.grad.numel() * 4 for p in trained)
        tables = 6 * 256 * 2 * 4 if dtype == "nf4" else 0
        held = sum(t.numel() * t.element_size() for t in (*real.parameters(), *real.buffers())) - tables
        passing = 2 * found.trained + (2 * 256 * 256 if dtype == "nf4" else 0)
        assert found.weights_bytes - passing == pytest.approx(held, rel=1e-3)


def test_activations_are_near_what_a_transformer_keeps():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1000))
    advice = advise_finetune(5_000, machine(141), model, batch_size=4, sequence_length=128)
    peft = get_peft_model(model, advice.config, base_dtype=advice.base_dtype)
    own = {t.untyped_storage().data_ptr() for t in (*peft.parameters(), *peft.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.randint(0, 1000, (4, 128))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        peft(input_ids=ids, labels=ids)
    ratio = advice.estimate.activations_bytes / sum(kept.values())
    assert 0.5 < ratio < 2


def test_a_count_stands_for_a_usual_transformer():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.LlamaConfig()  # 7 billion parameters
        model = transformers.LlamaForCausalLM(config)
    real = sizes_of(model)
    guess = sizes_from_count(real.parameters)
    assert real.outputs == guess.outputs == 32_000
    assert guess.ends == pytest.approx(real.ends, rel=0.15)
    assert guess.linear == pytest.approx(real.linear, rel=0.1)
    assert advise_finetune(5_000, machine(141), model).method == "lora"


def test_the_advice_can_be_followed():
    advice = advise_finetune(500, machine(), Net())
    model = get_peft_model(Net(), advice.config, base_dtype=advice.base_dtype)
    assert model.get_nb_trainable_parameters()[0] == advice.estimate.trained
    full = advise_finetune(10**6, machine(), Net())
    assert (full.method, full.config, full.base_dtype) == ("full", None, None)


def test_the_report(capsys):
    advice = advise_finetune(500, machine(141), 10**9)
    report = advice.report()
    assert isinstance(report, Report)
    assert report["method"].after == "LoRA"
    assert report["LoRA: memory"].after * 1e9 == pytest.approx(advice.estimate.memory_bytes)
    assert "500 samples" in str(advice)
    assert capsys.readouterr().out == ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice.method = "full"
    assert advise_finetune(500).report()["method"].after == "LoRA", "on this machine, without a model"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_samples": 0}, ConfigError, r"num_samples=0\): an integer >= 1"),
        ({"num_samples": 1e4}, ConfigError, "num_samples=10000.0"),
        ({"num_samples": 5, "batch_size": 0}, ConfigError, "batch_size=0"),
        ({"num_samples": 5, "epochs": True}, ConfigError, "epochs=True"),
        ({"num_samples": 5, "model": "llama"}, InputError, "a number of parameters is needed"),
        ({"num_samples": 5, "model": -5}, InputError, "a number of parameters is needed"),
        ({"num_samples": 5, "model": nn.Sequential(nn.ReLU())}, InputError, "no linear layers"),
        ({"num_samples": 5, "hardware": "H200"}, InputError, r"core.Hardware is needed"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        advise_finetune(**arguments)
