"""The kernels compiled for arm64 and run under qemu, beside the extension: both must write the same bytes."""

import bisect
import contextlib
import ctypes
import functools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np

from fastmerge import _native
from fastmerge.backends.native import CODED
from fastmerge.dtypes import BY_CODE
from fastmerge.ops.segments import HEADER, LENGTH, OUT

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
MISSING = [n for n, there in (("aarch64-linux-gnu-g++", COMPILER), ("qemu-aarch64", QEMU)) if there is None]

ARENA, PAGE, GUARD, FREE = 1 << 40, 4096, 64, b"\xa5"
TRANSFERS = {"read_some": 2, "write_some": 2, "read_past": 3}
CODES = {"dequantise": 6, "largest": 3, "quantise": 5}
"""Kernels that take the address of a table, by its columns."""
TABLELESS = ("fold", "philox_u16", "count_nonfinite", "apart", "peel", "low_rank")
KERNELS = (
    "combine", "gram", "gram_kept", "dot", "delta_keys", "count", "kth", "l1", "votes", "consensus", "importance",
    "fuse", "replicate", *TABLELESS, *CODES,
)  # fmt: skip
FLAGGED = {"delta_keys": 8, "count": 13, "kth": 10, "l1": 12, "votes": 14, "consensus": 19}
"""Kernels that end in flags which calls may leave out: how many arguments they have."""


