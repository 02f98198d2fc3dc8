# SPDX-License-Identifier: Apache-2.0
"""Watch a D2F model decode a question, beside an autoregressive model.

    python -m vllm_d2f.watch "a question" [--gif FILE] [--html FILE]

There is one picture per forward. Each block has a colour; `_` is masked, light is decoded, full
colour is committed. The forwards are those of the engine. The seconds are not, because the
reference loop recomputes the whole sequence in each forward.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_d2f.output import check_output, ends_with_its_pipe

if TYPE_CHECKING:
    from vllm_d2f.watch.picture import Picture

QUESTION = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"
SETTINGS = ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf", "accept", "preset")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m vllm_d2f.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    made.add_argument("--model", default="d2f-tiny", help="a D2F model: name or folder")
    ar = "the autoregressive model (default: the twin of a model by name, where there is one)"
    made.add_argument("--ar", metavar="MODEL", help=ar)
    made.add_argument("--no-ar", action="store_true", help="the D2F model alone")
    made.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="answer length")
    pause = "seconds between forwards"
    made.add_argument("--delay", type=_seconds, default=0.3, metavar="S", help=pause)
    made.add_argument("--raw", action="store_true", help="ask without the chat template")
    made.add_argument("--gif", type=Path, metavar="FILE", help="write an animation")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a page to step through")
    group = made.add_argument_group("D2F settings, else the model's")
    for name, kind, about in (
        ("block-size", int, "positions per block"),
        ("max-blocks", int, "most blocks that are open at once"),
        ("tau-add", float, "open the next block at this decoded fraction of the last one"),
        ("tau-act", float, "a block must make progress at this fraction of its predecessor"),
        ("tau-conf", float, "accept a token whose probability is greater"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar=kind.__name__[0].upper(), help=about)
    group.add_argument("--accept", metavar="RULE", help="the acceptance rule; needs --tau-conf")
    group.add_argument("--preset", metavar="NAME", help="published settings, such as dream-gsm8k")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 2 if a model, setting or file cannot be used."""
    options = parser().parse_args(arguments)
    # Loading is quick, and progress bars and advice would move the picture down.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        watch(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@ends_with_its_pipe()
def watch(options: argparse.Namespace) -> None:
    """Load the models, show them decoding, and write the files.

    Raises:
        ValueError: a model, setting or question cannot be decoded.
        OSError: a file cannot be written.
        ImportError: `--gif` is given and matplotlib is not installed.
    """
    from vllm_d2f.hub.names import known_names
    from vllm_d2f.watch.decoders import ARDecoder, D2FDecoder
    from vllm_d2f.watch.page import page
    from vllm_d2f.watch.picture import together

    for file in filter(None, (options.gif, options.html)):
        check_output(file)
    given = {name: getattr(options, name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    decoders: list[D2FDecoder | ARDecoder] = [D2FDecoder(options.model, given, options.raw)]
    twin = options.model.replace("d2f-", "ar-", 1)
    other = options.ar or (twin if twin != options.model and twin in known_names() else None)
    if other and not options.no_ar:
        decoders.append(ARDecoder(other, options.raw))

    runs = [decoder.run(options.question, options.max_tokens) for decoder in decoders]
    ticks = _show(options.question, together(*runs), options.delay)
    # A run that has ended repeats its last picture; take each picture once.
    unique = [list(dict.fromkeys(tick[index] for tick in ticks)) for index in range(len(runs))]
    if options.html:
        options.html.write_text(page(options.question, unique), encoding="utf-8")
    if options.gif:
        from vllm_d2f.watch.gif import write_gif

        write_gif(options.gif, options.question, unique, options.delay)


def _show(
    question: str, ticks: "Iterator[tuple[Picture, ...]]", delay: float
) -> "list[tuple[Picture, ...]]":
    """Print while decoding, in place on a terminal, else as lines. Return all pictures."""
    from rich.console import Console
    from rich.live import Live

    from vllm_d2f.watch.terminal import plain, render

    console = Console()
    seen: list[tuple[Picture, ...]] = []
    if not console.is_terminal:
        print(question)
        for pictures in ticks:
            seen.append(pictures)
            print(f"\nforward {len(seen)}\n{plain(pictures)}", flush=True)
        return seen
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for pictures in ticks:
            if seen:
                time.sleep(delay)
            seen.append(pictures)
            live.update(render(question, pictures), refresh=True)
    return seen


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 60:
        raise argparse.ArgumentTypeError(f"must be in [0, 60], got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
