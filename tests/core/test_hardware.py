"""The hardware probe on what Linux and the vendors' commands print for other machines."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest

from deepseek_r1.core import hardware
from deepseek_r1.core.hardware import Gpu, Hardware, amd_gpus, cpu_info, nvidia_gpus, run_tool

ZEN4 = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 17
model name	: AMD EPYC 9654 96-Core Processor
flags		: fpu vme de pse tsc msr sse sse2 ht ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand \
avx2 bmi2 avx512f avx512dq avx512ifma avx512cd sha_ni avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 gfni \
avx512_vnni avx512_bitalg avx512_vpopcntdq
bugs		: sysret_ss_attrs spectre_v1

processor	: 1
vendor_id	: AuthenticAMD
model name	: AMD EPYC 9654 96-Core Processor
flags		: fpu vme
"""
XEON = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 143
model name	: Intel(R) Xeon(R) Platinum 8480+
flags		: fpu sse4_2 avx avx2 fma avx512f avx512bw avx_vnni avx512_bf16 avx512_vnni avx512_fp16 \
amx_bf16 amx_tile amx_int8
"""
PI4 = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3

Revision	: c03114
Serial		: 1000000000000000
Model		: Raspberry Pi 4 Model B Rev 1.4
"""
PI4_32BIT = """processor	: 0
model name	: ARMv7 Processor rev 3 (v7l)
BogoMIPS	: 108.00
Features	: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32
Model		: Raspberry Pi 4 Model B Rev 1.4
"""
PI5 = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Model		: Raspberry Pi 5 Model B Rev 1.0
"""


@pytest.mark.parametrize(
    ("text", "name", "has", "lacks"),
    [
        (ZEN4, "AMD EPYC 9654 96-Core Processor", {"avx2", "avx512_vnni", "avx512_bf16"}, {"amx_tile", "avx_vnni"}),
        (XEON, "Intel(R) Xeon(R) Platinum 8480+", {"amx_tile", "amx_int8", "amx_bf16", "avx512_fp16"}, {"sve"}),
        (PI4, "Raspberry Pi 4 Model B Rev 1.4", {"asimd"}, {"asimddp", "avx2", "i8mm"}),
        (PI4_32BIT, "ARMv7 Processor rev 3 (v7l)", {"neon"}, {"asimd"}),
        (PI5, "Raspberry Pi 5 Model B Rev 1.0", {"asimd", "asimddp"}, {"i8mm", "sve"}),
        ("", "", set(), {"avx2"}),
        ("no colon here\n: :\n", "", set(), {"avx2"}),
    ],
)  # fmt: skip
def test_cpu_info(text, name, has, lacks):
    model, isa = cpu_info(text)
    assert model == name
    assert has <= set(isa)
    assert not lacks & set(isa)


def test_nvidia_smi():
    text = "NVIDIA H200, 143771, 580.95.05\nNVIDIA GeForce RTX 4090, 24564, 550.54.14\n"
    assert nvidia_gpus(text) == [
        Gpu(name="NVIDIA H200", memory_bytes=143771 * 2**20, driver="580.95.05", vendor="nvidia"),
        Gpu(name="NVIDIA GeForce RTX 4090", memory_bytes=24564 * 2**20, driver="550.54.14", vendor="nvidia"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "NVIDIA Tegra, [N/A], 540.4.0\n",
        "a, b\n",
    ],
)
def test_nvidia_smi_without_a_gpu(text):
    assert nvidia_gpus(text) == []


def test_rocm_smi():
    text = json.dumps(
        {
            "card0": {"Card Series": "AMD Instinct MI300X", "VRAM Total Memory (B)": "206141652992"},
            "card1": {"Card model": "0x74a1", "VRAM Total Memory (B)": "unknown"},
            "system": {"Driver version": "6.8.5"},
        }
    )
    assert amd_gpus(text) == [
        Gpu(name="AMD Instinct MI300X", memory_bytes=206141652992, driver="6.8.5", vendor="amd"),
        Gpu(name="0x74a1", memory_bytes=0, driver="6.8.5", vendor="amd"),
    ]
    assert amd_gpus("") == amd_gpus("WARNING: no GPU") == []


def _machine() -> Hardware:
    return Hardware(cpu="X", architecture="x86_64", isa=("avx2",), cores=4, memory_bytes=8 * 10**9, system="Linux 6")


def test_the_key_changes_with_what_matters():
    machine = _machine()
    assert machine.key == _machine().key
    assert len(machine.key) == 16
    gpu = Gpu(name="G", memory_bytes=1, driver="1", vendor="nvidia")
    others = [
        replace(machine, cpu="Y"), replace(machine, isa=("avx2", "avx512f")), replace(machine, cores=8),
        replace(machine, gpus=(gpu,)), replace(machine, gpus=(replace(gpu, driver="2"),)),
    ]  # fmt: skip
    assert len({machine.key, *(o.key for o in others)}) == 6
    assert replace(machine, memory_bytes=1, system="Linux 7").key == machine.key


def test_to_dict_is_plain():
    machine = replace(_machine(), gpus=(Gpu(name="G", memory_bytes=10**9, driver="1", vendor="amd"),))
    data = machine.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["schema_version"] == hardware.SCHEMA_VERSION
    assert data["key"] == machine.key
    assert machine.facts()["GPU"] == "G (1 GB)"
    assert "GPU" not in _machine().facts()


def test_this_machine():
    here = hardware.probe()
    assert here is hardware.probe(), "probed once"
    assert here.cores >= 1
    assert here.memory_bytes > 10**8
    assert here.cpu
    assert here.architecture


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("", 64), ("garbage", 64)]
)
def test_cores_follow_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(hardware, "_read", lambda path: quota if "cpu.max" in path else "")
    assert hardware._cores() == cores


def test_memory_follows_the_limit(monkeypatch):
    monkeypatch.setattr(hardware, "_read", lambda _: "max\n")
    total = hardware._memory()
    monkeypatch.setattr(hardware, "_read", lambda _: f"{total // 2}\n")
    assert hardware._memory() == total // 2
    monkeypatch.setattr(hardware, "_read", lambda _: f"{total * 2}\n")
    assert hardware._memory() == total


def test_run_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def tool(name, script):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    tool("good-tool", "echo hello $1")
    tool("bad-tool", "echo half; exit 3")
    tool("slow-tool", "exec sleep 30")
    assert run_tool("good-tool", "there") == "hello there\n"
    assert run_tool("bad-tool") is None
    assert run_tool("slow-tool", timeout_s=0.2) is None
    assert run_tool("no-such-tool-anywhere") is None
