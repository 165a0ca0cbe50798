"""Gates on compiled kernels, without a GPU: ``python tests/kernels/aot.py [--update] [--arch 90] [--only WORD]``.

Every launcher is called for real on small tables, with a driver that only names the target, so what is compiled is
what a GPU of that target would be given: same signature, same specialisation, same options. Then, per kernel:

- the PTX holds no fused multiply-add, approximation or flush to zero, nor does the machine code fuse anything;
- it rounds no fp64 to 16 bits directly, which would keep a NaN's sign and payload;
- it holds no packed 16-bit addition: ptxas up to 13.1.80 drops the constant of one of which it needs a half;
- where the order of zeros is promised (MERGE = MAX) nothing became min or max of floats, which put -0 below +0
  (``mutants.py`` has kernels with these three hazards, which must be seen);
- no spills: STACK 0, LOCAL 0, no LDL or STL; registers within the cap of the kernel, and few enough to be launched;
- unmasked variants move 128 bits per access: as many LDG.E.128 as the inputs need, in the main loop no 16-bit loads,
  stores likewise; all of gram's before its arithmetic;
- on sm_90, instructions per element at most 3 % above the committed table (``--update`` writes it anew).

Instructions per element are those issued per thread, divided by its elements: of a block (flat kernels) or a tile. The
main loop counts as often as a full tile runs it, which its loads tell; a search in a prefix table twice (33 to 1024
tensors); slow paths of divisions (denormals, infinities) not at all, the rounds of lists and all else once; see
``sass.py``. The kernels that sample, decide and solve have few programs and no counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.kernels.sass import Code, Graph, load_bytes, parse

TABLE = Path(__file__).with_name("instructions_sm90.json")
ARCHES = (80, 90, 120)
FORBIDDEN = ("fma.", ".approx", "div.full", ".ftz")
TOLERANCE = 1.03
TILE = 65_536

FLAT = ("combine", "consensus", "ties", "delta_keys")
"""Kernels that work on one block."""

TILED = ("gram", "dot", "l1", "votes", "count", "cuts")
"""Kernels whose main loop works on a tile."""

# Registers: 64 let 1024 threads share a multiprocessor, 80 let 768, 128 let 512: with the 32 bytes per input that a
# thread of consensus has in flight 48 KB from three inputs on, as much as an H200 asks for. The sums of gram keep 8
# running sums per column and thread (80 for four models); fp64 and masked variants are off the main road.
CAPS = {"combine": 64, "delta_keys": 64, "votes": 64}
CAP = 128

FILE = 65_536
"""Registers of a multiprocessor: of what one program takes more than these nothing can be launched."""

MAX = 2
"""MERGE, where the sign of a zero is that of the first of equals."""

SPILL = ("count", "votes", "decide")
"""Kernels that may spill where they have masks, whose loads of one element each take all registers there are; and one
of 512 threads that spills 8 bytes on sm_80."""

BLACKWELL, MOST_SPILLS = 100, 160
"""From sm_100 on caps that were found for sm_90 make some kernels spill (gram 2 to 14 instructions, kth with a drop
122): left until one is met and measured."""

ZEROS = ("slerp", "apart", "model_stock")
"""Solves in which -0 and +0 are told apart."""

NAMES = {0: "fp64", 1: "fp32", 2: "fp16", 3: "bf16"}


@dataclass
class Found:
    """One compiled kernel and what is wrong with it."""

    key: str
    arch: int
    registers: int
    instructions: float
    wide_loads: int
    length: int
    problems: list[str] = field(default_factory=list)


class Driver:
    """Names the target; there is no device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def describe(name: str, constants: dict) -> str:
    """A stable name of one compiled kernel."""
    family = name.removesuffix("_kernel")
    words, count = [family], constants.get("M")
    if count:
        words.append("+".join(NAMES[(constants["CODES"] >> (4 * i)) & 15] for i in range(count)))
    if "OUT" in constants:
        words.append("to " + NAMES[constants["OUT"]])
    rules = ("N", "C", "TIES", "SIGMAS", "ELECT", "MERGE", "ZERO", "ROUND")
    words += [f"{rule.lower()}={constants[rule]}" for rule in rules if constants.get(rule, -1) > 0]
    if "FROM" in constants:
        words.append(f"{constants['FROM']}..{constants['TO']}")
    flags = (
        "DELTA",
        "DIFF",
        "DIV",
        "DROP",
        "TRIM",
        "SPREAD",
        "SPLIT",
        "ROWS",
        "UNMASKED",
        "EVERY",
        "ANGLE",
        "CLAMP",
        "LAST",
    )
    words += [f.lower() for f in flags if constants.get(f)]
    if constants.get("WIDE") and not any((constants["CODES"] >> (4 * i)) & 15 == 0 for i in range(count or 0)):
        words.append("wide")
    elif constants.get("WIDE_SUMS") and not constants.get("WIDE"):
        words.append("wide sums")
    return " ".join(words)


