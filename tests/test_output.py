# SPDX-License-Identifier: Apache-2.0
"""No command replaces what this package did not write. A closed pipe brings no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_d2f.output import OutputError, check_output, disk_is_full

ROOT = Path(__file__).resolve().parents[1]
THEIRS = "did not write it; name another place, or move it away"


def test_a_file_of_the_users_is_kept(tmp_path):
    file = tmp_path / "notes.txt"
    check_output(file)
    file.touch()
    check_output(file)  # nothing is lost
    file.write_text("mine")
    with pytest.raises(OutputError, match=f"notes.txt: exists, and vllm-d2f {THEIRS}"):
        check_output(file)
    file.write_text("made by vllm-d2f")
    check_output(file)
    check_output(Path(os.devnull))
    with pytest.raises(OutputError, match="no such folder to write into"):
        check_output(tmp_path / "missing" / "a.json")
    with pytest.raises(OutputError, match="no such folder to write into"):
        check_output(file / "a.json")
    with pytest.raises(OutputError, match=THEIRS):
        (tmp_path / "folder" / "inner").mkdir(parents=True)
        check_output(tmp_path / "folder")


def test_files_beside_a_new_one_are_kept(tmp_path):
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    picture.write_bytes(b"mine")
    with pytest.raises(OutputError, match=f"a.png: exists, and vllm-d2f {THEIRS}"):
        check_output(file, beside=[picture])
    file.write_text("vllm-d2f")
    check_output(file, beside=[picture])


def test_a_folder_is_known_by_its_mark(tmp_path):
    folder = tmp_path / "a" / "b"
    check_output(folder, "mark")
    folder.mkdir(parents=True)
    check_output(folder, "mark")
    (folder / "other").touch()
    with pytest.raises(OutputError, match=THEIRS):
        check_output(folder, "mark")
    (folder / "mark").write_text("theirs")
    with pytest.raises(OutputError, match=THEIRS):
        check_output(folder, "mark")
    check_output(folder, "mark", text="")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=THEIRS):
        check_output(tmp_path / "file", "mark", text="")


def test_a_full_disk_by_every_librarys_words():
    words = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
    assert disk_is_full(RuntimeError(words))
    assert disk_is_full(Exception("I/O error: No space left on device (os error 28)"))
    assert disk_is_full(OSError(28, "x")) and not disk_is_full(OSError(13, "No access"))


# Every command that writes where it is told. The bundle would clear the folder, others the file.
WRITERS = (
    ["vllm_d2f.demo", "--json", "{file}"],
    ["vllm_d2f.watch", "--html", "{file}"],
    ["vllm_d2f.watch", "--gif", "{file}"],
    ["vllm_d2f", "merge", "--base", "b", "--adapter", "a", "--force", "--out", "{folder}"],
    ["benchmarks.attention", "--quick", "--clock", "cpu", "--json", "{file}"],
    ["benchmarks.attention", "--quick", "--clock", "cpu", "--json", "{folder}/a.json"],
    ["benchmarks.attention", "--quick", "--restart", "--json", "{folder}/b.json"],
    ["benchmarks.offline.bundle", "--out", "{folder}"],
    ["training.restore", "{file}", "--out", "{file}"],
    ["training.experiments", "--teacher", "{file}", "--out", "x", "--results", "{folder}/a"],
)


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: " ".join(words[:2]))
def test_no_command_replaces_what_is_the_users(words, tmp_path):
    file, folder = tmp_path / "mine.txt", tmp_path / "mine"
    folder.mkdir()
    mine = {file, folder / "a.md", folder / "b.jsonl"}
    for path in mine:
        path.write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", *(word.format(file=file, folder=folder) for word in words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert THEIRS in done.stderr, done.stderr
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == mine
    assert {path.read_text() for path in mine} == {"mine"}


@pytest.mark.parametrize(
    "words",
    [
        ["vllm_d2f.watch", "--no-ar", "--max-tokens", "32"],
        ["vllm_d2f", "models"],
        ["training.train", "--config", "training/configs/tiny.yaml", "--print-config"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe_is_no_error(words):
    """As `| head -0` closes it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=300
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b"", done.stderr


def test_the_demo_finds_a_missing_folder_before_it_runs(tmp_path):
    file = tmp_path / "missing" / "a.json"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_d2f.demo", "--json", file], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no such folder to write into" in done.stderr
    assert done.stdout == ""


def test_what_the_viewer_wrote_it_writes_again(tmp_path):
    from vllm_d2f.watch.__main__ import main

    files = [tmp_path / "a.gif", tmp_path / "a.html"]
    command = ["--no-ar", "--max-tokens", "32", "--gif", str(files[0]), "--html", str(files[1])]
    for _ in range(2):
        assert main(command) == 0
    assert files[1].read_text().count("vllm-d2f")
