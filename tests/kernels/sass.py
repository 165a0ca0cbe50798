"""Machine code of one kernel as a graph: its blocks, its loops, and how often a full tile issues each instruction.

A loop is a block that is on every way to one that jumps back to it, with what lies between. (A jump backwards alone is
none: the assembler puts rare code behind the end.) The *main loop* is the one with the most 128-bit loads of those that
hold no other loop with loads but searches; where no loop has one, that with the most bytes loaded. What flat kernels do
is outside of every loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

Code = list[tuple[int, str]]

SEARCH = 2
"""Times that a search in a prefix table goes round: that of 33 to 1024 tensors."""

SHORT = 40
"""Instructions of a search's loop at most: it takes 21."""

WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Loop(NamedTuple):
    """A natural loop.

    Attributes:
        blocks: numbers of its blocks.
        search: whether it is a search in a prefix table: short, with a single load, of 64 bits.
        wide: loads of 128 bits in it, but for those of loops inside.
        nbytes: that a thread loads in one iteration.
        inside: whether it holds another loop that is no search.
    """

    blocks: frozenset[int]
    search: bool
    wide: int
    nbytes: int
    inside: bool


def parse(sass: str) -> Code:
    """(address, text) of every instruction, without the padding at the end."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(a, 16), t.strip()) for a, t in lines if not t.startswith("NOP")]
    while code and re.match(rf"BRA 0x{code[-1][0]:x}$", code[-1][1].strip()):
        code.pop()
    return code


def target(text: str) -> int | None:
    """Where an instruction jumps to, if it names an address. (BRA.DIV leads to what diverged warps do: rare.)"""
    found = re.search(r"BRA(?!\.DIV)(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(0x[0-9a-f]+)", text)
    return int(found.group(1), 16) if found else None


def load_bytes(text: str) -> int:
    """Bytes per thread of a load from global memory; 0 for all else."""
    found = re.search(r"\bLDG\.(\S*)", text)
    return next((n for word, n in WIDTHS.items() if word in found.group(1).split(".")), 4) if found else 0


class Graph:
    """The control flow of a kernel.

    Attributes:
        blocks: instructions of each basic block, in the order of addresses.
        loops: natural loops.
        main: the main loop; None in flat kernels.
    """

    def __init__(self, code: Code) -> None:
        """Takes parsed code."""
        known = {a for a, _ in code}
        leaders = {code[0][0]} | {t for _, text in code if (t := target(text)) in known}
        leaders |= {code[i + 1][0] for i, (_, t) in enumerate(code[:-1]) if re.search(r"\b(BRA|EXIT|RET)\b", t)}
        self.blocks: list[Code] = []
        for a, t in code:
            if a in leaders:
                self.blocks.append([])
            self.blocks[-1].append((a, t))
        number = {block[0][0]: i for i, block in enumerate(self.blocks)}
        self._next = [sorted(set(self._follow(i, number))) for i in range(len(self.blocks))]
        self._seen = self._reach()
        self._before: dict[int, list[int]] = {i: [] for i in self._seen}
        for i in self._seen:
            for j in self._next[i]:
                self._before[j].append(i)
        self.loops = self._find()
        inner = [x for x in self.loops if not x.inside and not x.search and x.nbytes]
        self.main = max(inner, key=lambda x: (x.wide, x.nbytes), default=None)

    def _follow(self, i: int, number: dict[int, int]) -> Iterator[int]:
        """Blocks that may come after block i."""
        last = self.blocks[i][-1][1]
        to = target(last)
        if to in number:
            yield number[to]
        always = re.match(r"(BRA(\.\w+)*\s+`?\(?0x|EXIT|RET)", last) and "BRA.DIV" not in last
        if not always and i + 1 < len(self.blocks):
            yield i + 1

    def _reach(self) -> list[int]:
        """Blocks that the first one leads to, that of each before what follows where no loop is in the way."""
        seen, order, stack = {0}, [], [(0, iter(self._next[0]))]
        while stack:
            i, rest = stack[-1]
            j = next((j for j in rest if j not in seen), None)
            if j is None:
                order.append(i)
                stack.pop()
            else:
                seen.add(j)
                stack.append((j, iter(self._next[j])))
        return order[::-1]

    def _find(self) -> list[Loop]:
        """Loops, those of one head as one."""
        over = {i: set(self._seen) for i in self._seen}  # blocks on every way to each
        over[0] = {0}
        moved = True
        while moved:
            moved = False
            for i in self._seen[1:]:
                new = set.intersection(*(over[j] for j in self._before[i])) | {i}
                moved |= new != over[i]
                over[i] = new
        bodies: dict[int, set[int]] = {}
        for i in self._seen:
            for head in self._next[i]:
                if head not in over[i]:
                    continue
                body, stack = bodies.setdefault(head, {head}), [i]
                while stack:
                    j = stack.pop()
                    if j not in body:
                        body.add(j)
                        stack += self._before[j]
        loops: list[Loop] = []
        for body in sorted(bodies.values(), key=len):
            within = [x for x in loops if x.blocks < body]
            text = [t for b in body for _, t in self.blocks[b]]
            search = not within and len(text) <= SHORT and [load_bytes(t) for t in text if load_bytes(t)] == [8]
            own = body - set().union(*(x.blocks for x in within))
            loads = [n for b in own for _, t in self.blocks[b] if (n := load_bytes(t))]
            inside = any(not x.search for x in within)
            loops.append(Loop(frozenset(body), search, loads.count(16), sum(loads), inside))
        return loops

    def rare(self, i: int) -> bool:
        """Whether block i is the slow path of a division: it calls, and what comes before can pass it by."""
        calls = any("CALL.REL" in t for _, t in self.blocks[i])
        return calls and all(len(self._next[j]) > 1 for j in self._before[i])

    def text(self, loop: Loop | None) -> list[str]:
        """Instructions of a loop; of everything where there is none."""
        return [t for i in self._seen if loop is None or i in loop.blocks for _, t in self.blocks[i]]

    def issued(self, trips: float, around: float = 1) -> float:
        """Instructions that a thread issues.

        Args:
            trips: of the main loop.
            around: of loops around the main one.

        All others run once, but searches. Both sides of a branch count.
        """
        total = 0.0
        for i in self._seen:
            if self.rare(i):
                continue
            times = 1.0
            for loop in self.loops:
                if i in loop.blocks and loop.search:
                    times *= SEARCH
            if self.main is not None and i in self.main.blocks:
                times *= trips
            elif self.main is not None and any(i in x.blocks and self.main.blocks < x.blocks for x in self.loops):
                times *= around
            total += times * len(self.blocks[i])
        return total
