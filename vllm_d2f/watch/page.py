# SPDX-License-Identifier: Apache-2.0
"""Draw pictures as one HTML file that plays them and steps through them, without a network.

The file holds every frame as escaped markup, and the script chooses which one to show. A browser
without scripts shows the last one.
"""

from collections.abc import Sequence
from html import escape

from vllm_d2f.watch.picture import PALETTE, Picture, State, colours

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
 color:#1b1f24;background:#fff}
.runs{display:flex;flex-wrap:wrap;gap:1rem}.run{flex:1 1 24rem;border:1px solid #c8ced6;
 border-radius:8px;padding:.5rem 1rem 1rem}.run h2{font-size:1rem;margin:.2rem 0}
.frame{display:none}.frame.on{display:block}.caption{color:#4b5a6b;font-size:.85rem}
.block{display:flex;gap:.5rem;margin:.4rem 0}.phase{flex:0 0 5.5rem;color:#4b5a6b;font-size:.8rem}
.cell{display:inline-block;min-width:.7em;padding:0 .2em;margin:1px;border-radius:3px;
 border:1px solid transparent;font-family:ui-monospace,monospace;white-space:pre}
.mask{color:#8a94a0}.new{outline:2px solid #1b1f24;font-weight:700}
nav{display:flex;gap:.4rem;align-items:center;margin:1rem 0}nav input{flex:1}
button{font:inherit;padding:.1rem .6rem}
"""

SCRIPT = """
const runs = [...document.querySelectorAll(".run")].map(r => [...r.querySelectorAll(".frame")]);
const last = Math.max(...runs.map(frames => frames.length)) - 1;
const at = id => document.getElementById(id);
let now = last, timer = null;
function show(tick) {
  now = Math.min(Math.max(tick, 0), last);
  for (const frames of runs)
    frames.forEach((f, i) => f.classList.toggle("on", i === Math.min(now, frames.length - 1)));
  at("slider").value = now;
  at("count").textContent = `forward ${now + 1} of ${last + 1}`;
}
function pause() { clearInterval(timer); timer = null; at("play").textContent = "Play"; }
function play() {
  if (timer) return pause();
  if (now === last) show(0);
  at("play").textContent = "Pause";
  timer = setInterval(() => now < last ? show(now + 1) : pause(), Number(at("speed").value));
}
function step(by) { pause(); show(now + by); }
at("slider").max = last;
at("slider").oninput = e => { pause(); show(Number(e.target.value)); };
at("play").onclick = play;
at("back").onclick = () => step(-1);
at("next").onclick = () => step(1);
at("speed").onchange = () => { if (timer) { pause(); play(); } };
document.onkeydown = e => {
  if (e.target !== document.body) return;
  if (e.key === "ArrowLeft") step(-1);
  else if (e.key === "ArrowRight") step(1);
  else if (e.key === " ") { e.preventDefault(); play(); }
};
at("controls").hidden = false;
show(0);
"""

CONTROLS = """<nav id="controls" hidden>
<button id="back" aria-label="one forward back">&#9664;</button>
<button id="play">Play</button>
<button id="next" aria-label="one forward on">&#9654;</button>
<input id="slider" type="range" min="0" value="0" aria-label="forward">
<span id="count"></span>
<select id="speed" aria-label="speed"><option value="800">slow</option>
<option value="300" selected>normal</option><option value="80">fast</option></select>
</nav>"""


def page(question: str, runs: Sequence[Sequence[Picture]]) -> str:
    """Return the text of the file, from the pictures of each model, one per forward."""
    title = f"{' and '.join(run[0].name for run in runs)}: {question}"
    # The policy forbids to load anything, should markup of a model ever escape the escaping.
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<meta name="generator" content="vllm-d2f">
<title>{escape(title)}</title>
<style>{STYLE}{_block_styles()}</style></head><body>
<h1>{escape(question)}</h1>
{CONTROLS}
<div class="runs">
{"".join(_run(run) for run in runs)}</div>
<p class="caption">_ masked; light: decoded; outlined: decoded by this forward; full colour:
committed. Semi-activated blocks accept confident tokens only, fully activated ones at least
one.</p>
<script>{SCRIPT}</script>
</body></html>
"""


def _block_styles() -> str:
    """Return style rules for the cells of the blocks b0, b1, ..."""
    return "".join(
        f".b{index} .mask{{border-color:{light}}}.b{index} .new,.b{index} .decoded"
        f"{{background:{light};border-color:{strong}}}"
        f".b{index} .committed{{background:{strong};color:#fff}}\n"
        for index, (strong, light) in enumerate(map(colours, range(len(PALETTE))))
    )


def _run(run: Sequence[Picture]) -> str:
    frames = "".join(_frame(picture, picture is run[-1]) for picture in run)
    return f'<section class="run"><h2>{escape(run[0].name)}</h2>{frames}</section>\n'


def _frame(picture: Picture, on: bool) -> str:
    blocks = []
    for index, block in enumerate(picture.blocks):
        cells = "".join(
            f'<span class="cell {cell.state}"'
            + f' title="confidence {cell.confidence:.3f}"' * (cell.state != State.MASK)
            + f">{escape(cell.text)}</span>"
            for cell in block.cells
        )
        blocks.append(
            f'<div class="block b{index % len(PALETTE)}"><span class="phase">{block.phase}</span>'
            f"<div>{cells}</div></div>"
        )
    caption = f'<div class="caption">{escape(picture.caption)}</div>'
    return f'<div class="frame{" on" * on}">{caption}{"".join(blocks)}</div>\n'
