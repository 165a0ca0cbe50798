"""Series of recipes that differ in numbers alone: what searches render one after the other."""

from tests.session.family import recipe


def numbers(key, *values):
    return [{key: v} for v in values]


SERIES = {
    "linear": ("linear", None, "abc", {}, numbers("weight", 0.3, [0.2, -0.1, 0.7])),
    "task_arithmetic": ("task_arithmetic", "base", "abc", {}, numbers("weight", 0.3, [0.2, -0.1, 0.7])),
    "ties": (
        "ties",
        "base",
        "abc",
        {"weight": 0.5, "density": 0.4},
        [{}, {"weight": [0.2, 0.9, 0.4]}, {"density": [0.4, 0.2, 0.9]}, {"weight": 0.1}],
    ),
    "ties spread": ("ties", "base", "ab", {"density": 0.4, "ties": "spread"}, numbers("weight", 0.5, 0.9)),
    "breadcrumbs": ("breadcrumbs", "base", "ab", {"density": 0.6, "gamma": 0.02}, numbers("weight", 0.5, 0.9)),
    "dare_ties": ("dare_ties", "base", "ab", {"weight": 0.5, "density": 0.4}, [{}, {"density": 0.7}]),
    "della": ("della", "base", "ab", {"density": 0.5, "epsilon": 0.2}, numbers("weight", 0.5, 0.8)),
    "slerp": ("slerp", "base", "a", {"t": 0.3}, numbers("t", 0.3, 0.8)),
    "slerp rows": ("slerp", "base", "a", {"t": 0.3, "scope": "row"}, numbers("t", 0.3, 0.8)),
    "model_stock": ("model_stock", "base", "abc", {}, [{}, {}]),
    "nuslerp": ("nuslerp", None, "ab", {}, numbers("weight", [0.3, 0.7], [0.6, 0.2])),
    "sce": ("sce", "base", "ab", {}, numbers("select_topk", 0.5, 0.2)),
    "passthrough": ("passthrough", None, "a", {}, [{}, {}]),
}
SHARED = {"t", "scope", "ties", "select_topk", "epsilon"}


def documents(paths, name):
    """The recipes of a series: the same but for numbers."""
    method, base, names, given, changes = SERIES[name]
    out = []
    for change in changes:
        values = {**given, **change}
        extra = {"parameters": {k: v for k, v in values.items() if k in SHARED}}
        own = {k: v for k, v in values.items() if k not in SHARED}
        out.append(recipe(paths, method, base=base, names=names, extra=extra, **own))
    return out
