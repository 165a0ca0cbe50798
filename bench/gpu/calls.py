"""The public calls on tensors that lie on the GPU: what a user waits for, and what they take of the device's memory.

Wall time of whole calls with an idle device before and after: checks, tables, statistics and launches included. First
comes every call alone, then where two of them spend their time, then each beside what else would do it: torch eager,
mergekit, torch.compile. What a call does the first time (compiling, above all) is shown apart, never in a median.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu import layout, peers, profiled, renders
from bench.gpu.data import KINDS, family
from bench.gpu.eager import DENSITY, T
from bench.gpu.plan import Absent, Context, Item, Row
from bench.gpu.timing import Bench, ratio

SIDE = 16_384
"""Rows and columns of one tensor: 0.54 GB."""

LAYERS = 16
"""Of the model of 4.5 B parameters, in the widths of an 8B Llama: 147 tensors."""

MODEL = "4.5B"

LATTICE = "lattice"
"""The data of all calls, as bf16 fine-tunes have it; TIES, whose selection it decides, is shown on all kinds."""

RUNS, SECONDS = 15, 1.5
"""Rounds of a median, and after how many seconds none begins but the first: what takes long is measured once."""


@dataclass(frozen=True, slots=True)
class Call:
    """One public call.

    Attributes:
        method: of fastmerge and of mergekit.
        parameters: as fastmerge takes them.
        base: which input is the base.
        bar: milliseconds that it may take.
        formula: of the peers that are written in torch (:data:`bench.gpu.eager.MERGES`).
        tuned: whether a base comes before the two fine-tunes.
        many: whether it merges the tensors of a model, by ``merge_state_dicts``, or one tensor.
        theirs: parameters as mergekit takes them; None where it has no such merge.
    """

    method: str
    parameters: Mapping[str, Any]
    base: int | None
    bar: float
    formula: str
    tuned: bool = True
    many: bool = False
    theirs: Mapping[str, Any] | None = None

    def inputs(self, bench: Bench, kind: str) -> list[Any]:
        """The tensors, or the state dictionaries."""
        if self.many:
            cuts = shapes(small=bench.device == "cpu")
            sizes = [math.prod(shape) for shape in cuts.values()]
            f = layout.arenas(bench, sizes, kind)
        else:
            side = 64 if bench.device == "cpu" else SIDE
            f = family(bench.device, side * side, 2, kind)
        wholes = [f.base, *f.tuned] if self.tuned else list(f.tuned)
        if not self.many:
            return [x.view(side, side) for x in wholes]
        return [{k: t.view(s) for (k, s), t in zip(cuts.items(), x.split(sizes), strict=True)} for x in wholes]

    def ours(self, inputs: Sequence[Any]) -> Callable[[], Any]:
        """The call of a user."""
        import fastmerge

        if self.many:
            call: Callable[..., Any] = functools.partial(fastmerge.merge_state_dicts, base=self.base)
        else:
            call = functools.partial(fastmerge.merge_tensors, base_index=self.base)
        return functools.partial(call, inputs, self.method, parameters=self.parameters)


def shapes(*, small: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of the model, or of a tiny one."""
    from bench.generate import SIZES
    from bench.generate import shapes as of

    return of(SIZES["tiny"] if small else replace(SIZES["8b"], layers=LAYERS))


def call(method: str, parameters: Mapping[str, Any], base: int | None, bar: float, **words: Any) -> Call:
    """A call whose peers have its own name and parameters."""
    return Call(method, parameters, base, bar, **{"formula": method, "theirs": parameters, **words})


MEAN = {"weight": 1.0}
TRIM = {"weight": 1.0, "density": DENSITY}
DROP = {"weight": 0.5, "density": 0.5}
KEEP = {**DROP, "rescale_norm": "keep"}

CALLS: Mapping[str, Call] = {
    "ties": call("ties", TRIM, 0, 1.9),
    f"ties {MODEL}": call("ties", TRIM, 0, 30, many=True),
    "slerp": call("slerp", {"t": T}, 0, 1.25, tuned=False),
    f"slerp {MODEL}": call("slerp", {"t": T}, 0, 20, tuned=False, many=True),
    "dare_linear keep": call("dare_linear", KEEP, 0, 1.0, formula="dare_linear keep", theirs=None),
    "dare_linear l1": call("dare_linear", DROP, 0, 1.9, formula="dare_linear l1"),
    f"dare_ties {MODEL}": call("dare_ties", DROP, 0, 30, many=True),
    "linear": call("linear", MEAN, None, 0.65, tuned=False),
    f"linear {MODEL}": call("linear", MEAN, None, 12, tuned=False, many=True),
}
"""By name, in the order in which they are measured; in milliseconds on an H100."""

PROFILED = ("ties", "slerp")


def kinds(name: str) -> Sequence[str]:
    """The data on which a call is measured."""
    others = [kind for kind in KINDS if kind != LATTICE] if CALLS[name].method == "ties" else []
    return [LATTICE, *others]


