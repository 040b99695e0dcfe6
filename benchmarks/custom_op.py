"""C++ operators against torch.compile (Inductor) and eager PyTorch, on two expressions that Inductor fuses as well.

    python benchmarks/custom_op.py [--rounds 60] [--threads 2] [--device cpu] [--swish LIB.so] [--gated-norm LIB.so]

swish: x * (1 / (1 + exp(-x))) on 16 M floats. gated_norm: x * sigmoid(gate), each row divided by its root mean square,
on 4096 x 4096 floats. The operators are the two of examples/custom_operators/, built here unless prebuilt libraries are
named. Rivals are timed in turns (`measure.paired_latency`); the operator runs under two names, whose difference is the
noise. On a GPU a CUDA graph of 20 calls is what is timed, so that the time is the device's and not Python's.
Writes benchmarks/results/custom_op.json (custom_op_cuda.json for a GPU).
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_r1 import ops
from deepseek_r1.core import atomic, probe
from deepseek_r1.measure import paired_latency, ratio_interval

HERE = Path(__file__).parent
SOURCES = HERE.parent / "examples" / "custom_operators"
BAR = 0.9
CALLS_IN_A_GRAPH = 20

Function = Callable[..., torch.Tensor]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 / (1.0 + torch.exp(-x)))


def gated_norm(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    y = x * torch.sigmoid(gate)
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6)


def library(name: str, given: Path | None, device: str) -> Path:
    """The prebuilt library, or one built now into a temporary directory."""
    if given is not None:
        return given
    march = "sm_{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else None
    place = Path(tempfile.mkdtemp(prefix="custom-op-"))
    return ops.build_op(SOURCES / f"{name}.cc", place / f"{name}.so", cuda=device == "cuda", march=march)


def timed(function: Function, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """What a turn runs: a call; on a GPU a graph of several, waited for."""
    if inputs[0].device.type == "cpu":
        return lambda: function(*inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            function(*inputs)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def compare(name: str, operator: Function, plain: Function, inputs: tuple[torch.Tensor, ...], rounds: int) -> dict:
    """Times of operator, Inductor and eager, and how far their answers are from float64."""
    compiled = torch.compile(plain)
    rivals = {"operator": operator, "operator again": operator, "inductor": compiled, "eager": plain}
    exact = plain(*[t[:64].double() for t in inputs])
    errors = {k: float((f(*[t[:64] for t in inputs]) - exact).abs().max()) for k, f in rivals.items()}
    torch._dynamo.reset()
    calls = CALLS_IN_A_GRAPH if inputs[0].device.type == "cuda" else 1
    latencies = paired_latency({k: timed(f, inputs) for k, f in rivals.items()}, rounds=rounds)
    against = {k: ratio_interval(latencies[k], latencies["operator"]) for k in rivals if k != "operator"}
    moved = 4 * (sum(t.numel() for t in inputs) + inputs[0].numel())
    result = {
        "ms_per_call": {k: v.median_ms / calls for k, v in latencies.items()},
        "operator_speed_over": {k: {"low": lo, "median": m, "high": hi} for k, (lo, m, hi) in against.items()},
        "gigabytes_per_s_of_operator": moved / (latencies["operator"].median_ms / calls) / 1e6,
        "largest_error_against_float64": errors,
        "rounds": len(latencies["operator"].seconds),
        "meets_bar": against["inductor"][1] >= BAR,
    }
    low, middle, high = against["inductor"]
    print(f"{name}: {middle:.3f} of Inductor's speed (95 % {low:.3f} to {high:.3f})")
    print("  " + ", ".join(f"{k} {v:.3f} ms" for k, v in result["ms_per_call"].items()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, default=16 * 2**20)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--swish", type=Path)
    parser.add_argument("--gated-norm", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ops.register_custom_op("swish", library("swish", args.swish, args.device))
    ops.register_custom_op("gated_norm", library("gated_norm", args.gated_norm, args.device))
    rows = torch.randn(2, args.side, args.side, device=args.device)
    with torch.inference_mode():
        results = {
            "swish": compare("swish", ops.swish, swish, (torch.randn(args.elements, device=args.device),), args.rounds),
            "gated_norm": compare("gated_norm", ops.gated_norm, gated_norm, (rows[0], rows[1]), args.rounds),
        }
    document = {
        "schema_version": 1,
        "what": "speed of a fused C++ operator over torch.compile and eager, paired rounds; the bar is 0.9 of Inductor",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "hardware": probe().to_dict(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "results": results,
    }
    name = "custom_op.json" if args.device == "cpu" else "custom_op_cuda.json"
    atomic.write_json(args.out or HERE / "results" / name, document)


if __name__ == "__main__":
    main()
