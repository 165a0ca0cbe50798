"""The table of docs/conformance.md: every method and parameter that fastmerge and mergekit 0.1.5 share, in three types.

    python -m tests.conformance.table            # prints it
    python -m tests.conformance.table --write    # and writes the page

Both tools merge the same tensors through their ``merge_tensors``; random masks and the order of ties are the same
(:func:`tests.conformance.peer.aligned`).
"""

import argparse
import datetime as dt
import importlib.metadata
import re
import warnings
from pathlib import Path

import torch

import fastmerge as fm
from fastmerge.methods import METHODS, get
from fastmerge.methods.base import REQUIRED
from tests import oracle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (96, 160)

VALUES = {
    "alpha": [0.5],
    "density": [0.0, 0.37, [0.2, 1.0, 0.8]],
    "eps": [1e-3],
    "epsilon": [0.1],
    "gamma": [0.0, 0.2],
    "lambda": [0.7, -1.0],
    "max_iter": [0, 1, 100],
    "r": [0.7],
    "scale": [0.0, -1.7],
    "select_topk": [0.0, 0.3],
    "t": [0.3, 1.25],
    "tol": [1e-9],
    "weight": [[0.7, -0.4, 1.3]],
}
"""Values of parameters beside the first of :data:`PLAIN`; flags take both."""

PLAIN = {"weight": [0.6, 0.3, 0.9], "t": 0.4, "density": 0.5, "epsilon": 0.1}
"""Values of the required parameters, and of those without which others do nothing, where only another one is tried."""

TOGETHER = {"nuslerp_row_wise": {"nuslerp_flatten": False}}
"""Parameters that do nothing without others."""

ALSO = {
    "density": ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
    "epsilon": ("ramplus_tl",),
}
"""Where parameters with a default are given one of :data:`PLAIN`."""

WITH_BASE = ("nuslerp", "multislerp")
"""Methods with an optional base: tried without and with it."""

REASONS = {
    "ramplus_tl": "mergekit computes the factors in fp32 for fp64 tensors as well",
    **dict.fromkeys(
        ("dare_linear", "dare_ties", "della", "della_linear"), "mergekit masks and rescales in fp32 for fp64 as well"
    ),
}
"""Why fp64 results differ by more than fp64's rounding; all else is in the README's table of deviations."""


def peers():
    """mergekit's methods: the names of their parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.merge_methods import registered_methods

    return {m.spec.name: {p.name for p in m.spec.parameters} for m in registered_methods()}


def models_of(method):
    return min(method.contract.most or 3, 3)


def settings(name, parameters):
    """(what varies, parameters, with a base) of every row of a method."""
    method = METHODS[name]
    models = models_of(method)
    fit = {k: v[:models] if isinstance(v, list) else v for k, v in PLAIN.items()}
    declared = {p.name: p for p in method.params if p.name in parameters}
    plain = {k: fit[k] for k, p in declared.items() if p.default is REQUIRED or name in ALSO.get(k, ())}
    based = method.contract.base == "required"
    rows = [("", plain, based)]
    if name in WITH_BASE:
        rows.append(("beside a base", plain, True))
    for key, p in declared.items():
        values = [not p.default] if p.type is bool else VALUES[key]
        for value in values:
            given = value[:models] if isinstance(value, list) else value
            varied = {key: given, **TOGETHER.get(key, {})}
            said = ", ".join(f"`{k}: {str(v).lower() if isinstance(v, bool) else v}`" for k, v in varied.items())
            rows.append((said, {**plain, **varied}, based or name in WITH_BASE))
    return rows


def keyed(parameters, *, based):
    """Per-model values by the inputs' numbers, as mergekit wants them where the base has none."""
    return {k: dict(enumerate(v, start=based)) if isinstance(v, list) else v for k, v in parameters.items()}


