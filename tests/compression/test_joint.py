"""The problem of channels and bits against trying everything."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from deepseek_r1.compression._joint import Joint, Shrinkage, calibrated, shrinkages
from deepseek_r1.core import Float32, Int4Weight, Int8Static
from deepseek_r1.pruning import CurvePoint, GroupCurve
from deepseek_r1.quantization import Costs

FORMATS = (Float32(), Int8Static(), Int4Weight(group_size=32))
GROUPS = (
    Shrinkage(
        name="a", kept=(64, 32), losses=(0.0, 0.3), members=(("a.weight", 0, 1), ("a.bias", 0, 1), ("b.weight", 1, 1))
    ),
    Shrinkage(name="b", kept=(96, 64, 48), losses=(0.0, 0.1, 0.4), members=(("b.weight", 0, 1), ("c.weight", 1, 1))),
)
SHAPES = {"a": (64, 32), "b": (96, 64), "c": (10, 96)}
LOSS = {"a": (0.0, 0.01, 0.2), "b": (0.0, 0.02, 0.05), "c": (0.0, 0.2, 0.4)}


def costs(shrunk: bool) -> Costs:
    shapes = {"a": (32, 32), "b": (48, 32), "c": (10, 48)} if shrunk else SHAPES
    layers = {
        name: {
            fmt: {"loss": loss, "ms": prod(shape) * each, "bytes": fmt.weight_bytes(shape[0], prod(shape[1:]))}
            for fmt, loss, each in zip(FORMATS, LOSS[name], (4e-4, 1e-4, 3e-4))
        }
        for name, shape in shapes.items()
    }
    switches = {("a", "b"): {(x, y): 0.05 * (x != y) for x in FORMATS for y in FORMATS}}
    fixed = {"loss": 0.0, "ms": 0.5 if shrunk else 0.8, "bytes": 128.0 if shrunk else 256.0}
    return Costs(layers=layers, shapes=shapes, fixed=fixed, switches=switches)


@pytest.fixture(scope="module")
def joint() -> Joint:
    sizes = {"a.weight": 8192, "a.bias": 256, "b.weight": 24576, "c.weight": 3840}
    return Joint(GROUPS, costs(False), costs(True), sizes)


def every(joint: Joint) -> list[tuple[dict[str, int], dict[str, float]]]:
    """All choices, added up without the solver."""
    whole = costs(False)
    found = []
    for kept in itertools.product(GROUPS[0].kept, GROUPS[1].kept):
        units = dict(zip("ab", kept))
        shapes = {"a": (units["a"], 32), "b": (units["b"], units["a"]), "c": (10, units["b"])}
        for formats in itertools.product(FORMATS, repeat=3):
            chosen = dict(zip("abc", formats))
            if any(isinstance(f, Int4Weight) and shapes[n][1] % 32 for n, f in chosen.items()):
                continue
            total = {"loss": 0.0, "ms": 0.8, "bytes": 256.0}
            for group in GROUPS:
                gone = 1 - units[group.name] / group.kept[0]
                total["loss"] += group.losses[group.kept.index(units[group.name])]
                weight = {"a": 64, "b": 96}
                total["ms"] -= 0.3 * weight[group.name] * gone / (64 * 0.5 + 96 * 0.5)
            total["bytes"] -= 128.0 * (1 - units["a"] / 64) / 0.5
            for name, fmt in chosen.items():
                total["loss"] += whole.layers[name][fmt]["loss"]
                total["ms"] += whole.layers[name][fmt]["ms"] * prod(shapes[name]) / prod(SHAPES[name])
                total["bytes"] += fmt.weight_bytes(shapes[name][0], shapes[name][1])
            total["ms"] += 0.05 * (chosen["a"] != chosen["b"])
            found.append((units, total))
    return found


@pytest.mark.parametrize("limited", ["ms", "bytes"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_nothing_better_keeps_the_limit(joint: Joint, limited: str, share: float) -> None:
    choices = [total for _, total in every(joint)]
    values = sorted(c[limited] for c in choices)
    limit = values[int(share * (len(values) - 1))] + 1e-9
    best = min(c["loss"] for c in choices if c[limited] <= limit)
    plan = joint.front({limited: limit}, "bytes" if limited == "ms" else "ms", points=2)[-1]
    assert plan.costs[limited] <= limit * (1 + 1e-6)
    assert plan.costs["loss"] == pytest.approx(best, abs=1e-3)
    # The prediction is what the same choice adds up to.
    alike = [t for units, t in every(joint) if units == plan.kept and t["loss"] == pytest.approx(plan.costs["loss"])]
    assert any(t["ms"] == pytest.approx(plan.costs["ms"]) for t in alike)


def test_groups_of_four_bits_do_not_meet_channels_that_do_not_divide(joint: Joint) -> None:
    """48 inputs are no whole number of groups of 32."""
    for plan in joint.front({}, "bytes", points=20):
        assert not (plan.kept["b"] == 48 and plan.formats["c"] == Int4Weight(group_size=32))
        assert set(plan.cuts(GROUPS)) == {name for name, kept in plan.kept.items() if kept < {"a": 64, "b": 96}[name]}


def test_losses_add_up_to_what_was_measured() -> None:
    pair = [
        Shrinkage(name=n, kept=(8, 6, 4), losses=(0.0, 0.1 * w, w), members=()) for n, w in (("x", 1.0), ("y", 3.0))
    ]
    found = calibrated(pair, [0.0, 0.8, 1.4])
    assert [sum(g.losses[level] for g in found) for level in range(3)] == pytest.approx([0.0, 0.8, 1.4])
    assert found[0].losses == pytest.approx((0.0, 0.2, 0.35))
    nothing = [Shrinkage(name=n, kept=(8, 4), losses=(0.0, 0.0), members=()) for n in "xy"]
    assert [g.losses for g in calibrated(nothing, [0.0, 0.5])] == [(0.0, 0.25), (0.0, 0.25)]


def test_the_nearest_levels_are_taken() -> None:
    points = tuple(CurvePoint(kept=k, channels=k, loss=1 / k, parameters=k) for k in (64, 48, 32, 16))
    curves = [GroupCurve(name="g", points=points), GroupCurve(name="h", points=points[:1])]
    (group,) = shrinkages(curves, (0.8, 0.4))
    assert group.name == "g"
    assert group.kept == (64, 48, 32)
