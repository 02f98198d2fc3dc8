# SPDX-License-Identifier: Apache-2.0
"""The machinery of `vllm_d2f.patches`, on a made-up upstream module."""

import dataclasses
import subprocess
import sys
import types

import pytest
from vllm_d2f.patches import __main__ as command
from vllm_d2f.patches import patch as machinery
from vllm_d2f.patches.patch import Patch, check_sources, replace, source_hash

from vllm_d2f import patches


class Upstream:
    def method(self, a: int) -> int:
        return a

    @property
    def flag(self) -> bool:
        return False

    @classmethod
    def build(cls) -> str:
        return cls.__name__


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("made_up_upstream")
    module.Thing = type("Thing", (), dict(vars(Upstream)))
    monkeypatch.setitem(sys.modules, "made_up_upstream", module)
    monkeypatch.setattr(patches, "_applied", {})
    return module


def plus_one(original):
    def method(self, a):
        return original(self, a) + 1

    return method


METHOD = "made_up_upstream:Thing.method"


def made_up(**changes) -> Patch:
    values = dict(
        name="p99_made_up",
        target=(METHOD,),
        why="",
        how="",
        upstream="",
        remove_when="",
        when="the moon is full",
        source_sha256={METHOD: source_hash(Upstream.method)},
        apply=lambda: replace("p99_made_up", METHOD, plus_one),
        needed=lambda: True,
    )
    return Patch(**(values | changes))


def test_apply_all_twice_wraps_once(upstream, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", (made_up(),))
    assert patches.applied() == {"p99_made_up": "not asked yet"}
    for _ in range(2):
        patches.apply_all()
        monkeypatch.setattr(patches, "_applied", dict(patches._applied))
    assert upstream.Thing().method(1) == 2
    patches._applied.clear()  # as in a second module object: the mark on the target still counts
    patches.apply_all()
    assert upstream.Thing().method(1) == 2
    assert upstream.Thing.method._d2f_original is Upstream.method
    assert patches.applied() == {"p99_made_up": "applied"}


def test_a_patch_that_is_not_needed_is_skipped_with_the_reason(upstream, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", (made_up(needed=lambda: False),))
    patches.apply_all()
    assert upstream.Thing().method(1) == 1
    expected = "skipped: applies only when the moon is full"
    assert patches.applied() == {"p99_made_up": expected}


@pytest.mark.parametrize("missing", ["attribute", "class", "module"])
def test_a_missing_target_names_patch_and_version(upstream, monkeypatch, missing):
    if missing == "attribute":
        del upstream.Thing.method
    elif missing == "class":
        del upstream.Thing
    else:
        monkeypatch.setitem(sys.modules, "made_up_upstream", None)
    monkeypatch.setattr(patches, "PATCHES", (made_up(),))
    with pytest.raises(RuntimeError, match=r"p99_made_up.*method does not exist.*>=0\.32,<0\.34"):
        patches.apply_all()
    with pytest.raises(RuntimeError, match="does not exist"):  # not remembered as done
        patches.apply_all()


def test_another_signature_is_an_error(upstream):
    upstream.Thing.method = lambda self, a, b: a
    with pytest.raises(RuntimeError, match=r"takes \['self', 'a', 'b'\], expected \['self', 'a'\]"):
        replace("p99_made_up", METHOD, plus_one)


def test_a_stand_in_may_know_parameters_of_a_later_version(upstream):
    """Behind upstream's own and with defaults, or the launch of either version would fail."""

    def later(original):
        return lambda self, a, b=1: original(self, a) + b

    replace("p99_made_up", METHOD, later)
    assert upstream.Thing().method(1) == 2


@pytest.mark.parametrize("stand_in", ["self, a, b", "self, b=1, a=2", "self", "self, x"])
def test_any_other_parameters_are_an_error(stand_in):
    new = eval(f"lambda {stand_in}: 0")
    with pytest.raises(RuntimeError, match=r"takes \['self', 'a'\], expected \['self'"):
        replace("p99_made_up", METHOD, lambda original: new)


def test_a_changed_body_is_one_warning(upstream, monkeypatch, caplog):
    monkeypatch.setattr(patches, "PATCHES", (made_up(source_sha256={METHOD: "0" * 64}),))
    patches.apply_all()
    patches.apply_all()
    assert [METHOD in record.getMessage() for record in caplog.records] == [True]
    assert upstream.Thing().method(1) == 2
    assert patches.applied() == {"p99_made_up": f"applied (upstream changed: {METHOD})"}


def test_properties_and_classmethods_stay_what_they_are(upstream):
    def make_flag(original):
        def flag(self):
            return not original(self)

        return flag

    def make_build(original):
        def build(cls):
            return original(cls) + "!"

        return build

    for _ in range(2):
        replace("p99", "made_up_upstream:Thing.flag", make_flag)
        replace("p99", "made_up_upstream:Thing.build", make_build)
    assert upstream.Thing().flag is True
    assert upstream.Thing.build() == "Thing!"
    assert type("Heir", (upstream.Thing,), {}).build() == "Heir!"
    # The hash is that of the original, also once replaced.
    expected = {"made_up_upstream:Thing.flag": source_hash(Upstream.flag.fget)}
    assert check_sources("p99", expected) == []


def test_importing_the_package_imports_no_vllm():
    heavy = {"vllm", "torch", "numpy"}
    code = f"import sys, vllm_d2f.patches; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_readme_is_in_sync():
    text = command.README.read_text(encoding="utf-8")
    assert command.render(text) == text, "run: python -m vllm_d2f.patches --write"


def test_ledger_is_complete():
    for patch in patches.PATCHES:
        for field in dataclasses.fields(patch):
            value = getattr(patch, field.name)
            assert value or value is False, f"{patch.name} has no {field.name}"
            assert not isinstance(value, str) or "|" not in value, "breaks the table"
        assert set(patch.target) <= set(patch.source_sha256), patch.name
    assert len({patch.name for patch in patches.PATCHES}) == len(patches.PATCHES)


def test_supported_version_is_stated_once():
    from importlib.metadata import requires

    gpu = [r for r in requires("vllm-d2f") or [] if r.startswith(("vllm<", "vllm>"))]
    assert [sorted(r.partition(";")[0].strip()[4:].split(",")) for r in gpu] == [
        sorted(machinery.SUPPORTED_VLLM.split(","))
    ]
