"""Layer formats: names, sizes, plain values and back, and what is refused."""

import pytest

from deepseek_r1.core import (
    FORMATS,
    BFloat16,
    ConfigError,
    Float32,
    Int4Dynamic,
    Int4Format,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    LayerFormat,
)

ALL = [
    Float32(), BFloat16(), Int8Static(), Int8Dynamic(), Int8Weight(),
    *(Int4Weight(group_size=g, symmetric=s) for g in (32, 64, 128) for s in (False, True)), Int4Dynamic(),
]  # fmt: skip


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_formats_come_back_from_plain_values(fmt):
    values = fmt.to_dict()
    assert LayerFormat.from_dict(values) == fmt
    assert values["format"] in FORMATS
    assert values["version"] == 1


def test_names_tell_formats_apart():
    assert len({str(fmt) for fmt in ALL}) == len(ALL)
    assert {type(fmt) for fmt in ALL} == set(FORMATS.values())


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (Float32(), 4 * 640), (BFloat16(), 2 * 640), (Int8Weight(), 640 + 5 * 10), (Int8Static(), 640 + 5 * 10),
        (Int4Weight(group_size=64), 320 + 5 * 10), (Int4Dynamic(group_size=32), 320 + 5 * 20),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_count_scales_and_zero_points(fmt, expected):
    assert fmt.weight_bytes(10, 64) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int5"}, "'int5' is unknown; there are"),
        ({}, "None is unknown"),
        ({"format": "int8-static", "group_size": 32}, "has no field 'group_size'"),
        ({"format": "int4-weight", "group_size": 48}, "one of 32, 64, 128 is needed"),
        ({"format": "int4-weight", "version": 2}, "knows version 1"),
    ],
)
def test_what_no_format_is(values, message):
    with pytest.raises(ConfigError, match=message):
        LayerFormat.from_dict(values)


def test_bases_are_no_formats():
    for base in (LayerFormat, Int4Format):
        with pytest.raises(ConfigError, match="base of"):
            base()