def cap(family: str, constants: dict) -> int:
    """Registers of a fast variant at most."""
    sixteen = all((constants["CODES"] >> (4 * i)) & 15 >= 2 for i in range(constants["M"]))
    if family == "gram" and constants["STEPS"] > 1:
        return 64 if constants["M"] == 2 else 80
    if family in ("count", "l1") and sixteen and constants["M"] == 3 and not constants["DROP"]:
        return 80
    return CAPS.get(family, CAP) if constants["M"] <= 4 or family == "delta_keys" else CAP


def per_element(family: str, constants: dict, graph: Graph, threads: int) -> float:
    """Instructions per element of a block or a full tile; 0 where that says nothing."""
    if family == "kth":
        graph.main = max(graph.loops, key=lambda x: len(graph.text(x)))
        return graph.issued(constants["BITS"]) / (constants["BLOCK"] / threads)
    if family in FLAT:
        return graph.issued(1) / (constants["BLOCK"] / threads)
    if family not in TILED or graph.main is None:
        return 0.0
    sizes = [(8, 4, 2, 2)[(constants["CODES"] >> (4 * i)) & 15] for i in range(constants["M"])]
    if family in ("l1", "dot"):
        others = sizes[1 + constants["FROM"] : 1 + constants["TO"]]
        sizes = [sizes[0], *others, *(sizes[-1:] if family == "dot" else [])]
    elements = constants["BLOCK"] / threads
    steps = max(1, int(graph.main.nbytes / (elements * sum(sizes))))
    trips = TILE / constants["BLOCK"] / steps
    around = 8 / constants["WORDS"] if family == "count" else 1
    return graph.issued(trips, around) / (TILE / threads)


def loaded(family: str, constants: dict) -> int:
    """Inputs that a launch reads."""
    some = constants["TO"] - constants["FROM"] if family in ("l1", "dot") else 0
    return {"l1": some + 1, "dot": some + 2}.get(family, constants["M"])


def tool(name: str, *args: str) -> str:
    """Output of one of triton's own binaries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def disassembled(kernel) -> tuple[str, Code]:
    """Resources and machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return tool("cuobjdump", "-res-usage", file.name), parse(tool("cuobjdump", "-sass", file.name))


def unseen(arch: int) -> list[str]:
    """Kernels with a hazard that the gates do not see."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.kernels import mutants

    missed = []
    for name, signature in mutants.SIGNATURES.items():
        if arch < 90 and name == "halves":
            continue  # has no packed additions
        kernel = triton.compile(ASTSource(getattr(mutants, name), signature, {}), target=GPUTarget("cuda", arch, 32))
        if len(hazards(kernel.asm["ptx"], [t for _, t in disassembled(kernel)[1]], zeros=True)) != 1:
            missed.append(f"sm_{arch}: {name}")
    return missed


def hazards(ptx: str, text: list[str], *, zeros: bool) -> list[str]:
    """Code that a processor or an assembler computes otherwise than the definition says.

    Args:
        ptx: of a kernel.
        text: its machine code.
        zeros: whether the order of zeros is promised.
    """
    bad = []
    if re.search(r"\bcvt\.\w+\.(f16|bf16)\.f64\b", ptx):
        bad.append("PTX rounds fp64 to 16 bits: NaNs keep sign and payload")
    if re.search(r"\b(add|sub)\.[su]?16x2\b", ptx) or any(re.search(r"\bV?I?ADD\S*\.16x2", t) for t in text):
        bad.append("a packed 16-bit addition: its constant may be dropped")
    minmax = re.search(r"\b(min|max)\.(\w+\.)*(f16|bf16|f32|f64)", ptx) or any(
        re.search(r"\b[FHD]MNMX", t) for t in text
    )
    if zeros and minmax:
        bad.append("min or max of floats: -0 is below +0")
    if "f32x2" in ptx:
        bad.append("packed fp32: ptxas contracts products and sums of it")
    return bad


def inspect(name: str, constants: dict, kernel, arch: int) -> Found:
    """Measures one compiled kernel and applies the gates that need no table."""
    usage, code = disassembled(kernel)
    registers, stack, _, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)[0])
    family, ptx, threads = name.removesuffix("_kernel"), kernel.asm["ptx"], 32 * kernel.metadata.num_warps
    graph = Graph(code)
    text, count = [t for _, t in code], per_element(family, constants, graph, threads)
    main = graph.text(graph.main if family in TILED else None)
    wide = sum(load_bytes(t) == 16 for t in main)
    found = Found(describe(name, constants), arch, registers, count, wide, len(code))
    bad = found.problems
    bad += [f"PTX holds {w}" for w in FORBIDDEN if w in ptx]
    if "div." not in ptx and "sqrt." not in ptx and any(re.search(r"\b[FD]FMA\b", t) for t in text):
        bad.append("machine code holds a fused multiply-add that no division asked for")
    bad += hazards(ptx, text, zeros=constants.get("MERGE") == MAX or family in ZEROS)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", t)) for t in text)
    allowed = (family in SPILL and not constants.get("UNMASKED")) or (arch >= BLACKWELL and spills <= MOST_SPILLS)
    if (stack or local or spills) and not allowed:
        bad.append(f"spills: STACK {stack}, LOCAL {local}, {spills} instructions")
    if -(-registers // 8) * 8 * threads > FILE:
        bad.append(f"{threads} threads of {registers} registers cannot be launched")
    if constants.get("UNMASKED") and not constants.get("WIDE"):
        if registers > cap(family, constants):
            bad.append(f"{registers} registers, cap {cap(family, constants)}")
        inputs = loaded(family, constants)
        if wide < inputs * constants.get("STEPS", 1):
            bad.append(f"{wide} loads of 128 bits for {inputs} inputs")
        if any(load_bytes(t) in (1, 2) for t in main):
            bad.append("narrow loads")
        if "OUT" in constants and not any(re.search(r"\bSTG\.\S*128", t) for t in text):
            bad.append("no stores of 128 bits")
        if family == "gram" and late(main):
            bad.append(f"{late(main)} loads of 128 bits come after arithmetic")
    return found


def late(text: list[str]) -> int:
    """Loads of 128 bits that do not stand before all arithmetic of floats."""
    first = next((i for i, t in enumerate(text) if re.search(r"\b[FD](ADD|MUL)2?\b", t)), len(text))
    return sum(load_bytes(t) == 16 for t in text[first:])


def check(arch: int, only: str, mutate: bool) -> tuple[list[Found], list[str]]:
    """Compiles and inspects every configuration for one architecture; with ``mutate`` what the gates do not see too."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastmerge.kernels._call import Gpu
    from fastmerge.kernels.backend import TritonKernels
    from tests.kernels.launches import launches

    driver.set_active(Driver(arch))
    found: dict[str, Found] = {}
    compile_only = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
        name = self.fn.__name__
        if describe(name, constants) not in found:
            one = inspect(name, constants, kernel, arch)
            found[one.key] = one
        return kernel

    class Compiler(Gpu):
        """Compiles what is launched and goes no further."""

        def runner(self, launch):
            self.compiled(launch)
            return lambda *args: None

    missed = unseen(arch) if mutate else []
    JITFunction.run = run
    kernels = object.__new__(TritonKernels)  # the constructor rightly refuses a CPU
    kernels.device = torch.device("cpu")
    kernels.gpu = Compiler(kernels.device)
    launches(only)(kernels)
    return list(found.values()), missed