def items(context: Context) -> Sequence[Item]:
    """Ours: all calls on one kind of data, TIES on the others, two profiles; then the peers, call by call."""
    bench = Bench.of(dry=context.dry)

    def item(name: str, run: Callable[..., Row], *args: Any, needs: float = 4, limit: float = 45) -> Item:
        return Item(name, functools.partial(run, bench, *args), needs=needs, limit=limit)

    first = [item(f"{name} {LATTICE}", alone, name, LATTICE, needs=6) for name in CALLS]
    rest = [item(f"{name} {k}", alone, name, k) for name in CALLS for k in kinds(name)[1:]]
    profiles = [item(f"profile {name}", spent, name) for name in PROFILED]
    found = [*first, *rest, *profiles, *(item(f"render {m} {MODEL}", render, m, needs=8) for m in renders.BARS)]
    last = []
    for name in CALLS:
        found += [item(f"{name} {peer}", beside, name, peer, needs=6) for peer in ("eager", "mergekit")]
        compiling = item(f"{name} compile", beside, name, "compile", needs=12, limit=60)
        (last if CALLS[name].many else found).append(compiling)  # one compilation per shape
    return found + last


def alone(bench: Bench, name: str, kind: str) -> Row:
    """The call itself: its first time, its second, the median of those after, and the memory that it takes.

    Returns:
        ``beyond``: the peak of the device's memory without inputs and result, of one model.
    """
    chosen = CALLS[name]
    inputs = chosen.inputs(bench, kind)
    work = chosen.ours(inputs)
    first, second = bench.once(work), bench.once(work)
    beyond = peak(bench, work, inputs)
    wall = bench.wall({"call": work}, runs=RUNS if bench.warm else 1, seconds=SECONDS)["call"]
    one = nbytes(inputs[0])
    return {
        "ms": round(1e3 * wall.median, 4),
        "bar ms": chosen.bar,
        "wall ms": str(wall),
        "first ms": round(1e3 * first, 1),
        "second ms": round(1e3 * second, 3),
        "beyond": None if beyond is None else round(beyond / one, 4),
        "beyond MB": None if beyond is None else round(beyond / 1e6, 2),
        "model GB": round(one / 1e9, 3),
    }


def render(bench: Bench, method: str) -> Row:
    """A session's renders of the model."""
    runs = RUNS if bench.warm else 1
    return renders.rendered(bench, method, shapes(small=bench.device == "cpu"), runs, SECONDS)


def nbytes(model: Any) -> int:
    """Of a tensor or of a state dictionary."""
    return sum(int(t.nbytes) for t in (model.values() if isinstance(model, Mapping) else [model]))


def peak(bench: Bench, work: Callable[[], Any], inputs: Sequence[Any]) -> int | None:
    """Bytes of the device's memory that a call has at most, without its inputs and its result."""
    if bench.device == "cpu":
        return None
    import torch

    bench.wait()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    bench.wait()
    return int(torch.cuda.max_memory_allocated()) - sum(map(nbytes, inputs)) - nbytes(result)


def spent(bench: Bench, name: str) -> Row:
    """One call, kernel by kernel; ``share`` is the time of its kernels over the median without a profiler."""
    chosen = CALLS[name]
    work = chosen.ours(chosen.inputs(bench, LATTICE))
    bench.once(work)
    wall = bench.wall({"call": work}, runs=RUNS if bench.warm else 1, seconds=SECONDS)["call"]
    return profiled.row(bench, work, wall)


def beside(bench: Bench, name: str, peer: str) -> Row:
    """The call in turn with a peer: how many times faster, and the largest difference of the results."""
    chosen = CALLS[name]
    theirs = peer_of(bench, chosen, peer)
    inputs = chosen.inputs(bench, LATTICE)
    mine, other = chosen.ours(inputs), functools.partial(theirs, inputs)
    bench.once(mine)
    first = bench.once(other)
    runs = RUNS if bench.warm else 1
    found = bench.wall({"fastmerge": mine, "peer": other}, runs=runs, seconds=SECONDS)
    return {
        "times faster": ratio(found["peer"].median, found["fastmerge"].median),
        "fastmerge wall ms": str(found["fastmerge"]),
        "peer wall ms": str(found["peer"]),
        "peer first ms": round(1e3 * first, 1),
        "largest difference": None if "dare" in name else apart(mine(), other()),
    }


def peer_of(bench: Bench, chosen: Call, peer: str) -> peers.Peer:
    """The function of a peer.

    Raises:
        Absent: there is none.
    """
    if peer == "mergekit":
        if chosen.theirs is None:
            raise Absent("mergekit has no such merge")
        return peers.mergekit(chosen.method, chosen.theirs, chosen.base, many=chosen.many)
    if peer == "eager":
        return peers.eager(chosen.formula, many=chosen.many)
    if bench.device == "cpu":
        raise Absent("torch.compile is not tried in a dry run")
    return peers.compiled(chosen.formula, many=chosen.many)


def apart(one: Any, other: Any) -> float:
    """The largest difference of two results; a peer may answer on the CPU."""
    if isinstance(one, Mapping):
        return max(apart(one[k], other[k]) for k in one)
    return float((one.float() - other.to(one.device).float()).abs().max())
