"""What a GPU has to reach: every bar with the measured value beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu import renders
from bench.gpu.calls import CALLS, LATTICE, MODEL, PROFILED, kinds
from bench.gpu.data import KINDS
from bench.gpu.merges import DEVICES, JUDGED, SPEED_METHODS, STATES
from bench.gpu.state import State


@dataclass(frozen=True, slots=True)
class Bar:
    """One requirement.

    Attributes:
        text: what is required.
        part: where it is measured.
        items: names of the items, all of which have to meet it.
        value: what to look at in their rows.
        least: smallest value that passes; ``most`` the largest.
        beside: items and values that are shown with it and judge nothing.
    """

    text: str
    part: str
    items: Sequence[str]
    value: str
    least: float | None = None
    most: float | None = None
    beside: Sequence[tuple[str, str]] = ()


def kernel(
    text: str, items: Sequence[str], least: float, value: str = "share", beside: Sequence[tuple[str, str]] = ()
) -> Bar:
    """A bar of the kernels part."""
    return Bar(text, "kernels", items, value, least, beside=beside)


def call(name: str) -> list[Bar]:
    """The time that a call may take, on the data of fine-tunes and on the other kinds."""
    some = {"": [LATTICE], " on other kinds of data": kinds(name)[1:]}
    return [
        Bar(f"{name}, ms{where}", "calls", [f"{name} {k}" for k in on], "ms", most=CALLS[name].bar)
        for where, on in some.items()
        if on
    ]


def faster(name: str, peer: str, least: float) -> Bar:
    """How many times faster than a peer a call has to be."""
    return Bar(f"{name}, times faster than {peer}", "calls", [f"{name} {peer}"], "times faster", least)


BARS = (
    *(bar for name in CALLS for bar in call(name)),
    *(
        Bar(f"a session's render, {m} {MODEL}, other numbers, ms", "calls", [f"render {m} {MODEL}"], "ms", most=bar)
        for m, bar in renders.BARS.items()
    ),
    faster("ties", "mergekit", 18.0),
    faster("ties", "compile", 12.0),
    faster(f"ties {MODEL}", "mergekit", 20.0),
    Bar("kernels, of the time of a call", "calls", [f"profile {name}" for name in PROFILED], "share", 0.85),
    Bar(
        "device memory beyond inputs and result, of one model",
        "calls",
        [f"{name} {k}" for name in CALLS for k in kinds(name)],
        "beyond",
        most=0.05,
    ),
    kernel("combine, of the copy bandwidth", [f"combine N={n}" for n in (2, 4, 8)], 0.85),
    kernel("slerp, both passes, of the copy bandwidth", ["slerp"], 0.80),
    kernel("gram, of the copy bandwidth", ["slerp"], 0.88, "gram share"),
    kernel("ties merge pass, of the copy bandwidth", [f"ties N={n}" for n in (2, 4, 8)], 0.80),
    kernel(
        "select, its one counting read, of the copy bandwidth",
        [*(f"select N=2 {k}" for k in KINDS), "select N=4 lattice", "select N=8 lattice"],
        0.80,
    ),
    kernel("dare N=2, of the copy bandwidth", ["dare N=2"], 0.80),
    kernel("dare N=4 and 8, of the lower of copy and issue bound", ["dare N=4", "dare N=8"], 0.85, "bound share"),
    kernel("dare N=8, of the copy bandwidth", ["dare N=8"], 0.88),
    kernel(
        "replication, bytes written, of the write bandwidth (a fill)",
        ["replicate E=8 clean"],
        0.80,
        "written share",
        beside=[("replicate E=8 clean", "read and written share")],
    ),
    kernel("replication with noise, likewise", ["replicate E=8 noise"], 0.75, "written share"),
    Bar("8B tensors in one call, times one tensor", "kernels", ["batch combine", "batch ties"], "times", most=1.15),
    Bar(
        "whole merges, of the slowest of disk, H2D and D2H",
        "merges",
        [f"{m} {JUDGED} {s}" for m in SPEED_METHODS for s in STATES],
        "share",
        0.85,
    ),
)  # fmt: skip


def judge(state: State) -> list[dict[str, Any]]:
    """The acceptance table: measured (the worst of a bar's items), required, pass, fail or not run, and the details."""
    return [_numbers(state, bar) for bar in BARS] + _events(state)


def _numbers(state: State, bar: Bar) -> dict[str, Any]:
    rows = {name: state.row(bar.part, name) for name in bar.items}
    values = {name: row[bar.value] for name, row in rows.items() if row is not None and row.get(bar.value) is not None}
    worst: Callable[..., float] = max if bar.most is not None else min
    least, most = bar.least, bar.most
    required = f"<= {most}" if most is not None else f">= {least}"
    out: dict[str, Any] = {"bar": bar.text, "measured": None, "required": required, "verdict": "not run"}
    if values:
        measured = worst(values.values())
        met = measured <= most if most is not None else least is not None and measured >= least
        complete = len(values) == len(bar.items)
        verdict = "fail" if not met else "pass" if complete else "not run"
        out |= {"measured": measured, "verdict": "dry" if state.facts["dry"] else verdict}
    missing = [f"{n}: {_why(state, bar.part, n)}" for n in bar.items if n not in values]
    shown = [f"not judged: {n}, {v} {row[v]}" for n, v in bar.beside if (row := state.row(bar.part, n)) is not None]
    return {**out, "details": "; ".join([*(f"{n} {v}" for n, v in values.items()), *missing, *shown])}


def _events(state: State) -> list[dict[str, Any]]:
    """What has to have happened, without a number: tests, the sanitizer, the same bytes."""
    found = []
    for text, part, prefix in (
        ("every test that is marked gpu passes", "tests", ""),
        ("compute-sanitizer finds nothing", "sanitize", ""),
        (f"the same bytes on {', '.join(DEVICES)}", "merges", "same bytes"),
    ):
        entries = {n: e for n, e in state.results.get(part, {}).items() if n.startswith(prefix)}
        by = [e["status"] for e in entries.values()]
        verdict = "fail" if "failed" in by else "not run" if "ok" not in by or {"absent", "cut"} & {*by} else "pass"
        details = "; ".join(f"{n}: {e.get('reason')}" for n, e in entries.items() if e["status"] != "ok")
        done = f"{by.count('ok')} of {len(by)}"
        found.append({"bar": text, "measured": done, "required": "all",
                      "verdict": "dry" if state.facts["dry"] else verdict, "details": details})  # fmt: skip
    return found


def _why(state: State, part: str, item: str) -> str:
    entry = state.entry(part, item)
    return "not run" if entry is None else str(entry.get("reason", "no value"))