def main() -> int:
    """Runs the gates; the number of failures is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table of instruction counts")
    parser.add_argument("--arch", type=int, action="append", help="only this architecture (90)")
    parser.add_argument("--only", default="", help="only launchers whose name holds this word")
    options = parser.parse_args()
    try:
        import torch  # noqa: F401
        import triton
    except ImportError as error:
        print(f"skipped: {error}")
        return 0
    start = time.time()
    arches = tuple(options.arch or ARCHES)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"per_element": {}}
    known = table.get("triton") == triton.__version__  # others compile some mutants to what is right
    # A process each, all at once: what is compiled once stays (Gpu.compiled), whatever the target.
    with ProcessPoolExecutor(len(arches), mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        each = list(pool.map(check, arches, [options.only] * len(arches), [known] * len(arches)))
    results, missed = ([x for some in part for x in some] for part in zip(*each, strict=True))
    counts = {f.key: round(f.instructions, 1) for f in results if f.arch == 90 and f.instructions}
    if options.update:
        kept = table["per_element"] if options.only else {}
        merged = dict(sorted((kept | counts).items()))
        TABLE.write_text(json.dumps({"triton": triton.__version__, "per_element": merged}, indent=1) + "\n")
    elif known:
        for f in (f for f in results if f.arch == 90 and f.instructions):
            most = table["per_element"].get(f.key)
            if most is None:
                f.problems.append("not in the table; run with --update")
            elif f.instructions > most * TOLERANCE + 0.05:
                f.problems.append(f"{f.instructions:.1f} instructions per element, {most} in the table")
    else:
        print(f"instruction counts not compared: the table is for triton {table.get('triton')}")
    for f in results:
        if f.arch == 90 or f.problems:
            count = f"{f.instructions:6.1f} per element" if f.instructions else f"{f.length:6} in all    "
            print(f"sm_{f.arch:<4}{f.registers:4} regs {count}  {f.wide_loads:2} x 128  {f.key}")
        for problem in f.problems:
            print(f"        FAIL {problem}")
    bad = sum(bool(f.problems) for f in results) + len(missed)
    if known:
        print(f"mutants that no gate sees: {', '.join(missed) or 'none'}")
    print(f"{len(results)} kernels for {', '.join(f'sm_{a}' for a in arches)}, {bad} bad, {time.time() - start:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
