"""Figures of pages, by matplotlib: curves, heat maps, and points of two objectives."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 8.0, 3.6
"""Inches."""

MOST_ROWS = 64
"""Of a heat map with their names; names of more could not be read."""


def svg(figure: Figure) -> bytes:
    """The figure as SVG; the same figure has the same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fastmerge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def scores(
    generations: Sequence[int], values: Sequence[float], shares: Sequence[float], lines: Mapping[str, float], name: str
) -> Figure:
    """Every score by generation, the best so far, and what it is to beat.

    Args:
        generations: of each evaluation.
        values: its score.
        shares: which part of the items it was scored on; the best counts those of all items alone.
        lines: scores of other models by name.
        name: of the objective.
    """
    figure, axes = _figure()
    whole = [i for i, share in enumerate(shares) if share >= 1]
    part = [i for i, share in enumerate(shares) if share < 1]
    for some, color, label in ((part, "0.75", "on part of the items"), (whole, "C0", "candidates")):
        if some:
            xs, ys = [generations[i] for i in some], [values[i] for i in some]
            axes.plot(xs, ys, "o", markersize=3.5, alpha=0.6, color=color, label=label)
    best: dict[int, float] = {}
    top = -math.inf
    for i in sorted(whole, key=lambda i: generations[i]):
        top = max(top, values[i])
        best[generations[i]] = top
    axes.plot(list(best), list(best.values()), drawstyle="steps-post", color="C3", label="best so far")
    for i, (model, score) in enumerate(lines.items()):
        axes.axhline(score, linestyle=("--", ":", "-.")[i % 3], linewidth=1, color=f"C{4 + i % 6}", label=model)
    axes.set(xlabel="generation", ylabel=name)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _whole_numbers(axes)
    return figure


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], name: str) -> Figure:
    """A value for each row and column, NaN where there is none.

    Args:
        rows: their names.
        columns: their names.
        values: ``[rows][columns]``.
        name: of the value.
    """
    height = min(max(1.4, 0.28 * len(rows) + 1.0), 14.0)
    figure, axes = _figure(height)
    known = [v for row in values for v in row if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    limits: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
    if low < 0 < high:
        limits = {"cmap": "RdBu_r", "vmin": -max(-low, high), "vmax": max(-low, high)}
    image = axes.imshow([list(row) for row in values], aspect="auto", interpolation="nearest", **limits)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 6 else 60, fontsize=8)
    step = -(-len(rows) // MOST_ROWS)
    axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=8)
    if len(rows) * len(columns) <= 120:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    dark = value < (low + high) / 2 if low >= 0 or high <= 0 else abs(value) > 0.6 * limits["vmax"]
                    axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.colorbar(image, ax=axes, label=name)
    return figure


def front(first: Sequence[float], second: Sequence[float], best: Sequence[int], names: tuple[str, str]) -> Figure:
    """The candidates by two objectives, and those that no other is better than in both.

    Args:
        first: a score of each candidate.
        second: another one.
        best: which of them make the front.
        names: of the objectives.
    """
    figure, axes = _figure()
    axes.plot(first, second, "o", markersize=3.5, alpha=0.5, label="candidates")
    along = sorted(best, key=lambda i: first[i])
    axes.plot([first[i] for i in along], [second[i] for i in along], "o-", color="C3", label="Pareto front")
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def curves(layers: Sequence[int], values: Mapping[str, Sequence[float]], name: str) -> Figure:
    """A value of each layer, a line for each name."""
    figure, axes = _figure()
    for i, (label, line) in enumerate(values.items()):
        axes.plot(layers, line, marker="o", markersize=3, linestyle=("-", "--", ":")[i // 10 % 3], label=label)
    axes.set(xlabel="layer", ylabel=name)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _whole_numbers(axes)
    return figure


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one drawing, without anything of a window.

    Raises:
        RecipeError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("pages have figures by matplotlib: install it (the extra 'report')") from None
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes: Axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
