"""Element types of checkpoints: names, sizes, promotion and the codes that the kernels use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)  # one object per type: compared and hashed as such
class DType:
    """One element type.

    Attributes:
        name: torch's name, as recipes write it (``bfloat16``).
        tag: the name inside a safetensors header (``BF16``).
        size: bytes per element.
        code: what the kernels call it (0 fp64, 1 fp32, 2 fp16, 3 bf16); -1 where nothing is computed on it.
    """

    name: str
    tag: str
    size: int
    code: int = -1

    @property
    def mergeable(self) -> bool:
        """Whether kernels compute on this type; others are copied if equal, else refused."""
        return self.code >= 0


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
    DType("float8_e8m0fnu", "F8_E8M0", 1),
    DType("complex64", "C64", 8),
)

FLOATS = (F64, F32, F16, BF16)
BY_TAG = {d.tag: d for d in FLOATS + _OTHERS}
BY_NAME = {d.name: d for d in FLOATS + _OTHERS}
BY_CODE = {d.code: d for d in FLOATS}


def promote(a: DType, b: DType) -> DType:
    """The common type of two mergeable types, as ``torch.promote_types`` has it."""
    if a == b:
        return a
    if F64 in (a, b):
        return F64
    return F32
