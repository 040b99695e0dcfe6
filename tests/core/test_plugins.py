"""The registry, with built-ins, names registered in the process, and a real distribution on the path."""

from __future__ import annotations

import sys

import pytest

from deepseek_r1.core import PluginError, Registry

GROUP = "deepseek_r1.test_things"


def _registry() -> Registry:
    return Registry("thing", GROUP, {"pi": "math:pi", "join": "os:path.join"})


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with entry points on the path: install(name, "a = module:attr", "source of module")."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(dist: str, entry_points: str, source: str = "") -> None:
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")
        (tmp_path / f"{dist}_code.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"{dist}_code", raising=False)

    return add


def test_builtins():
    registry = _registry()
    assert registry.names() == ["join", "pi"]
    assert "pi" in registry
    assert "e" not in registry
    assert registry.get("pi") == pytest.approx(3.14159, abs=1e-5)
    assert registry.get("join")("a", "b") == "a/b"


def test_a_distribution_adds_a_name(install):
    install("outside", "two = outside_code:VALUE", "VALUE = 2")
    registry = _registry()
    assert registry.names() == ["join", "pi", "two"]
    assert "outside_code" not in sys.modules, "listing imports nothing"
    assert registry.get("two") == 2


def test_a_broken_plugin_fails_alone_and_by_name(install):
    install("broken", "bad = broken_code:VALUE\nworse = absent_module:x", "raise RuntimeError('no GPU here')")
    registry = _registry()
    assert registry.names() == ["bad", "join", "pi", "worse"]
    assert registry.get("pi") > 3
    with pytest.raises(PluginError, match=r"thing 'bad'.*broken_code:VALUE.*RuntimeError: no GPU here") as caught:
        registry.get("bad")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(PluginError, match=r"'worse'.*absent_module"):
        registry.get("worse")


def test_a_missing_attribute_is_named(install):
    install("short", "bad = short_code:nothing")
    with pytest.raises(PluginError, match="nothing"):
        _registry().get("bad")


def test_a_clash_names_both(install):
    install("first", "x = first_code:VALUE", "VALUE = 1")
    install("second", "x = second_code:VALUE\npi = second_code:VALUE", "VALUE = 2")
    registry = _registry()
    with pytest.raises(PluginError, match=r"claimed more than once \(first_code:VALUE, second_code:VALUE\)"):
        registry.get("x")
    with pytest.raises(PluginError, match=r"deepseek_r1, second_code:VALUE"):
        registry.get("pi")
    assert registry.get("join")


def test_an_unknown_name_hints_at_the_nearest():
    with pytest.raises(PluginError, match=r"unknown thing 'jion'\. Did you mean 'join'\? Known: join, pi"):
        _registry().get("jion")
    with pytest.raises(PluginError, match=r"unknown thing 'zzzz'\. Known: join, pi"):
        _registry().get("zzzz")
    with pytest.raises(LookupError, match="Known: none"):
        Registry("thing", GROUP, {}).get("a")


def test_register_and_unregister():
    registry = _registry()
    assert registry.register("one", 1) == 1

    @registry.register("twice")
    def twice(x):
        return 2 * x

    assert registry.get("twice") is twice
    assert registry.get("one") == 1
    assert registry.names() == ["join", "one", "pi", "twice"]
    for taken in ("one", "pi"):
        with pytest.raises(PluginError, match=f"{taken!r} exists already"):
            registry.register(taken, 3)
    registry.unregister("one")
    assert "one" not in registry
    for absent in ("one", "pi"):
        with pytest.raises(PluginError, match="was not registered"):
            registry.unregister(absent)
    assert _registry().names() == ["join", "pi"], "registries do not share names"
