"""Gates on compiled kernels, without a GPU: ``python tests/kernels/aot.py [--update] [--arch 90] [--only WORD]``.

Every launcher is called for real on small tables, with a driver that only names the target, so what is compiled is
what a GPU of that target would be given: same signature, same specialisation, same options. Then, per kernel:

- the PTX holds no fused multiply-add, approximation or flush to zero, nor does the machine code fuse anything;
- it rounds no fp64 to 16 bits directly, which would keep a NaN's sign and payload;
- it holds no packed 16-bit addition: ptxas up to 13.1.80 drops the constant of one of which it needs a half;
- where the order of zeros is promised (MERGE = MAX) nothing became min or max of floats, which put -0 below +0
  (``mutants.py`` has kernels with these three hazards, which must be seen);
- no spills: STACK 0, LOCAL 0, no LDL or STL; registers within the cap of the kernel;
- unmasked variants move 128 bits per access: as many LDG.E.128 as the inputs need, no 16-bit loads, stores likewise;
- on sm_90, instructions per element at most 3 % above the committed table (``--update`` writes it anew).

Instructions per element are those issued per thread, divided by its elements: loops count as often as a full tile
runs them, slow paths of divisions (denormals, infinities) not at all and the rounds of list once.
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

TABLE = Path(__file__).with_name("instructions_sm90.json")
ARCHES = (80, 90, 120)
FORBIDDEN = ("fma.", ".approx", "div.full", ".ftz")
TOLERANCE = 1.03
STEPS = 65_536 // 2048

# Registers: 64 let 1024 threads share a multiprocessor, 128 let 512: with the 32 bytes per input that a thread of
# consensus has in flight 48 KB from three inputs on, as much as an H200 asks for. The sums of gram keep 8 running sums
# per column and thread (80 for four models); fp64 and masked variants are off the main road.
CAPS = {"combine": 64, "consensus": 128, "delta_keys": 64, "count": 80, "votes": 64, "gram": 128, "l1": 128}
CAP = 128

MAX = 2
"""MERGE, where the sign of a zero is that of the first of equals."""

NAMES = {0: "fp64", 1: "fp32", 2: "fp16", 3: "bf16"}


@dataclass
class Found:
    """One compiled kernel and what is wrong with it."""

    key: str
    arch: int
    registers: int
    instructions: float
    wide_loads: int
    problems: list[str] = field(default_factory=list)


def parse(sass: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction, without the padding at the end."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(a, 16), t.strip()) for a, t in lines if not t.startswith("NOP")]
    while code and re.match(rf"BRA 0x{code[-1][0]:x}$", code[-1][1].strip()):
        code.pop()
    return code


def target(text: str) -> int | None:
    """Where an instruction jumps to, if it names an address."""
    found = re.search(r"(?:BRA|CALL\.REL\.NOINC)(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(0x[0-9a-f]+)", text)
    return int(found.group(1), 16) if found else None


def issued(code: list[tuple[int, str]], block: int, warps: int) -> float:
    """Instructions issued per element of a full tile; see the module's docstring."""
    calls = [(a, target(t)) for a, t in code if "CALL.REL" in t]
    skip = [(min(t for _, t in calls if t is not None), code[-1][0] + 1)] if calls else []
    jumps = [(a, target(t)) for a, t in code if "BRA" in t and target(t) is not None]
    around = [[(a, t) for a, t in jumps if t is not None and call - 0x100 < a < call < t] for call, _ in calls]
    skip += [(max(some)[0] + 1, max(some)[1]) for some in around if some]  # from the branch to where it comes back
    live = [a for a, _ in code if not any(lo <= a < hi for lo, hi in skip)]
    loops = [(t, a) for a, t in jumps if t is not None and t < a and a in live]
    times = 0.0
    for a in live:
        times += STEPS if any(lo <= a <= hi for lo, hi in loops) else 1
    steps = STEPS if loops else 1
    return times / (block / (32 * warps) * steps)


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
    count = constants.get("M")
    words = [name.removesuffix("_kernel")]
    if count:
        words.append("+".join(NAMES[(constants["CODES"] >> (4 * i)) & 15] for i in range(count)))
    if "OUT" in constants:
        words.append("to " + NAMES[constants["OUT"]])
    rules = ("ELECT", "MERGE", "ZERO", "ROUND")
    words += [f"{rule.lower()}={constants[rule]}" for rule in rules if constants.get(rule, -1) > 0]
    if "FROM" in constants:
        words.append(f"{constants['FROM']}..{constants['TO']}")
    flags = ("DELTA", "DIFF", "DIV", "DROP", "TRIM", "SPREAD", "SPLIT", "ROWS", "UNMASKED")
    return " ".join(words + [f.lower() for f in flags if constants.get(f)])


