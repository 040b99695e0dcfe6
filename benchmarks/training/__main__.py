"""`python benchmarks/training VERB`; see the package's docstring."""

import importlib
import sys
from pathlib import Path

VERBS = ("all", "gpt", "lora", "loss", "memory", "packing", "step")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        sys.exit(f"python benchmarks/training {{{'|'.join(VERBS)}}} [options]")
    # The folder's parent, so that this folder is the package `training`, beside the zoo and the tables.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(importlib.import_module(f"training.{sys.argv[1]}").main(sys.argv[2:]))
