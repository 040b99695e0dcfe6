"""Adapters with the Trainer: only they change, the loss falls, checkpoints resume."""

import copy

import pytest
import torch

from deepseek_r1.lora import LoraConfig, PeftModel, get_peft_model
from deepseek_r1.train import Trainer, TrainingConfig

from .conftest import Net

CONFIG = TrainingConfig(device="cpu", seed=0, threads=1)


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (64, 7), generator=generator)
    return [(x, (x.sum(1) % 4)) for x in ids.split(16)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"modules_to_save": ["head"], "lora_dropout": 0.1}, {"base_dtype": "nf4"},
     {"base_dtype": "bf16", "use_rslora": True}, {"target_modules": ["emb", "conv"], "bias": "all"}],
    ids=str,
)  # fmt: skip
def test_only_adapters_change_and_the_loss_falls(fields, precision):
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **fields}
    base_dtype = fields.pop("base_dtype", None)
    model = get_peft_model(Net(32), LoraConfig(**fields), base_dtype=base_dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    config = TrainingConfig(device="cpu", seed=0, threads=1, precision=precision)
    trainer = Trainer(model, batches(), lr=2e-2, config=config)
    trainer.train(epochs=10)
    after = model.state_dict()
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == trained, "every adapter, and nothing else"
    assert trainer.history[-1]["train_loss"] < 0.95 * trainer.history[0]["train_loss"]


def test_a_run_is_resumed_to_the_bit(tmp_path):
    def build():
        torch.manual_seed(0)
        return get_peft_model(Net(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2), base_dtype="nf4")

    whole = build()
    Trainer(whole, batches(), lr=1e-2, config=CONFIG).train(epochs=2)
    part = build()
    config = TrainingConfig(device="cpu", seed=0, threads=1, save_dir=str(tmp_path))
    Trainer(part, batches(), lr=1e-2, config=config).train(epochs=1)
    resumed = build()
    trainer = Trainer(resumed, batches(), lr=1e-2, config=config)
    trainer.resume()
    trainer.train(epochs=2)
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[n], t) for n, t in theirs.items())


def test_the_trained_adapter_on_the_base(tmp_path):
    torch.manual_seed(0)
    base = Net()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    Trainer(model, batches(), lr=1e-2, config=CONFIG).train(epochs=1)
    model.save_pretrained(tmp_path)
    x = batches()[0][0]
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(x), model.eval()(x))
    torch.testing.assert_close(model.merge_and_unload()(x), again(x), rtol=1e-5, atol=1e-5)


def test_a_model_that_computes_its_own_loss():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50))
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM"), base_dtype="bf16")
    ids = torch.randint(0, 50, (8, 12))
    trainer = Trainer(peft, [{"input_ids": ids, "labels": ids}] * 4, lr=2e-2, config=CONFIG)
    report = trainer.train(epochs=4)
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"] - 0.1
    assert "own loss" in str(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("base_dtype", [None, "bf16", "nf4", "int4"])
def test_on_a_gpu(base_dtype):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(Net(64), config, base_dtype=base_dtype)
    trainer = Trainer(model, batches(), lr=1e-2, config=TrainingConfig(device="cuda", seed=0))
    trainer.train(epochs=3)
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_needs_less_memory_than_with_the_whole_model_trained():
    def peak(**options):
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        blocks = [torch.nn.Linear(2048, 2048) for _ in range(16)]
        model = torch.nn.Sequential(*blocks).cuda()
        if options:
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), **options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            x = torch.randn(512, 2048, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    full, lora, half, few = (
        peak(),
        peak(base_dtype=None, adapter_name="a"),
        peak(base_dtype="bf16"),
        peak(base_dtype="nf4"),
    )
    assert lora < 0.5 * full
    assert half < 0.75 * lora
    assert few < 0.75 * half
