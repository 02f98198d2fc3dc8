# SPDX-License-Identifier: Apache-2.0
"""The house style of pictures: PNG, 1600 pixels wide, read at 800."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLORS = {"d2f": "#1b6ca8", "ar": "#d1495b", "vanilla": "#7a7a7a", "more": "#6a994e"}
NAMES = {"d2f": "D2F", "ar": "autoregressive", "vanilla": "vanilla diffusion"}


def new_figure(height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure 1600 pixels wide: sharp at 800 on a display with double resolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(
        1, columns, figsize=(8, height), dpi=200, sharey=True, layout="constrained"
    )
    for one in figure.axes:
        one.set_axisbelow(True)
        one.grid(alpha=0.3)
    return figure, axes


def logarithmic(axes: Any, x: str, y: str, base: int = 2, few_decades: bool = False) -> None:
    """Make the axes logarithmic (x to `base`), with these labels and plain numbers for powers.

    With `few_decades`, 2 and 5 are marked beside 1 and 10.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    if few_decades:
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x, ylabel=y)


def legend_below(axes: Any) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    axes.legend(fontsize=10, frameon=False, **place)


def label_simulated(axes: Any, report: Mapping[str, Any]) -> None:
    """Write over the picture that acceptance was simulated, if it was."""
    if (made_up := report.get("simulated_tokens_per_forward")) is not None:
        text = f"SIMULATED ACCEPTANCE: {made_up:g} tokens per forward, no score"
        axes.set_title(text, color=COLORS["ar"], fontsize=11)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file, so that the same figure is the same file.
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
