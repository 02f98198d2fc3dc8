# SPDX-License-Identifier: Apache-2.0
"""The viewer shows what the reference loop does, and writes files that open."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from vllm_d2f.hub.names import resolve
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import decode, generate, hf_forward
from vllm_d2f.watch.__main__ import QUESTION, main
from vllm_d2f.watch.decoders import ARDecoder, D2FDecoder, WatchError
from vllm_d2f.watch.gif import write_gif
from vllm_d2f.watch.page import SCRIPT, page
from vllm_d2f.watch.picture import Block, Cell, Phase, Picture, State, together, visible
from vllm_d2f.watch.terminal import plain, render

ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 24
# Small blocks and a threshold that is hardly reached: several open blocks, semi-activated ones too.
SMALL = {"block_size": 4, "max_blocks": 4, "tau_conf": 0.9999, "tau_add": 0.1, "tau_act": 1.0}
HOSTILE = '</span><script>alert("1")</script>&amp;\x1b[31m'


@pytest.fixture(scope="module")
def d2f():
    return D2FDecoder("d2f-tiny", SMALL)


@pytest.fixture(scope="module")
def ar():
    return ARDecoder("ar-tiny")


@pytest.fixture(scope="module")
def runs(d2f, ar):
    return [list(decoder.run(QUESTION, MAX_TOKENS)) for decoder in (d2f, ar)]


def reference(function, d2f):
    """Return the same request through the reference loop, loaded apart from the viewer."""
    model, config = load_hf(resolve("d2f-tiny"))
    return function(
        hf_forward(model),
        d2f.tokenizer(QUESTION).input_ids,
        d2f.settings.params,
        max_tokens=MAX_TOKENS,
        mask_id=config.mask_token_id,
        ends=config.end_token_ids,
        shift=config.logits_shift,
    )


def cells(picture):
    return [cell for block in picture.blocks for cell in block.cells]


def test_the_last_picture_is_the_references_answer(d2f, runs):
    tokens, forwards = reference(generate, d2f)
    last = runs[0][-1]
    assert (last.forward, last.tokens, last.done) == (forwards, len(tokens), True)
    assert last.text == d2f.tokenizer.decode(tokens, skip_special_tokens=True)
    assert last.tokens_per_forward == len(tokens) / forwards
    assert all(block.phase == Phase.COMMITTED for block in last.blocks)


def test_every_picture_is_a_frame(d2f, runs):
    before, phases = 0, set()
    for frame, picture in zip(reference(decode, d2f), runs[0], strict=True):
        shown = cells(picture)
        assert len(shown) == len(frame.tokens)
        masked = [cell.state == State.MASK for cell in shown]
        assert masked == [not decided for decided in frame.decided]
        new = [i for i, cell in enumerate(shown) if cell.state == State.NEW]
        assert new == [i for i in frame.accepted if i < len(shown)]
        for index, block in enumerate(picture.blocks):
            if block.phase == Phase.COMMITTED:
                assert index * 4 < frame.committed
            else:
                active = frame.activated[index - before // 4]
                assert block.phase == (Phase.FULL if active else Phase.SEMI)
            phases.add(block.phase)
        before = frame.committed
    assert Phase.COMMITTED in phases and Phase.FULL in phases


def test_the_other_side_is_transformers_greedy(ar, runs):
    ids = torch.tensor([ar.tokenizer(QUESTION).input_ids])
    out = ar.model.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS)
    tokens = out[0, ids.shape[1] :].tolist()
    last = runs[1][-1]
    assert last.tokens == last.forward == len(runs[1]) == len(tokens)
    assert last.text == ar.tokenizer.decode(tokens, skip_special_tokens=True)
    assert last.done and not any(picture.done for picture in runs[1][:-1])


def test_both_move_by_one_forward_at_a_time(runs):
    ticks = list(together(*runs))
    assert len(ticks) == max(map(len, runs))
    for number, tick in enumerate(ticks, start=1):
        assert [p.forward for p in tick] == [min(number, len(run)) for run in runs]


def hostile_picture():
    cell = Cell(visible(HOSTILE), State.NEW, 0.5)
    mask = Cell("_", State.MASK)
    blocks = (
        Block(Phase.COMMITTED, (Cell("4", State.COMMITTED, 0.9),)),
        Block(Phase.FULL, (cell, Cell("2", State.DECODED, 0.9))),
        Block(Phase.SEMI, (mask, mask)),
    )
    return Picture(HOSTILE, 3, blocks, "4", False)


class Reader(HTMLParser):
    """Collects tags and text; void elements and balance are checked on the way."""

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def classes(reader, name):
    return [attrs for _, attrs in reader.tags if name in attrs.get("class", "").split()]


def test_the_page_has_every_forward_and_shows_the_last_without_scripts(runs):
    reader = Reader(page(QUESTION, runs))
    assert len(classes(reader, "frame")) == sum(map(len, runs))
    assert len(classes(reader, "on")) == len(runs)
    drawn = sum(len(cells(picture)) for run in runs for picture in run)
    assert len(classes(reader, "cell")) == drawn
    ids = {attrs.get("id") for _, attrs in reader.tags}
    assert {"play", "back", "next", "slider", "speed", "count"} <= ids
    loading = {"src", "href", "srcset", "action", "data"}
    assert not [attrs for _, attrs in reader.tags if loading & attrs.keys()]


def test_the_page_is_text_where_the_model_wrote_markup():
    text = page(HOSTILE, [[hostile_picture()]])
    reader = Reader(text)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert visible(HOSTILE) in reader.text and "\x1b" not in "".join(
        cell.text for cell in cells(hostile_picture())
    )


def test_the_script_of_the_page_steps(tmp_path):
    """In Node, on the few properties of a browser's page that it uses."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    stub = """
    const frame = () => ({on: false, classList: {toggle(_, on) { this.o.on = on; }}});
    const link = f => { f.classList.o = f; return f; };
    const sides = [2, 3].map(n => Array.from({length: n}, () => link(frame())));
    const els = {}, el = id => els[id] ??= {value: "80"};
    globalThis.document = {
      body: {}, getElementById: el,
      querySelectorAll: () => sides.map(frames => ({querySelectorAll: () => frames})),
    };
    const seen = () => sides.map(frames => frames.map(f => +f.on).join("")).join(" ");
    """
    tail = """
    const out = [seen()];
    for (const act of [els.next.onclick, els.next.onclick, els.next.onclick, els.back.onclick])
      { act(); out.push(seen()); }
    els.play.onclick();
    setTimeout(() => { out.push(seen(), els.play.textContent); console.log(out.join("|")); }, 600);
    """
    file = tmp_path / "page.js"
    file.write_text(stub + SCRIPT + tail)
    done = subprocess.run([node, file], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "10 100|01 010|01 001|01 001|01 010|01 001|Play"


def test_the_gif_has_one_frame_per_forward(runs, tmp_path):
    from PIL import Image

    file = tmp_path / "watch.gif"
    write_gif(file, QUESTION, runs, delay=0.1)
    with Image.open(file) as image:
        assert image.format == "GIF" and image.n_frames == max(map(len, runs))
        assert image.info["duration"] == 100
        first = image.convert("RGB").tobytes()
        image.seek(image.n_frames - 1)
        assert image.info["duration"] == 400
        assert image.convert("RGB").tobytes() != first
    assert file.stat().st_size < 800_000


def test_the_gif_without_its_library_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_gif(tmp_path / "x.gif", QUESTION, runs)


def test_the_picture_in_the_readme():
    from PIL import Image

    file = ROOT / "docs" / "watch.gif"
    assert file.stat().st_size < 800_000
    with Image.open(file) as image:
        assert image.n_frames > 5


def test_the_terminal_shows_blocks_in_colour_and_no_control_characters():
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", record=True
    )
    console.print(render("[bold]not markup[/bold]", [hostile_picture()]))
    shown = console.export_text(clear=False)
    for part in ("[bold]not markup", "committed", "full", "semi", "\\x1b[31m", "_ _"):
        assert part in shown
    styled = console.export_text(styles=True)
    assert "48;2;0;114;178" in styled, "the first block's own colour"
    assert "48;2;248;223;204" in styled, "the second block's light colour"
    assert "\x1b[31m" not in styled
    assert "\x1b" not in plain([hostile_picture()])


@pytest.mark.parametrize(
    ("text", "shown"), [("a b", "a b"), ("\n", "\\n"), ("", "\\0"), ("\x1b[0m", "\\x1b[0m")]
)
def test_what_does_not_print_is_escaped(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("colour", [False, True])
def test_the_command(colour, tmp_path, capsys, monkeypatch):
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
    files = ["--gif", str(tmp_path / "a.gif"), "--html", str(tmp_path / "a.html")]
    assert main([QUESTION, "--delay", "0", "--max-tokens", "32", "--block-size", "8", *files]) == 0
    out = capsys.readouterr().out
    assert ("\x1b[" in out) is colour
    out = Text.from_ansi(out).plain
    assert "d2f-tiny (block_size 8)" in out and "ar-tiny" in out and "73+24=97" in out
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF"
    assert "d2f-tiny" in (tmp_path / "a.html").read_text()


def test_one_model_alone(capsys):
    assert main(["--no-ar", "--max-tokens", "32"]) == 0
    assert "ar-tiny" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no folder with a config.json"),
        (["--model", "d2f-tny"], "Did you mean"),
        (["--model", "ar-tiny"], r"not one of D2F's \(Dream, llada"),
        (["--ar", "dream-tiny"], "diffusion model"),
        (["--tau-conf", "2"], r"tau_conf must be a number in \[0, 1\]"),
        (["--block-size", "0"], "block_size must be an integer of at least 1"),
        (["--preset", "none"], "unknown preset"),
        (["--max-tokens", "9999"], "more than the 512 positions"),
        (["", "--no-ar", "--raw"], "the question is empty"),
        (["--gif", "no/such/folder/a.gif"], "no such folder"),
    ],
)
def test_what_cannot_be_watched_is_refused(arguments, message, capsys):
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--max-tokens", "0"], ["--delay", "-1"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "must be" in capsys.readouterr().err


def test_a_model_without_settings_asks_for_them(tmp_path):
    folder = shutil.copytree(resolve("d2f-tiny"), tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    del config["d2f"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WatchError, match="--preset NAME or --block-size N"):
        D2FDecoder(str(folder), {})
    assert D2FDecoder(str(folder), {"block_size": 8}).settings.params.block_size == 8