def row(name, what, parameters, based):
    """One line: largest deviation relative to the largest value, and RMS errors against the definition in fp64."""
    from mergekit.merge_methods import merge_tensors

    from tests.conformance import peer

    method = get(name)
    count = models_of(method) + based
    cells, deviation = [], {}
    for types, dtype in TYPES.items():
        op = oracle.make_op(method, NAME, SHAPE, oracle.TYPES[types](count), parameters, based=based)
        inputs = oracle.inputs_of(op, seed=1, tie_free=True)
        ours = fm.merge_tensors(inputs, name, parameters=parameters, base_index=0 if based else None, name=NAME)
        with peer.aligned() as draws:
            draws.start(NAME)
            theirs = merge_tensors(
                inputs, name, parameters=keyed(parameters, based=based), base_index=0 if based else None
            )
        most, difference = theirs.double().abs().max(), (ours.double() - theirs.double()).abs().max()
        deviation[types] = float(difference / most if most else difference)
        cells.append(f"{deviation[types]:.0e}" if deviation[types] else "0")
        if dtype != torch.float64:
            exact = oracle.make_op(method, NAME, SHAPE, oracle.TYPES["fp64"](count), parameters, based=based)
            truth = exact.spec.method.reference([x.double() for x in inputs], exact)
            errors = [float((x.double() - truth).square().mean().sqrt()) for x in (ours, theirs.to(dtype))]
            cells.append(" / ".join(f"{e:.1e}" if e else "0" for e in errors))
    fp64, fp32, fp32_errors, bf16, bf16_errors = cells
    reason = REASONS.get(name, "") if deviation["fp64"] > 1e-12 else ""
    return f"| `{name}` | {what} | {fp64} | {fp32} | {fp32_errors} | {bf16} | {bf16_errors} | {reason} |"


def rows():
    """The lines of the table, one method after the other."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = peers()
        return [row(n, *s) for n in sorted(METHODS.keys() & shared.keys()) for s in settings(n, shared[n])]


def alone():
    """Methods and parameters that mergekit does not have, a line each."""
    shared = peers()
    return [
        f"- `{n}`: "
        + (", ".join(f"`{p.name}`" for p in m.params if p.name not in shared.get(n, ())) or "no parameters")
        for n, m in sorted(METHODS.items())
        if n not in shared or any(p.name not in shared[n] for p in m.params)
    ]


def page():
    """The whole page."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p).split('+')[0]}" for p in ("mergekit", "torch"))
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    head = f"""# Beside mergekit, method by method

Written by `python -m tests.conformance.table --write` on {today}, with fastmerge {fm.__version__}, {versions}.

Fine-tunes of one base, {SHAPE[0]} x {SHAPE[1]}, merged by `merge_tensors` of both, with the same random masks and
the same order of ties. *Deviation* is the largest difference from mergekit over mergekit's largest value; *errors* are
the RMS errors of fastmerge and of mergekit against the definition in fp64. Weights have a standard deviation of 0.02,
updates of 0.5, so that no two magnitudes are equal. What differs on purpose stands in the
[README](../README.md#methods). In fp32 mergekit's `linear` fuses multiplication and addition where the processor can;
fastmerge sums plain averages in fp64 there, weighs and adds what is kept of task vectors in fp64 too, and has the same
bits on every machine. `make conformance` compares whole recipes.

| method | parameters | fp64: deviation | fp32 | errors in fp32 | bf16 | errors in bf16 | why in fp64 |
|---|---|---|---|---|---|---|---|"""
    return "\n".join([head, *rows(), "", "mergekit does not have these methods and parameters:", "", *alone(), ""])


def missing(text):
    """Methods and parameters that a page does not name."""
    listed = dict(re.findall(r"^- `(\w+)`: (.*)$", text, re.MULTILINE))
    table = [line for line in text.splitlines() if line.startswith("| `")]
    found = []
    for name, method in METHODS.items():
        said = "\n".join(r for r in table if r.startswith(f"| `{name}` ")) + listed.get(name, "")
        found += [] if said else [name]
        names = [p.name for p in method.params]
        found += [f"{name}: {p}" for p in names if f"`{p}`" not in said and f"`{p}:" not in said]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"writes {PAGE.name}")
    write, made = parser.parse_args().write, page()
    print(made)
    if write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(made)
