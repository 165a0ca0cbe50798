"""Renders of a session on the GPU: a recipe bound once, then with other numbers each time.

Wall time with an idle device before and after. What passes find is known, as it is from the second render on, so a
render reads the models once and writes the target once.
"""

from __future__ import annotations

import itertools
from typing import Any

from bench.gpu import layout
from bench.gpu.plan import Row
from bench.gpu.timing import Bench

BARS = {"linear": 12.0, "slerp": 12.0, "ties": 16.0}
"""Milliseconds of the model of 4.5 B parameters on an H100: by 3.02 TB/s its bytes take 9, 9 and 12."""

NUMBERS = 64
"""Recipes that follow each other."""


def recipe(method: str, number: int) -> dict[str, Any]:
    """A recipe of ``base``, ``a`` and ``b`` (two of them where there is no base) with a number of its own."""
    value = 0.3 + number / 1000
    if method == "slerp":
        about: dict[str, Any] = {"base_model": "a", "models": [{"model": "b"}], "parameters": {"t": value}}
    elif method == "linear":
        about = {"models": [{"model": n, "parameters": {"weight": value}} for n in "ab"]}
    else:
        some = [{"model": n, "parameters": {"weight": value, "density": 0.2}} for n in "ab"]
        about = {"base_model": "base", "models": some}
    return {"merge_method": method, "dtype": "bfloat16", **about}


def rendered(bench: Bench, method: str, sizes: dict[str, tuple[int, ...]], runs: int, seconds: float) -> Row:
    """The first render, which makes the passes; the second, which binds; the median of those after.

    Returns:
        ``again ms``: of a render with the numbers of the one before, of all tensors.
    """
    import math

    import fastmerge

    lengths = [math.prod(shape) for shape in sizes.values()]
    f = layout.arenas(bench, lengths)
    states = {
        name: {k: t.view(s) for (k, s), t in zip(sizes.items(), x.split(lengths), strict=True)}
        for name, x in (("base", f.base), ("a", f.tuned[0]), ("b", f.tuned[1]))
    }
    recipes = itertools.cycle([fastmerge.Recipe.load(recipe(method, i)) for i in range(NUMBERS)])
    with fastmerge.Session(states, device=bench.device) as session:
        target: dict[str, Any] = {}

        def begin() -> None:
            target.update(session.render(next(recipes)))

        first = bench.once(begin)
        bound = session.bind(next(recipes), target)

        def other() -> None:
            bound.render(next(recipes))

        def again() -> None:
            bound.render(everything=True)

        second = bench.once(other)
        found = bench.wall({"other": other, "again": again}, runs=runs, seconds=seconds)
    return {
        "ms": round(1e3 * found["other"].median, 4),
        "bar ms": BARS[method],
        "wall ms": str(found["other"]),
        "again ms": str(found["again"]),
        "first ms": round(1e3 * first, 1),
        "second ms": round(1e3 * second, 3),
        "model GB": round(2e-9 * sum(lengths), 3),
    }
