"""Adapters (r = 16 on all linear layers) of the Llama shape with 1.24 billion parameters: 4 x 4,096 tokens, bf16.

    python benchmarks/training lora [--only hf,lora,qlora,loop,free] [--rounds 2] [--out FILE]
    python benchmarks/training lora --device cpu --small --rounds 1

hf: transformers' model with PEFT's adapters under Hugging Face's Trainer (`bf16=True`, no gradient checkpointing);
loop: the same model in a loop by hand; lora: ours, with `memory_gb=28`; qlora: ours over NF4 weights, `memory_gb=25`;
free: ours without a limit. All are rows of the case `lora-llama-4x4096` of the `step` verb, in the same file and with
the same options. transformers, accelerate and peft are needed for the first two; where one is missing their entry says
so. `PYTHONPATH` may point at wheels that were unpacked (`python -m zipfile -e peft-*.whl DIR`): peft is pure Python.

Bars: ours at least 1.8 times hf's tokens a second at no more than 0.45 of its peak; qlora within 15 % of ours at no
more than 0.40 of hf's peak.
"""

from __future__ import annotations

from . import step
from .cases import LORA

#: The contestant that others are compared with.
BASE = "hugging face"
#: Contestant, the one it is compared with, what, the bar for the ratio, and whether that is the least.
BARS = (
    ("ours", BASE, "samples_s", 1.8, True), ("ours", BASE, "peak_gb", 0.45, False),
    ("ours, nf4", "ours", "samples_s", 0.85, True), ("ours, nf4", BASE, "peak_gb", 0.40, False),
)  # fmt: skip
NAMES = {"hf": "hugging face", "lora": "ours", "qlora": "ours, nf4", "loop": "by hand", "free": "ours, no limit"}


def main(arguments: list[str]) -> int:
    """The `lora` verb: `step` for its case, with short names of the contestants."""
    given = list(arguments)
    if "--only" in given:
        place = given.index("--only")
        short = given[place + 1].split(",")
        given[place : place + 2] = ["--contestants", ",".join(NAMES[name] for name in short)]
    return step.main(given, only=LORA)
