"""Element types of checkpoints: names, sizes, promotion and the codes that the kernels use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)  # one object per type: compared and hashed as such
class DType:
    """One element type.

    Attributes:
        name: torch's name, as recipes write it (``bfloat16``).
        tag: the name inside a safetensors header (``BF16``).
        size: bytes per element; 1 for the types of less than a byte, which only :meth:`nbytes` counts rightly.
        code: what the kernels call it (0 fp64, 1 fp32, 2 fp16, 3 bf16); -1 where nothing is computed on it.
        bits: per element, where that is less than a byte; else 0.
    """

    name: str
    tag: str
    size: int
    code: int = -1
    bits: int = 0

    @property
    def mergeable(self) -> bool:
        """Whether kernels compute on this type; others are copied if equal, else refused."""
        return self.code >= 0

    def nbytes(self, count: int) -> int:
        """Bytes of a tensor of ``count`` elements; -1 where it would end inside a byte."""
        if not self.bits:
            return count * self.size
        return -1 if count * self.bits % 8 else count * self.bits // 8

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are the type itself, in any process."""
        return _by_tag, (self.tag,)


F64 = DType("float64", "F64", 8, 0)
F32 = DType("float32", "F32", 4, 1)
F16 = DType("float16", "F16", 2, 2)
BF16 = DType("bfloat16", "BF16", 2, 3)

_OTHERS = (
    DType("int64", "I64", 8),
    DType("int32", "I32", 4),
    DType("int16", "I16", 2),
    DType("int8", "I8", 1),
    DType("uint64", "U64", 8),
    DType("uint32", "U32", 4),
    DType("uint16", "U16", 2),
    DType("uint8", "U8", 1),
    DType("bool", "BOOL", 1),
    DType("float8_e4m3fn", "F8_E4M3", 1),
    DType("float8_e5m2", "F8_E5M2", 1),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    DType("float8_e8m0fnu", "F8_E8M0", 1),
    DType("float6_e2m3fn", "F6_E2M3", 1, bits=6),
    DType("float6_e3m2fn", "F6_E3M2", 1, bits=6),
    DType("float4_e2m1fn", "F4", 1, bits=4),
    DType("complex64", "C64", 8),
)

FLOATS = (F64, F32, F16, BF16)
BY_TAG = {d.tag: d for d in FLOATS + _OTHERS}
BY_NAME = {d.name: d for d in FLOATS + _OTHERS}
BY_CODE = {d.code: d for d in FLOATS}


def _by_tag(tag: str) -> DType:
    return BY_TAG[tag]


def promote(a: DType, b: DType) -> DType:
    """The common type of two mergeable types, as ``torch.promote_types`` has it."""
    if a == b:
        return a
    if F64 in (a, b):
        return F64
    return F32
