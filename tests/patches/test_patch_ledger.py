# SPDX-License-Identifier: Apache-2.0
"""The machinery of `vllm_d2f.patches`, on a made-up upstream module."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
from vllm_d2f.patches import __main__ as command
from vllm_d2f.patches import patch as machinery
from vllm_d2f.patches.patch import Patch, check_sources, patch, replace, source_hash

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
    monkeypatch.setattr(patches, "configs", {})
    return module


def plus_one(original):
    def method(self, a):
        return original(self, a) + 1

    return method


METHOD = "made_up_upstream:Thing.method"
FLAG, BUILD = "made_up_upstream:Thing.flag", "made_up_upstream:Thing.build"


def made_up(*targets: str, **changes) -> Patch:
    values = dict(
        apply="process",
        why="",
        how="",
        upstream="",
        remove_when="",
        when="the moon is full",
        written_against={METHOD: source_hash(Upstream.method)},
    )

    @patch(*(targets or (METHOD,)), **(values | changes))
    def p99_made_up(original, self, *args, **kwargs):
        return original(self, *args, **kwargs) + 1

    return p99_made_up


def apply_all() -> None:
    patches.apply("process")


def test_applying_twice_wraps_once(upstream, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", (made_up(),))
    assert patches.applied() == {"p99_made_up": "not in this process: for every vLLM process"}
    for _ in range(2):
        apply_all()
        monkeypatch.setattr(patches, "_applied", dict(patches._applied))
    assert upstream.Thing().method(1) == 2
    patches._applied.clear()  # as in a second module object: the mark on the target still counts
    apply_all()
    assert upstream.Thing().method(1) == 2
    assert upstream.Thing.method._d2f_original is Upstream.method
    assert patches.applied() == {"p99_made_up": "applied"}


def test_a_patch_that_is_not_needed_is_skipped_with_the_reason(upstream, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", (made_up(needed=lambda config: False),))
    apply_all()
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
        apply_all()
    with pytest.raises(RuntimeError, match="does not exist"):  # not remembered as done
        apply_all()


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
    monkeypatch.setattr(patches, "PATCHES", (made_up(written_against={METHOD: "0" * 64}),))
    apply_all()
    apply_all()
    assert [METHOD in record.getMessage() for record in caplog.records] == [True]
    assert upstream.Thing().method(1) == 2
    assert patches.applied() == {"p99_made_up": f"applied (upstream changed: {METHOD})"}


def test_one_replacement_for_several_targets(upstream, monkeypatch):
    upstream.other = lambda self, b: b
    made_up(METHOD, "made_up_upstream:other").install()
    assert upstream.Thing().method(1) == 2 and upstream.other(None, b=1) == 2


def test_a_replacement_that_passes_on_the_rest_names_the_first_parameters(upstream):
    """Their order counts; those that it does not name may change."""
    upstream.Thing.method = lambda self, a, b, *, c: (a, b, c)

    @patch(METHOD, apply="process", why="", how="", upstream="", remove_when="", written_against={})
    def p99_passes_on(original, self, a, *args, **kwargs):
        return original(self, a + 1, *args, **kwargs)

    p99_passes_on.install()
    assert upstream.Thing().method(1, 2, c=3) == (2, 2, 3)
    upstream.Thing.method = lambda self, b, a: a
    with pytest.raises(RuntimeError, match=r"takes \['self', 'b', 'a'\], expected \['self', 'a'\]"):
        p99_passes_on.install()


def test_the_replacement_has_the_signature_and_the_name_of_the_original(upstream):
    made_up().install()
    found = upstream.Thing.method
    assert str(inspect.signature(found)) == "(self, a: int) -> int"
    assert found.__name__ == "method" and found.__doc__ == Upstream.method.__doc__


def test_a_patch_without_targets_is_called(monkeypatch):
    called = []

    @patch(apply="worker", why="", how="", upstream="", remove_when="", written_against={})
    def p99_setup():
        called.append(1)

    monkeypatch.setattr(patches, "PATCHES", (p99_setup,))
    assert patches.applied() == {"p99_setup": "not in this process: for workers of a D2F model"}
    patches.apply("worker", "config")
    assert called == [1] and patches.applied() == {"p99_setup": "applied"}


def test_each_point_applies_its_own_patches(upstream, monkeypatch):
    asked = []
    for_workers = made_up(apply="worker", needed=lambda config: asked.append(config) or True)
    monkeypatch.setattr(patches, "PATCHES", (for_workers,))
    patches.apply("process")
    patches.apply("server", "of the server")
    assert upstream.Thing().method(1) == 1 and asked == []
    patches.apply("worker", "of the worker")
    assert upstream.Thing().method(1) == 2 and asked == ["of the worker"]
    assert patches.configs == {
        "process": None,
        "server": "of the server",
        "worker": "of the worker",
    }


def test_a_later_worker_may_need_what_the_first_did_not(upstream, monkeypatch):
    """As with FULL CUDA graphs: two engines of one process, one with graphs."""
    monkeypatch.setattr(patches, "PATCHES", (made_up(apply="worker", needed=bool),))
    patches.apply("worker", "")
    assert upstream.Thing().method(1) == 1
    patches.apply("worker", "graphs")
    assert upstream.Thing().method(1) == 2
    patches.apply("worker", "")
    assert patches.applied() == {"p99_made_up": "applied"}


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
        replace("p99", FLAG, make_flag)
        replace("p99", BUILD, make_build)
    assert upstream.Thing().flag is True
    assert upstream.Thing.build() == "Thing!"
    assert type("Heir", (upstream.Thing,), {}).build() == "Heir!"
    # The hash is that of the original, also once replaced.
    expected = {FLAG: source_hash(Upstream.flag.fget)}
    assert check_sources("p99", expected) == []


def test_importing_the_package_imports_no_vllm():
    heavy = {"vllm", "torch", "numpy"}
    code = f"import sys, vllm_d2f.patches; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_page_is_in_sync():
    text = command.PAGE.read_text(encoding="utf-8")
    assert command.page() == text, "run: python -m vllm_d2f.patches --write"


def test_ledger_is_complete():
    for one in patches.PATCHES:
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if field.name not in ("replacements", "setup"):
                assert value, f"{one.name} has no {field.name}"
            assert not isinstance(value, str) or "|" not in value, "breaks the table"
        assert bool(one.replacements) != bool(one.setup), one.name
        assert set(one.replacements) <= set(one.written_against), one.name
    names = [one.name for one in patches.PATCHES]
    assert names == sorted(set(names))


def test_every_file_with_a_patch_is_in_the_ledger():
    """Each function under `@patch` is one of PATCHES, so that none is declared and forgotten."""
    folder = Path(patches.__file__).parent
    declared = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
                if any(isinstance(call, ast.Name) and call.id == "patch" for call in calls):
                    declared.add(node.name)
    assert declared == {one.name for one in patches.PATCHES}


def test_supported_version_is_stated_once():
    from importlib.metadata import requires

    gpu = [r for r in requires("vllm-d2f") or [] if r.startswith(("vllm<", "vllm>"))]
    assert [sorted(r.partition(";")[0].strip()[4:].split(",")) for r in gpu] == [
        sorted(machinery.SUPPORTED_VLLM.split(","))
    ]