def build(folder):
    """Compiles the program with the flags of CMakeLists.txt; warnings are errors."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = " ".join(re.findall(r"FM_FLAGS (-[^)]*)\)", text)).split()
    kernels = re.search(r"set\(FM_KERNELS (.*?)\)", text, re.DOTALL).group(1).split()
    plain = re.split("[ ;]", re.search(r"COMPILE_LANGUAGE:CXX>:(-[^>]*)>", text).group(1))
    others = [f"csrc/{n}.cpp" for n in ("dispatch", "kth", "io", "past")]
    jobs = [(s, [*flags, "-DFM_ISA=neon"]) for s in kernels]
    jobs += [(s, plain) for s in (*others, "tests/backends/arm64.cpp")]
    objects = [str(folder / f"{Path(s).stem}.o") for s, _ in jobs]
    running = [
        subprocess.Popen([COMPILER, "-std=c++17", *options, "-Werror", "-c", str(ROOT / source), "-o", target])
        for (source, options), target in zip(jobs, objects, strict=True)
    ]
    assert [r.wait() for r in running] == [0] * len(jobs)
    subprocess.run([COMPILER, "-static", *objects, "-o", str(folder / "arm64")], check=True)
    return folder / "arm64"


class Image:
    """The memory that a call reaches, laid out for the other process, and the call's arguments there.

    Every array and every piece of a tensor keeps its place within a page and gets bytes around it that nobody may
    write; pieces that overlap stay one.
    """

    def __init__(self, name, args):
        args = tuple([a for a in args if a is not None])  # bits that nobody left, which are last
        if name == "combine":
            args = (*args, False, False)[:10]  # far and wide
        if name in FLAGGED:
            args = (*args, False, False)[: FLAGGED[name]]
        if name in CODES:
            args = (rows_at(args[0], args[1], CODES[name]), *args[2:])
        table, rest = (None, args) if name in TABLELESS else (args[0].copy(), args[1:])
        columns = addresses(name, args)
        spans = [(a.ctypes.data, a.nbytes) for a in rest if isinstance(a, np.ndarray)]
        spans += [(int(r[c]), int(n)) for c, each in columns.items() for r, n in zip(table, each, strict=True)]
        given = {}  # addresses among the arguments, with the bytes there
        if name == "count_nonfinite":
            given[0] = args[1] * BY_CODE[args[2]].size
        if name == "apart":
            given |= {i: args[4] * BY_CODE[args[i + 1]].size for i in (0, 2)}
        if name == "peel":
            work = 8 if BY_CODE[args[5]].size == 8 else 4
            given |= {0: args[4] * work, 1: args[4] * work, 2: args[4]}
        if name == "low_rank":
            rows, columns, rank, stride, code = args[5:]
            sizes = (4 * rows * columns, 4 * rows * rank, 4 * ((rank - 1) * stride + columns))
            given |= dict(enumerate((*sizes, rows * columns * BY_CODE[code].size)))
        spans += [(args[i], n) for i, n in given.items()]
        if name == "read_past":  # blocks as a whole
            spans = [(a & -PAGE, -(-(a + n) // PAGE) * PAGE - (a & -PAGE)) for a, n in spans]
        self.spans, self.end, self.values = [], ARENA, []
        for start, n in joined(spans):
            self._place(start, n)
        self.starts = [s[0] for s in self.spans]
        if table is not None:
            for c, each in columns.items():
                table[:, c] = [self.there(a) if n > 0 else a for a, n in zip(table[:, c], each, strict=True)]
            self.table = table  # stays alive
            self.add(table)
        for a in rest:
            self.values += self._argument(a)
        for i, n in given.items():
            self.values[i] = self.there(args[i]) if n else args[i]

    def _place(self, start, n):
        at = self.end + GUARD
        at += (start - at) % PAGE
        self.spans.append((start, n, at))
        self.end = at + n

    def _argument(self, a):
        if isinstance(a, float):
            return list(struct.unpack("q", struct.pack("d", a)))
        if not isinstance(a, np.ndarray):
            return [int(a) if a < 2**63 else int(a) - 2**64]
        return [self.there(a.ctypes.data) if a.nbytes else 0, *(*a.shape, 1)[:2]]

    def there(self, address):
        """Where an address of this process is in the other one."""
        start, n, at = self.spans[bisect.bisect(self.starts, int(address)) - 1]
        assert start <= address < start + n
        return at + int(address) - start

    def add(self, array):
        """Places one more array, and makes it the next argument."""
        self._place(array.ctypes.data, array.nbytes)
        self.values += [self.spans[-1][2], *(*array.shape, 1)[:2]]

    def holder(self, i):
        """What holds byte ``i``: the number of the piece or array and the byte of it, or nothing."""
        at = [(n, ARENA + i - s[2]) for n, s in enumerate(self.spans) if 0 <= ARENA + i - s[2] < s[1]]
        return f"{at[0]} of {len(self.spans)}" if at else "beside all memory"

    def bytes(self):
        """The memory as it is now."""
        out = bytearray(FREE * (self.end + GUARD - ARENA))
        for start, n, at in self.spans:
            out[at - ARENA : at - ARENA + n] = ctypes.string_at(start, n)
        return out


def rows_at(address, rows, columns):
    """The table at an address."""
    return np.frombuffer(ctypes.string_at(address, 8 * rows * columns), np.int64).reshape(rows, columns)


def joined(spans):
    """Spans of memory (address, bytes) in order, those that overlap as one."""
    found = []
    for start, n in sorted(s for s in spans if s[1] > 0):
        if found and start < sum(found[-1]):
            low, size = found[-1]
            found[-1] = (low, max(size, start + n - low))
        else:
            found.append((start, n))
    return found


def addresses(name, args):
    """The columns of a table that hold addresses, each with the bytes there by row."""
    if name in TABLELESS:
        return {}
    table = args[0]
    if name == "dequantise":
        first, n, width, code = table[:, 1], table[:, 2], *args[1:]
        blocks = np.where(n > 0, -(-(first + n) // width) * 4, 0)
        codes = np.where(n > 0, (first + n + 1) // 2 if code in (3, 4) else first + n, 0)
        return {0: codes, 3: blocks, 4: np.where(table[:, 4] > 0, blocks, 0), 5: 4 * n}
    if name == "largest":
        return {0: 4 * table[:, 1], 2: -(-table[:, 1] // args[1]) * 4}
    if name == "quantise":
        n, width, code, _ = table[:, 1], *args[1:]
        blocks = -(-n // width) * 4
        return {0: 4 * n, 2: blocks, 3: blocks, 4: n // 2 if code == 4 else n}
    if name in TRANSFERS:
        return {TRANSFERS[name]: table[:, -1]}
    inputs = HEADER + len(args[1])
    found = {HEADER + i: sizes(table[:, HEADER + i], table[:, LENGTH], int(c)) for i, c in enumerate(args[1])}
    if name in ("combine", "consensus", "replicate", "fuse"):
        found |= dict.fromkeys((OUT, *range(inputs, table.shape[1])), table[:, LENGTH] * BY_CODE[args[2]].size)
    return found


def sizes(inputs, lengths, code):
    """Bytes at the addresses of an input; of a coded one the first word says it."""
    if code != CODED:
        return lengths * BY_CODE[code].size
    return np.array([rows_at(int(a), 1, 1)[0, 0] if n else 0 for a, n in zip(inputs, lengths, strict=True)])


class Arm64:
    """The program under qemu: ``call`` asks it and the extension for the same, ``unlike`` says what differed."""

    def __init__(self, program, files=()):
        self.calls, self.found = 0, []
        command = [QEMU, str(program)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=files)

    def close(self):
        self.process.communicate()

    def unlike(self):
        """What the two did not do alike."""
        return self.found if self.calls else ["no kernel was called"]

    def call(self, name, native, *args):
        """What ``native`` returns, after the other process has done the same to its copy of the memory."""
        image = Image(name, args)
        before = image.bytes()
        result = native(*args)
        if isinstance(result, np.ndarray):
            image.add(result)
            before += FREE * (image.end + GUARD - ARENA - len(before))
        question = struct.pack("16sqq", name.encode(), len(image.values), len(before))
        self.process.stdin.write(question + np.array(image.values, np.int64).tobytes() + before)
        self.process.stdin.flush()
        answer = self.process.stdout.read(56)
        after = np.frombuffer(self.process.stdout.read(len(before)), np.uint8)
        wrong = np.flatnonzero(after != np.frombuffer(image.bytes(), np.uint8))
        if len(wrong):
            self.found.append(f"{name}: {len(wrong)} bytes, the first {image.holder(int(wrong[0]))}; {args[1:]}")
        numbers = result if isinstance(result, tuple) else (result,) if isinstance(result, int) else ()
        here = struct.pack("".join("q" if isinstance(n, int) else "d" for n in numbers), *numbers)
        if here != answer[: len(here)]:
            self.found.append(f"{name}: {result} here, {answer[: len(here)].hex()} there, {here.hex()} expected")
        self.calls += 1
        return result

    @contextlib.contextmanager
    def beside(self):
        """Every kernel of the extension asks the other process too."""
        kept = {name: getattr(_native, name) for name in KERNELS}
        try:
            for name, native in kept.items():
                setattr(_native, name, functools.partial(self.call, name, native))
            yield
        finally:
            for name, native in kept.items():
                setattr(_native, name, native)