def tool(name: str, *args: str) -> str:
    """Output of one of triton's own binaries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def disassembled(kernel) -> tuple[str, list[tuple[int, str]]]:
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
    return bad


def inspect(name: str, constants: dict, kernel, arch: int) -> Found:
    """Measures one compiled kernel and applies the gates that need no table."""
    usage, code = disassembled(kernel)
    registers, stack, _, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)[0])
    text = [t for _, t in code]
    loads = [t for t in text if re.search(r"\bLDG\.", t)]
    wide = sum(".128" in t for t in loads)
    warps = kernel.metadata.num_warps
    found = Found(describe(name, constants), arch, registers, issued(code, constants["BLOCK"], warps), wide)
    bad = found.problems
    bad += [f"PTX holds {w}" for w in FORBIDDEN if w in kernel.asm["ptx"]]
    if "div." not in kernel.asm["ptx"] and any(re.search(r"\b[FD]FMA\b", t) for t in text):
        bad.append("machine code holds a fused multiply-add that no division asked for")
    bad += hazards(kernel.asm["ptx"], text, zeros=constants.get("MERGE") == MAX)
    if stack or local or any(re.search(r"\b(LDL|STL)\b", t) for t in text):
        bad.append(f"spills: STACK {stack}, LOCAL {local}")
    family = name.removesuffix("_kernel")
    cap = CAPS.get(family, CAP)
    if constants.get("UNMASKED") and not constants.get("WIDE"):
        if registers > cap:
            bad.append(f"{registers} registers, cap {cap}")
        inputs = constants["TO"] - constants["FROM"] + 1 if family == "l1" else constants["M"]
        if wide < inputs:
            bad.append(f"{wide} loads of 128 bits for {inputs} inputs")
        if any(re.search(r"\.[US](16|8)\b", t) for t in loads):
            bad.append("narrow loads")
        if "OUT" in constants and not any(re.search(r"\bSTG\.\S*128", t) for t in text):
            bad.append("no stores of 128 bits")
    return found


def launches(only: str):
    """Calls every launcher of interest on the kernels of one (fake) device."""
    import numpy as np

    from fastmerge.ops.kernels import Brackets, Found
    from tests.kernels.cases import Case

    def run(kernels, name, codes, call, sizes=(65_536,), out=None):
        if only in name:
            call(kernels, Case(codes, out=codes[0] if out is None else out, sizes=sizes, kinds=["normal"]))

    def combine(delta, div=1.0):
        return lambda k, c: k.combine(
            c.segments,
            np.ones((c.groups, c.n + 1)),
            np.full((c.groups, 2), div),
            delta=delta,
            per_row=False,
        )

    def gram(delta, diff=False):
        def call(k, c):
            v = c.n + 1 - delta
            k.gram(c.segments, np.zeros((9, v * (v + 1) // 2 + diff)), delta=delta, diff=diff, per_row=False)

        return call

    def keep(c, words):
        args = c.keep_args(words)
        if "spread" not in words:
            args.cut[:] = (0, 5, -1) if "cut" in words else (2**62, 0, -1)
        return args

    def consensus(words, mode):
        return lambda k, c: k.consensus(c.segments, keep(c, words), c.rules(*mode))

    def l1(words):
        return lambda k, c: k.l1(c.segments, keep(c, words), np.zeros((9, c.n, 2)))

    def votes(k, c):
        k.votes(c.segments, keep(c, "all"), c.rules(1, False).votes, np.zeros((9, 2), np.int64))

    def count(drop=False):
        def call(k, c):
            lo = np.zeros((c.groups, c.n), np.uint64)
            lists = np.zeros((c.n, 64), np.uint32), np.zeros((c.n, 64, 2), np.int64), np.zeros(c.n, np.int64)
            found = Found(np.zeros((9, c.n, 4), np.int64), *lists)
            k.count(c.segments, c.delta_args(drop=drop), Brackets(lo, lo + 9), found)

        return call

    def kth(drop=False):
        def call(k, c):
            ranks = np.full((c.groups, c.n), 1000, np.int64)
            found = np.zeros((c.groups, c.n, 4), np.int64)
            k.kth(c.segments, c.delta_args(drop=drop), ranks, np.zeros((c.groups, c.n), np.uint64), found)

        return call

    def delta_keys(k, c):
        k.delta_keys(c.segments, c.delta_args(), np.zeros((int(c.segments.table[:, 1].sum()), c.n), np.uint32))

    ties, dare, odd = (1, False, 0, 0), (0, False, 0, 0), (2048 + 5,)
    plan = []
    for code in (3, 2, 1):
        for n in (2, 4):
            x, d = (code,) * n, (code,) * (n + 1)
            plan += [("combine", x, combine(False)), ("combine", d, combine(True)), ("gram", x, gram(False))]
            plan += [("consensus", d, consensus("all", ties)), ("count", d, count()), ("gram", d, gram(True))]
    for n in (2, 4):
        d = (3,) * (n + 1)
        plan += [("consensus", d, consensus("index cut", ties)), ("consensus", d, consensus("drop", dare))]
        plan += [("consensus", d, consensus("drop", ties)), ("l1", d, l1("drop")), ("l1", d, l1("all"))]
        plan += [("votes", d, votes), ("delta_keys", d, delta_keys)]
    plan += [("consensus", (3,) * 9, consensus(*c)) for c in (("all", ties), ("drop", dare))]
    d = (3, 3, 3)
    plan += [("gram", (3, 3), gram(False, True)), ("consensus", d, consensus("spread", ties))]
    plan += [("consensus", d, consensus("all", m)) for m in ((1, True, 2, 0), (2, False, 1, 1), (1, False, 0, 2))]
    plan += [("combine", d, combine(True, 3.0)), ("count", d, count(True)), ("combine", (0, 3), combine(True))]
    plan += [("gram", (3, 0), gram(False)), ("consensus", (0, 3, 3), consensus("all", ties))]
    tails = [("combine", d, combine(True)), ("gram", d, gram(True)), ("consensus", d, consensus("index", ties))]
    tails += [("count", d, count()), ("l1", d, l1("drop index")), ("votes", d, votes), ("delta_keys", d, delta_keys)]
    tails += [("consensus", d, consensus("drop spread", ties))]

    def everything(kernels):
        for name, codes, call in plan:
            run(kernels, name, codes, call)
        run(kernels, "kth", d, kth(), (16_384,))
        run(kernels, "kth", d, kth(drop=True), (16_384,))
        run(kernels, "kth", (0, 3), kth(), (8192,))
        for name, codes, call in tails:
            run(kernels, name, codes, call, odd)
        for out in (1, 2, 3):  # every conversion, alone and in pairs
            for codes in ((0, 0), (1, 1), (2, 2), (3, 3), (3, 3, 3)):
                for sizes in (odd, (65_536,)):
                    run(kernels, "combine", codes, combine(len(codes) > 2), sizes, out)
        for codes in ((3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)):
            for sizes in (odd, (65_536,)):
                run(kernels, "consensus", codes, consensus("all", (1, False, 0, MAX)), sizes)

    return everything


def check(arch: int, only: str) -> list[Found]:
    """Compiles and inspects every configuration for one architecture."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastmerge.kernels._call import Gpu
    from fastmerge.kernels.backend import TritonKernels

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

    JITFunction.run = run
    kernels = object.__new__(TritonKernels)  # the constructor rightly refuses a CPU
    kernels.device = torch.device("cpu")
    kernels.gpu = Compiler(kernels.device)
    launches(only)(kernels)
    return list(found.values())


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
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = [f for some in pool.map(check, arches, [options.only] * len(arches)) for f in some]
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"per_element": {}}
    counts = {f.key: round(f.instructions, 1) for f in results if f.arch == 90}
    if options.update:
        kept = table["per_element"] if options.only else {}
        merged = dict(sorted((kept | counts).items()))
        TABLE.write_text(json.dumps({"triton": triton.__version__, "per_element": merged}, indent=1) + "\n")
    elif table.get("triton") == triton.__version__:
        for f in (f for f in results if f.arch == 90):
            most = table["per_element"].get(f.key)
            if most is None:
                f.problems.append("not in the table; run with --update")
            elif f.instructions > most * TOLERANCE + 0.05:
                f.problems.append(f"{f.instructions:.1f} instructions per element, {most} in the table")
    else:
        print(f"instruction counts not compared: the table is for triton {table.get('triton')}")
    for f in results:
        if f.arch == 90 or f.problems:
            print(
                f"sm_{f.arch:<4}{f.registers:4} regs {f.instructions:7.1f} instr/elem  {f.wide_loads:2} x 128  {f.key}"
            )
        for problem in f.problems:
            print(f"        FAIL {problem}")
    bad = sum(bool(f.problems) for f in results)
    if table.get("triton") == triton.__version__:  # others compile some of them to what is right
        missed = [text for arch in arches for text in unseen(arch)]
        bad += len(missed)
        print(f"mutants that no gate sees: {', '.join(missed) or 'none'}")
    print(f"{len(results)} kernels for {', '.join(f'sm_{a}' for a in arches)}, {bad} bad, {time.time() - start:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
