# SPDX-License-Identifier: Apache-2.0
"""Draw pictures as an animated GIF with one frame per forward, for a README or a talk."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_d2f.watch.picture import Picture, State, colours, together

WIDTH, MARGIN, FONT_SIZE = 900, 16, 14
LINE = 25
LABEL = 92  # width of the text that names a block's phase
SHARES = (0.52, 0.48)  # of the width, for the D2F model and the other one
INK, GREY, WHITE = "#1b1f24", "#6b7682", "#ffffff"
HOLD = 4  # the last frame is shown so many times as long as the others


def write_gif(
    path: Path, question: str, runs: Sequence[Sequence[Picture]], delay: float = 0.3
) -> None:
    """Write the file.

    Args:
        runs: the pictures of each model, one per forward.
        delay: seconds per frame.

    Raises:
        ImportError: matplotlib, which brings Pillow and a font, is not installed.
    """
    try:
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            "--gif needs Pillow and a font, which matplotlib brings: pip install matplotlib"
        ) from error
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(str(folder / "DejaVuSansMono.ttf"), FONT_SIZE)
    shares = SHARES if len(runs) > 1 else (1.0,)
    panels, left = [], float(MARGIN)
    for run, share in zip(runs, shares, strict=True):
        width = (WIDTH - 2 * MARGIN) * share
        panels.append(_Panel(run, font, left, width - (MARGIN if run is not runs[-1] else 0)))
        left += width
    head = textwrap.wrap(question, int((WIDTH - 2 * MARGIN) / font.getlength("m"))) or [""]
    top = MARGIN + LINE * len(head) + LINE // 2
    height = top + max(panel.height for panel in panels) + MARGIN
    images = []
    for pictures in together(*runs):
        image = Image.new("RGB", (WIDTH, height), WHITE)
        canvas = ImageDraw.Draw(image)
        for number, line in enumerate(head):
            canvas.text((MARGIN, MARGIN + number * LINE), line, fill=INK, font=font)
        for panel, picture in zip(panels, pictures, strict=True):
            panel.draw(canvas, top, picture)
        # Text on plain ground needs few colours, and the file is a third of the size with them.
        images.append(image.quantize(64))
    duration = [int(delay * 1000)] * len(images)
    duration[-1] *= HOLD
    images[0].save(
        path, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0,
        optimize=True, comment=b"vllm-d2f",
    )  # fmt: skip


class _Panel:
    """The places of one model's cells. They are the same in every frame, so that no cell moves."""

    def __init__(self, run: Sequence[Picture], font: Any, left: float, width: float) -> None:
        self.left, self.font = left, font
        self.labelled = max(len(picture.blocks) for picture in run) > 1
        widest: dict[tuple[int, int], float] = {}
        for row, block in (place for picture in run for place in enumerate(picture.blocks)):
            for column, cell in enumerate(block.cells):
                old = widest.get((row, column), 0)
                widest[row, column] = max(old, font.getlength(cell.text) + 8)
        start = left + (LABEL if self.labelled else 0)
        self.places: dict[tuple[int, int], tuple[float, float, float]] = {}
        x, y = start, 2.0 * LINE
        self.rows: dict[int, float] = {}
        for (row, column), size in sorted(widest.items()):
            if row not in self.rows:
                y += LINE if self.rows else 0
                x, self.rows[row] = start, y
            if x + size > left + width and x > start:
                x, y = start, y + LINE
            self.places[row, column] = (x, y, size - 3)
            x += size
        self.height = int(y + LINE)

    def draw(self, canvas: Any, top: int, picture: Picture) -> None:
        """Draw one frame of this model."""
        canvas.text((self.left, top), picture.name, fill=INK, font=self.font)
        canvas.text((self.left, top + LINE), picture.caption, fill=GREY, font=self.font)
        for row, block in enumerate(picture.blocks):
            if self.labelled:
                place = (self.left, top + self.rows[row])
                canvas.text(place, str(block.phase), fill=GREY, font=self.font)
            strong, light = colours(row)
            for column, cell in enumerate(block.cells):
                x, y, size = self.places[row, column]
                y += top
                fill, ink, edge = {
                    State.MASK: (WHITE, GREY, light),
                    State.NEW: (light, INK, INK),
                    State.DECODED: (light, INK, light),
                    State.COMMITTED: (strong, WHITE, strong),
                }[cell.state]
                box = (x, y - 2, x + size, y + LINE - 7)
                canvas.rounded_rectangle(box, radius=3, fill=fill, outline=edge)
                canvas.text((x + 3, y), cell.text, fill=ink, font=self.font)
