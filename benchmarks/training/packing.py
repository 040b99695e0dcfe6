"""Packing and length buckets on lengths by Zipf's law: how full, how long it takes to plan, and what reading costs."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from optimize_zoo import RESULTS, about
from torch.utils.data import DataLoader, TensorDataset

from deepseek_r1.core import atomic
from deepseek_r1.data import DSDataLoader, choose_shapes, pack_lengths, pack_stream

EXPONENTS = (1.05, 1.2, 1.5, 2.0)


def zipf(count: int, exponent: float, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths by Zipf's law, those beyond the longest cut to it."""
    return np.minimum(np.random.default_rng(seed).zipf(exponent, count), longest)


def planning(count: int, longest: int, rounds: int) -> list[dict]:
    """Fill and CPU seconds of the packer, and of the padding that it saves, for each exponent."""
    rows = []
    for exponent in EXPONENTS:
        lengths = zipf(count, exponent, longest)
        seconds = []
        for _ in range(rounds):
            began = time.process_time()
            packing = pack_lengths(lengths, longest)
            seconds.append(time.process_time() - began)
        shapes = choose_shapes(lengths, max_shapes=8, multiple=64)
        padded = np.asarray(shapes)[np.searchsorted(shapes, lengths)].sum()
        row = {
            "exponent": exponent, "samples": count, "max_length": longest, "rows": len(packing), "fill": packing.fill,
            "fewest_rows_possible": int(-(-lengths.sum() // longest)), "cpu_s": statistics.median(seconds),
            "fill_of_8_buckets": float(lengths.sum() / padded), "fill_padded": float(lengths.mean() / lengths.max()),
        }  # fmt: skip
        print(row)
        rows.append(row)
    return rows


def streaming(count: int, longest: int) -> dict:
    """Fill and CPU seconds of packing a stream within a window."""
    lengths = zipf(count, 1.2, longest)
    began = time.process_time()
    rows = sum(1 for _ in pack_stream(lengths.tolist(), int, longest))
    found = {"samples": count, "fill": float(lengths.sum() / (rows * longest)), "cpu_s": time.process_time() - began}
    print(found)
    return found


def overhead(rounds: int) -> dict:
    """CPU seconds of a pass over 1,000 batches of tensors, with torch's loader and with this one, in turns."""
    data = TensorDataset(torch.randn(8000, 16), torch.zeros(8000))
    loaders = {"torch": DataLoader(data, 8, True), "plain": DSDataLoader(data, 8, True), "seeded": DSDataLoader(
        data, 8, True, seed=0)}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            began = time.process_time()
            for _ in loader:
                pass
            times[name].append(time.process_time() - began)
    found = {f"{name}_us_per_batch": statistics.median(values) * 1e3 for name, values in times.items()}
    print(found)
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="packing", description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "packing.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = {
        **about("cpu"),
        "planning": planning(options.samples, options.max_length, options.rounds),
        "stream": streaming(options.samples // 10, options.max_length),
        "loader": overhead(2 * options.rounds),
    }
    atomic.write_json(options.out, result)
