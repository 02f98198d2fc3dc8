# SPDX-License-Identifier: Apache-2.0
"""Every command and program in README, docs/ and the folders' READMEs is run by a named test, or
its parser is run here.

The table below says which. A command that no row knows fails, so that none gets into a document
without a proof; so does a row that names a test which is not there.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import setuptools  # noqa: F401  # before anything imports distutils, which it replaces

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "deploy/README.md",
    "examples/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)

# How a command is proved, first match counts. A test: it runs the command, or the same with other
# files and sizes. PARSED: it needs a GPU, the Hub, minutes or a running server, and the program's
# own parser takes it. Where there is a parser it is run for the others too.
PARSED = "parsed"
HUB = "tests/hub/test_prepare.py::test_the_command_from_first_to_last"
PROOFS: tuple[tuple[str, str], ...] = (
    (r"make demo-text", PARSED),
    (r"make demo", "tests/test_demo.py::test_the_whole_demo"),
    (r"make (setup|serve|test|test-\w+|lint|models|stress|gpu-bundle)( EXTRA=\w+)?", PARSED),
    (r"make docs", "tests/test_docs.py::test_the_site_builds"),
    (r"source \.venv/bin/activate", PARSED),
    (r"vllm serve --config examples/serve.yaml", "tests/test_examples.py::test_the_client"),
    (r"vllm serve d2f-tiny .*", "tests/http/test_readme_examples.py::test_the_curl_line"),
    (r"vllm serve .*d2f-(dream-7b|llada-8b)", "tests/hub/test_serve_by_name.py"),
    (r"vllm serve FOLDER .*", PARSED),
    (r"vllm run-batch .*", "tests/test_examples.py::test_run_batch"),
    (r"curl .*/v1/completions .*", "tests/http/test_readme_examples.py::test_the_curl_line"),
    (r"python -m vllm_d2f", "tests/hub/test_prepare.py::test_the_report"),
    (r"vllm-d2f( doctor.*| --help)?", "tests/test_doctor.py::test_the_command"),
    (r"python -m vllm_d2f (models|prepare|merge|rm)\b.*", HUB),
    (r"python -m vllm_d2f\.demo.*", "tests/test_demo.py::test_the_whole_demo"),
    (r"python -m vllm_d2f\.watch.*", "tests/test_watch.py::test_the_command"),
    (r"python examples/client\.py", "tests/test_examples.py::test_the_client"),
    (r"python examples/offline\.py", "tests/test_examples.py::test_offline"),
    (r"bash examples/lm_eval\.sh", "tests/test_examples.py::test_lm_eval"),
    (r"python -m benchmarks\.evaluate", "tests/benchmarks/test_evaluate.py::test_quick"),
    (r"python -m benchmarks\.parity.*", "tests/engine/test_parity.py::test_every_setting"),
    (r"python -m benchmarks\.throughput.*", "tests/benchmarks/test_throughput.py"),
    (r"python -m benchmarks\.latency.*", "tests/benchmarks/test_latency.py"),
    (r"python -m benchmarks\.structured.*", "tests/engine/test_structured.py"),
    (r"(\.venv/bin/)?python -m benchmarks\.[\w.]+.*", PARSED),
    (r"python -m training\.train .*--smoke", "tests/training/test_train_run.py"),
    (r"python -m training\.\w+ .*", PARSED),
    (r"accelerate launch .* -m training\.train .*", PARSED),
    (r"docker .*", "tests/test_deploy.py"),
    (r"pip wheel .*", "tests/test_docs.py::test_the_wheel"),
    (r"pip install '(\.|vllm-d2f|dist/[\w.-]+\.whl)\[[\w,-]+\]'", PARSED),
    (r"(\.venv/bin/)?pre-commit install", PARSED),
)
# The programs, by a line of theirs.
PROGRAMS = {
    "import openai": "tests/http/test_readme_examples.py::test_the_client",
    "from vllm import LLM": "tests/test_readme.py::test_the_offline_example_answers",
    "# vllm_d2f/": "tests/test_docs.py::test_quoted_code_is_that_of_its_file",
}


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return the commands of all documents, each once: fenced, or indented by four spaces."""
    found = []
    for document in DOCUMENTS:
        # A block inside a list is indented as a whole.
        blocks = re.findall(r"^ *```(?:bash|console|sh)\n(.*?)^ *```", text(document), re.M | re.S)
        outside = re.sub(r"^ *```.*?^ *```", "", text(document), flags=re.M | re.S)
        plain = outside.replace("\\\n", " ")
        blocks += re.findall(r"^ {4}(?:python|pip|vllm|make) .*$", plain, re.M)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # the command's environment
                words.pop(0)
            if words:
                found.append(shlex.join(words))
    return list(dict.fromkeys(found))


def programs() -> list[str]:
    blocks = [re.findall(r"^ *```python\n(.*?)^ *```", text(d), re.M | re.S) for d in DOCUMENTS]
    return [program for found in blocks for program in found]


def proof(command: str) -> str | None:
    return next((by for pattern, by in PROOFS if re.fullmatch(pattern, command)), None)


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse(text(file))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


COMMANDS = commands()


