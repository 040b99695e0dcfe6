"""`python benchmarks/quantization VERB`; see the package's docstring."""

import importlib
import sys
from pathlib import Path

VERBS = {
    "train": "train", "nets": "nets", "ptq": "ptq_peers", "search": "search", "exports": "exports",
    "effective-bits": "effective_bits", "four-bits": "four_bits", "pruning": "pruning", "joint": "joint",
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        sys.exit(f"python benchmarks/quantization {{{'|'.join(VERBS)}}} [options]")
    # The folder's parent, so that this folder is the package `quantization`, beside the zoo and the tables.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(importlib.import_module(f"quantization.{VERBS[sys.argv[1]]}").main(sys.argv[2:]))
