"""What an adapter does to one tensor of its base: low-rank updates, and rows that it holds itself."""

from __future__ import annotations

from typing import NamedTuple

from fastmerge.checkpoint.header import TensorInfo

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Model types, and layers of theirs, that store ``[in, out]``; square ones cannot be told by their shapes."""

_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Model types whose fused experts are ``[E, in, out]`` to peft; square ones cannot be told by their shapes."""


def stored_transposed(name: str, model_type: object) -> bool:
    """Whether models of a type store a weight of this name ``[in, out]``."""
    return model_type in _CONV1D and name.split(".")[-2] in _CONV1D_MODULES


class Update(NamedTuple):
    """One low-rank update: ``scale (B A)`` is added to a weight.

    Attributes:
        a: ``[R, I]``, of fused experts ``[E R, I]``, expert by expert; of a bias, what is added to it, ``[1, O]``.
        b: ``[O, R]``, of fused experts ``[O, R E]`` with the expert as the fastest index; None for a bias.
        scale: alpha / r, or alpha / sqrt(r).
        embedding: the weight is ``[I, O]``.
        magnitude: ``[O]``, lengths that the rows of the sum are given (DoRA); None where they stay.
        experts: E of a parameter of fused experts, whose matrices are updated one by one; 1 for a plain matrix.
    """

    a: TensorInfo
    b: TensorInfo | None
    scale: float
    embedding: bool = False
    magnitude: TensorInfo | None = None
    experts: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """``(O, I)``, of one expert."""
        return (self.b.shape[0] if self.b is not None else 1, self.a.shape[1])

    def transposes(self, name: str, shape: tuple[int, ...], model_type: object, *, flag: bool) -> bool | None:
        """Whether a weight is stored ``[in, out]``; None where the update does not fit it.

        The shapes decide: peft goes by the layer's type, whatever ``fan_in_fan_out`` says. Where the weight is
        square, the model's type and the layer's name tell that; the flag does where the type is not known.

        Args:
            name: of the weight.
            shape: of the weight, or of one expert's.
            model_type: of the base.
            flag: ``fan_in_fan_out`` of the adapter.
        """
        if self.b is None:
            return False if shape == self.a.shape[1:] else None
        plain = self.matrix
        if self.embedding:
            return True if shape == plain[::-1] else None
        if shape == plain and shape == plain[::-1]:
            if self.experts > 1:
                return model_type in _TRANSPOSED_EXPERTS
            if not isinstance(model_type, str):
                return flag
            return stored_transposed(name, model_type)
        return False if shape == plain else True if shape == plain[::-1] else None


class Tokens(NamedTuple):
    """Rows of an embedding, or of a head, that an adapter holds itself.

    Attributes:
        rows: which, in the order of the tensor's.
        info: ``[n, H]``.
    """

    rows: tuple[int, ...]
    info: TensorInfo