def test_there_are_commands():
    assert len(COMMANDS) > 20
    assert {command.split()[0] for command in COMMANDS} >= {"make", "vllm", "python", "curl"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_proof(command):
    assert proof(command), f"say in PROOFS how this is tested: {command}"


@pytest.mark.parametrize("by", sorted({by for _, by in PROOFS} | set(PROGRAMS.values())))
def test_every_proof_is_there(by):
    if by != PARSED:
        file, _, name = by.partition("::")
        names = names_in(file)
        assert name in names if name else any(known.startswith("test_") for known in names)


@pytest.mark.parametrize("program", programs())
def test_every_program_compiles_and_has_a_proof(program):
    if not program.startswith("# vllm_d2f/"):  # the quoted lines of a file
        ast.parse(program)
    assert [by for line, by in PROGRAMS.items() if line in program], "say in PROGRAMS who runs it"


class Parsed(Exception):
    """The parser took the arguments; the program goes no further."""


@contextlib.contextmanager
def only_parsing(words):
    """`sys.argv`, and argument parsers that stop the program once they are content."""
    argv, environment = sys.argv, dict(os.environ)
    parsers = {
        name: getattr(argparse.ArgumentParser, name)
        for name in ("parse_args", "parse_intermixed_args")
    }

    def stopping(parse):
        def stop(self, *args, **kwargs):
            raise Parsed(parse(self, *args, **kwargs))

        return stop

    for name, parse in parsers.items():
        setattr(argparse.ArgumentParser, name, stopping(parse))
    sys.argv = [words[0], *words[1:]]
    try:
        yield
    finally:
        for name, parse in parsers.items():
            setattr(argparse.ArgumentParser, name, parse)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


def parse_module(module, arguments):
    with only_parsing([module, *arguments]), pytest.raises(Parsed):
        # Imported by name first: what an earlier test imported stays the same object.
        runpy.run_module(module, run_name="__main__", alter_sys=False)


def parse_python(words):
    if words[0] == "-m":
        parse_module(words[1], words[2:])
        if words[1] == "training.train":
            check_training(words[2:])
    else:
        with only_parsing(words), pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def check_training(arguments):
    """Check that the YAML file and the overrides are valid: `--print-config` accepts them."""
    from training.train import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*arguments, "--print-config"])
    assert json.loads(out.getvalue())["stages"]


def parse_vllm(words):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_d2f.settings import settings_from_dict

    verb, *arguments = words
    if verb == "run-batch":
        from vllm.entrypoints.launchers.run_batch import make_arg_parser

        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        assert (ROOT / parsed.input_file).is_file()
        return
    assert verb == "serve", f"vllm {verb}: say here which parser it has"
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    if section := (parsed.additional_config or {}).get("d2f"):
        settings_from_dict(section)


def parse_accelerate(words):
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    parsed = launch_command_parser().parse_args(words[1:])
    assert parsed.module
    parse_python(["-m", parsed.training_script, *parsed.training_script_args])


def parse_make(words):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parse_pip(words):
    from packaging.requirements import Requirement
    from packaging.utils import parse_wheel_filename

    project = tomllib.loads(text("pyproject.toml"))["project"]
    verb, *requirements = words
    if verb == "wheel":
        from pip._internal.commands import create_command

        _, (folder,) = create_command(verb).parse_args(requirements)
        assert (ROOT / folder / "pyproject.toml").is_file()
        return
    assert verb == "install", f"pip {verb}: say here how it is checked"
    for requirement in requirements:
        place, bracket, extras = requirement.partition("[")
        if place.endswith(".whl"):
            name, version, *_ = parse_wheel_filename(Path(place).name)
            assert (name, str(version)) == (project["name"], project["version"])
        elif place != ".":
            assert place == project["name"]
        requirement = Requirement(project["name"] + bracket + extras)
        assert requirement.extras <= set(project["optional-dependencies"])


def parse_source(words):
    """`make setup` makes the file with the environment."""
    assert words == [".venv/bin/activate"]


def parse_bash(words):
    done = subprocess.run(["bash", "-n", words[0]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parse_precommit(words):
    import yaml

    assert words == ["install"]
    for repository in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]:
        assert repository["hooks"]


def parse_curl(words):
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] and any(word.startswith("http://localhost:8000/") for word in words)


def parse_docker(words):
    """Docker's own parser needs its daemon: the files it is given have to be there."""
    for option, name in zip(words, words[1:], strict=False):
        assert option != "-f" or (ROOT / name).is_file()


PARSERS = {
    "accelerate": parse_accelerate,
    "bash": parse_bash,
    "curl": parse_curl,
    "docker": parse_docker,
    "make": parse_make,
    "pip": parse_pip,
    "pre-commit": parse_precommit,
    "python": parse_python,
    "source": parse_source,
    "vllm": parse_vllm,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    PARSERS[Path(program).name](words)


@pytest.mark.parametrize(
    "command",
    [
        "python -m vllm_d2f.demo --no-such-option",
        "python -m benchmarks.evaluate --task nothing",
        "vllm serve d2f-tiny --no-such-option",
        'vllm serve d2f-tiny --additional-config \'{"d2f": {"block_size": 0}}\'',
        "make no-such-target",
        "pip install 'vllm-d2f[nothing]'",
        "pip install 'dist/vllm_d2f-9.9.9-py3-none-any.whl[cpu]'",
    ],
)
def test_wrong_commands_do_not_parse(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    with pytest.raises((SystemExit, AssertionError, ValueError, pytest.fail.Exception)):
        PARSERS[program](words)
