"""Samples a second and peak memory of training steps: Hugging Face's Trainer, a loop by hand, and ours.

    python benchmarks/training step [--only bert-32x128,plain-vit] [--rounds 3] [--out FILE]

All train with the same data through the same `torch.utils.data.DataLoader`, in bf16, with AdamW and the same rate; each
as its own documentation has it: Hugging Face's Trainer with `bf16=True`, the loop under `torch.autocast` with a fused
AdamW, ours with nothing but the model and the loader. They take turns; a row has medians over the rounds. Weights are
random and so are the data: this is about time and memory alone. Times are of the later steps of a run,
so what comes once (compiling, recording) is left out of the rate and told by itself. Peak memory is of the whole run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from optimize_zoo import about
from torch import nn
from torch.utils.data import DataLoader, Dataset

from deepseek_r1 import Trainer, TrainingConfig
from deepseek_r1.core import atomic
from deepseek_r1.train import Callback

from .modules import PlainViT, Tagger

RESULT = Path(__file__).parents[1] / "results" / "training_step.json"
LR = 2e-5


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        theirs: the model of the peers; ours is this too unless `ours` is given.
        sample: one sample, by number.
        batch: samples in a batch.
        labels: whether the model computes its own loss from `labels`.
        workers: of the loader.
        steps: how many are left out of the rate, and how many count.
        memory_gb: the limit that ours is given.
    """

    theirs: Callable[[], nn.Module]
    sample: Callable[[int], dict[str, Any] | tuple[Any, Any]]
    batch: int
    ours: Callable[[], nn.Module] | None = None
    labels: bool = False
    workers: int = 4
    steps: tuple[int, int] = (40, 100)
    memory_gb: float | None = None


class _Samples(Dataset[Any]):
    def __init__(self, case: Case) -> None:
        self._case = case

    def __len__(self) -> int:
        return self._case.batch * (sum(self._case.steps) + 2)

    def __getitem__(self, index: int) -> Any:
        return self._case.sample(index)


