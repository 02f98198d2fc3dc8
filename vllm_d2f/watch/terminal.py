# SPDX-License-Identifier: Apache-2.0
"""Draw pictures in a terminal, in colour and in place, or as plain lines."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_d2f.watch.picture import Picture, State, colours, visible

LEGEND = "_ masked   light: decoded   underlined: by this forward   full colour: committed"


def render(question: str, pictures: Sequence[Picture]) -> RenderableType:
    """Return what `rich` shows after one forward: the models side by side."""
    table = Table.grid(expand=True, padding=(0, 1))
    for position in range(len(pictures)):
        table.add_column(ratio=3 if position == 0 else 2)
    table.add_row(*(_panel(picture) for picture in pictures))
    return Group(Text(visible(question), style="bold"), table, Text(LEGEND, style="dim"))


def plain(pictures: Sequence[Picture]) -> str:
    """Return the same as lines without colours, for a pipe or a file."""
    lines = []
    for picture in pictures:
        lines.append(f"{visible(picture.name)}: {picture.caption}")
        for number, block in enumerate(picture.blocks, start=1):
            cells = "".join(cell.text for cell in block.cells)
            label = f"block {number} {block.phase}"
            lines.append(f"  {label:<18} {cells}" if len(picture.blocks) > 1 else f"  {cells}")
    return "\n".join(lines)


def _panel(picture: Picture) -> Panel:
    rows = Table.grid(padding=(0, 1))
    for index, block in enumerate(picture.blocks):
        strong, light = colours(index)
        line = Text()
        for cell in block.cells:
            style = {
                State.MASK: f"dim {strong}",
                State.NEW: f"bold underline #000000 on {light}",
                State.DECODED: f"#000000 on {light}",
                State.COMMITTED: f"#ffffff on {strong}",
            }[cell.state]
            line.append(cell.text, style=style)
            line.append(" " if cell.state == State.MASK else "")
        rows.add_row(Text(block.phase, style="dim"), line)
    return Panel(
        rows,
        title=Text(visible(picture.name), style="bold"),
        subtitle=Text(picture.caption),
        border_style="green" if picture.done else "dim",
    )