def _text(length: int) -> Callable[[int], dict[str, Any]]:
    ids = torch.randint(1000, 30_000, (1024, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(length, dtype=torch.long)
    return lambda i: {"input_ids": ids[i % 1024], "attention_mask": ones, "labels": i % 2}


def _text_without_mask(length: int) -> Callable[[int], dict[str, Any]]:
    sample = _text(length)
    return lambda i: {k: v for k, v in sample(i).items() if k != "attention_mask"}


def _hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def _our_bert() -> nn.Module:
    from deepseek_r1.models import BERTConfig, BERTForSequenceClassification

    return BERTForSequenceClassification(BERTConfig())


def _llama(hf: bool) -> nn.Module:
    shape = {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if hf:
        from transformers import LlamaConfig as Theirs
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(Theirs(**shape, use_cache=False)).bfloat16()
    from deepseek_r1.models import Llama, LlamaConfig

    return Llama(LlamaConfig(**shape)).bfloat16()


def _tokens(i: int) -> dict[str, Any]:
    ids = torch.randint(0, 128_000, (4096,), generator=torch.Generator().manual_seed(i % 16))
    return {"input_ids": ids, "labels": ids}


def _picture(i: int) -> tuple[Any, Any]:
    return _PICTURES[i % len(_PICTURES)], i % 1000


def _sentence(i: int) -> tuple[Any, Any]:
    return _SENTENCES[i % len(_SENTENCES)], _SENTENCES[i % len(_SENTENCES)] % 17


_PICTURES = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
_SENTENCES = torch.randint(0, 20_000, (1024, 64), generator=torch.Generator().manual_seed(0))

CASES: dict[str, Case] = {
    "bert-32x128": Case(_hf_bert, _text(128), 32, _our_bert, labels=True),
    "bert-128x512": Case(_hf_bert, _text(512), 128, _our_bert, labels=True, memory_gb=16.0),
    "hf-bert-32x128": Case(_hf_bert, _text(128), 32, labels=True),
    "llama-4x4096": Case(
        lambda: _llama(True), _tokens, 4, lambda: _llama(False), labels=True, steps=(15, 20), memory_gb=26.0
    ),
    "plain-vit": Case(PlainViT, _picture, 64, workers=8),
    "lstm-tagger": Case(Tagger, _sentence, 64),
}


class Clock:
    """The rate between two steps, and when the first of them was reached."""

    def __init__(self, warm: int, steps: int) -> None:
        self._first, self._last = warm, warm + steps
        self.begun = time.perf_counter()
        self.warm_s, self.seconds = 0.0, 0.0

    def step(self, number: int) -> bool:
        """Whether a run that has done `number` steps may end."""
        if number in (self._first, self._last):
            torch.cuda.synchronize()
            now = time.perf_counter() - self.begun
            if number == self._first:
                self.warm_s = now
            else:
                self.seconds = now - self.warm_s
        return number >= self._last


def _loader(case: Case) -> DataLoader[Any]:
    return DataLoader(
        _Samples(case), case.batch, shuffle=True, num_workers=case.workers, pin_memory=True, drop_last=True
    )


def hugging_face(case: Case, clock: Clock) -> None:
    """Hugging Face's Trainer."""
    from transformers import Trainer as Theirs
    from transformers import TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = clock.step(state.global_step)

    class Plain(Theirs):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if case.labels:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return F.cross_entropy(model(inputs["x"]), inputs["labels"])

    class Named(_Samples):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return sample if case.labels else {"x": sample[0], "labels": sample[1]}

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, per_device_train_batch_size=case.batch, num_train_epochs=1, bf16=True, learning_rate=LR,
            dataloader_num_workers=case.workers, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_drop_last=True,
        )  # fmt: skip
        Plain(case.theirs(), options, train_dataset=Named(case), callbacks=[Watch()]).train()


def by_hand(case: Case, clock: Clock) -> None:
    """The loop of PyTorch's tutorials, in mixed precision."""
    model = case.theirs().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for number, batch in enumerate(_loader(case), 1):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            if case.labels:
                loss = model(**{k: v.cuda(non_blocking=True) for k, v in batch.items()}).loss
            else:
                x, y = (v.cuda(non_blocking=True) for v in batch)
                loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if clock.step(number):
            break


def ours(case: Case, clock: Clock) -> list[str]:
    """The Trainer with what it chooses."""

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if clock.step(trainer.step):
                trainer.stop("measured")

    config = TrainingConfig(memory_gb=case.memory_gb)
    trainer = Trainer((case.ours or case.theirs)(), _loader(case), lr=LR, config=config, callbacks=[Watch()])
    return list(trainer.train(epochs=1).notes)


CONTESTANTS: dict[str, Callable[[Case, Clock], Any]] = {"hugging face": hugging_face, "by hand": by_hand, "ours": ours}


def measured(name: str, contestant: str) -> dict[str, Any]:
    """One run of one contestant."""
    case = CASES[name]
    clock = Clock(*case.steps)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    notes = CONTESTANTS[contestant](case, clock)
    return {
        "samples_s": case.batch * case.steps[1] / clock.seconds, "warm_s": clock.warm_s,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "notes": notes or [],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The `step` verb."""
    parser = argparse.ArgumentParser(prog="step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text())["rows"] if options.out.is_file() else {}
    for name in options.only.split(","):
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for contestant in options.contestants.split(","):
                runs.setdefault(contestant, []).append(measured(name, contestant))
                print(name, contestant, json.dumps(runs[contestant][-1]), flush=True)
        results[name] = {
            who: {
                **{key: statistics.median(run[key] for run in found) for key in ("samples_s", "warm_s")},
                **{key: max(run[key] for run in found) for key in ("peak_gb", "reserved_gb")},
                "all_samples_s": [run["samples_s"] for run in found], "notes": found[-1]["notes"],
            } for who, found in runs.items()
        }  # fmt: skip
        atomic.write_json(options.out, about("cuda") | {"rows": results})
    return 0
