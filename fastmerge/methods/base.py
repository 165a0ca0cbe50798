"""What a merge method declares: typed parameters, inputs, the definition, and the program that runs it.

A method is one frozen class; an instance of it is the method with its parameters. It owns its mathematics twice:
:meth:`Method.reference`, the definition in plain torch, and :meth:`Method.program`, the same mathematics as passes
of a kernel family (:mod:`fastmerge.ops`), for a whole batch of tensors at once. A method without a program is merged
by its definition.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec

REQUIRED: Any = object()
"""Default of a parameter that the recipe must give."""

ROW_BYTES = 300
"""Bytes of sums and coefficients per row, for methods that work by row, with some to spare."""

Scope = Literal["shared", "model", "input"]


class Param(NamedTuple):
    """One declared parameter.

    Attributes:
        name: as recipes write it.
        field: the attribute of the method.
        scope: ``shared`` (one value per output tensor), ``model`` (one per non-base model) or ``input``
            (one per input, the base included where it is an input).
        type: ``float``, ``int``, ``bool`` or a tuple of allowed words.
        default: :data:`REQUIRED`, or the value where the recipe says nothing. A default of None, here or in a
            preset, means that None is a legal value.
        doc: one line for ``fastmerge methods``.
        low, high: inclusive bounds of a number.
    """

    name: str
    field: str
    scope: Scope
    type: type | tuple[str, ...]
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None


def shared(
    doc: str, default: Any = REQUIRED, *, low: float | None = None, high: float | None = None, name: str | None = None
) -> Any:
    """Declares a parameter with one value per output tensor; ``name`` where recipes call it otherwise."""
    return _declared("shared", doc, default, low, high, name)


def per_model(doc: str, default: Any = REQUIRED, *, low: float | None = None, high: float | None = None) -> Any:
    """Declares a parameter with one value per non-base model; the field is a tuple."""
    return _declared("model", doc, default, low, high, None)


def per_input(doc: str, default: Any = REQUIRED, *, low: float | None = None, high: float | None = None) -> Any:
    """Declares a parameter with one value per input; the field is a tuple."""
    return _declared("input", doc, default, low, high, None)


def _declared(scope: Scope, doc: str, default: Any, low: float | None, high: float | None, name: str | None) -> Any:
    about = {"scope": scope, "doc": doc, "default": default, "low": low, "high": high, "name": name}
    return dataclasses.field(metadata=about)


class Contract(NamedTuple):
    """Which inputs a method takes.

    Attributes:
        base: ``required``, ``optional``, or ``ignored`` (a base is then an ordinary input, as in mergekit).
        least, most: how many non-base models (for ``ignored``: how many inputs); ``most`` None is any number.
        pairs: they come in twos: a model, then something about it that is not negative.
    """

    base: Literal["required", "optional", "ignored"]
    least: int = 1
    most: int | None = None
    pairs: bool = False

    def problem(self, method: str, count: int, *, has_base: bool) -> str | None:
        """What is wrong with ``count`` models besides the base, or None."""
        if self.base == "required" and not has_base:
            return f"{method} needs a base model; none was given"
        if count < self.least or (self.most is not None and count > self.most):
            most = " or more" if self.most is None else "" if self.most == self.least else f" to {self.most}"
            what = "inputs" if self.base == "ignored" else "models besides the base"
            return f"{method}: expected {self.least}{most} {what}, got {count}"
        if self.pairs and count % 2:
            return f"{method}: expected pairs of inputs, got {count}"
        return None


class _Params:
    """The parameters of a class, from its annotations: worked out once, at first use."""

    def __get__(self, _: object, owner: type[Method]) -> tuple[Param, ...]:
        return _params(owner)


@functools.cache
def _params(owner: type[Method]) -> tuple[Param, ...]:
    hints = typing.get_type_hints(owner)
    out = []
    for field in dataclasses.fields(owner):
        if not field.metadata:
            continue  # of a method that no recipe names
        about = dict(field.metadata)
        name, scope = about.pop("name") or field.name, about.pop("scope")
        kind = _value_type(hints[field.name], per_model=scope != "shared")
        out.append(Param(name=name, field=field.name, scope=scope, type=kind, **about))
    return tuple(out)


def _value_type(hint: Any, *, per_model: bool) -> type | tuple[str, ...]:
    """``float`` of ``float``, ``float | None`` and ``tuple[float, ...]``; the words of a ``Literal``."""
    if per_model:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if not isinstance(hint, type):
        raise TypeError(f"a parameter is a float, int, bool or Literal, not {hint}")
    return hint


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A merge method with its parameters.

    A subclass is a frozen dataclass whose fields are declared with :func:`shared`, :func:`per_model` and
    :func:`per_input`. It must define ``name``, ``summary``, ``formula``, ``paper``, ``contract`` and
    :meth:`reference`; everything else has a default.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    contract: ClassVar[Contract]
    params = typing.cast("tuple[Param, ...]", _Params())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    """Kernels of its program that not every backend has."""
    coded: ClassVar[bool] = False
    """Whether its program reads inputs by kernels alone that take codes and scales: all but ``dot`` and
    ``replicate``."""
    only_defined: ClassVar[str] = ""
    """Parameters of a method with a program that it does not take (see :meth:`gap`), as ``fastmerge methods`` says."""
    wide: ClassVar[bool] = False
    """Whether results of fp32 are computed in fp64: plain averages, which others compute with fused multiplications."""
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Parameter sets that tests and benches iterate: plain parameters (a sequence gives one value per model), and
    optionally ``preset``, ``models`` (how many non-base models; the contract decides otherwise) and ``base`` (true
    for a base where the contract leaves it open)."""

    @abstractmethod
    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """The definition, in plain torch, of one whole tensor (base first where there is one)."""

    def references(self, inputs: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
        """The definition of every target of an op; methods that make several replace it."""
        return [self.reference(inputs, op)]

    @classmethod
    def reference_all(cls, inputs: Sequence[Sequence[torch.Tensor]], ops: Sequence[Op]) -> list[torch.Tensor]:
        """The definition for many tensors at once; differs from one by one only where the grain is ``model``."""
        return [op.spec.method.reference(i, op) for i, op in zip(inputs, ops, strict=True)]

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program | None:  # noqa: ARG003  for subclasses
        """The same mathematics as passes over pieces of many tensors, on one kernel backend; None without one."""
        return None

    @classmethod
    def programmed(cls) -> bool:
        """Whether it has a program at all."""
        return cls.program.__func__ is not Method.program.__func__  # type: ignore[attr-defined]

    def wants(self) -> tuple[str, ...]:
        """Kernels that not every backend has, with these parameters."""
        return self.needs

    def gap(self) -> str | None:
        """Why the definition stands in for a program with these parameters; None where it does not."""
        return None if self.programmed() else f"{self.name} has no kernels yet"

    @classmethod
    def defaults(cls, preset: str | None = None) -> dict[str, Any]:
        """Default of every parameter under a preset (None: ``mergekit``, which is the declared defaults).

        Raises:
            RecipeError: for a preset that the method does not have.
        """
        out = {p.name: p.default for p in cls.params}
        if preset is not None and preset != "mergekit":
            if preset not in cls.presets:
                known = ", ".join(["mergekit", *(p for p in cls.presets if p != "mergekit")])
                raise RecipeError(f"{cls.name}: unknown preset {preset!r}; expected one of {known}")
            out.update(cls.presets[preset])
        return out

    @property
    def words(self) -> tuple[object, ...]:
        """The values of all parameters that are no numbers: what tensors of one kernel call have in common."""
        return tuple(getattr(self, p.field) for p in self.params if p.type is bool or isinstance(p.type, tuple))

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn, so that tensors need keys."""
        return False

    def grain(self, spec: Spec) -> Grain:
        """What one result depends on (see :data:`fastmerge.ops.spec.Grain`); without a program, the whole tensor."""
        return "element" if self.gap() is None else "matrix"

    def workspace(self, spec: Spec) -> int:
        """Bytes beside the slots: what is kept of a tensor between passes; of one that is never cut, all that it takes.

        Of a definition in plain torch these are the result and one byte per element, unless a method says more.
        """
        grain = self.grain(spec)
        if grain == "matrix":
            return (spec.out_dtype.size + 1) * spec.numel
        return ROW_BYTES * spec.rows if grain == "row" else 0

    def defined(self, spec: Spec) -> int:
        """Bytes beside the slots where the definition stands in for the program."""
        return self.workspace(spec)

    def check(self, spec: Spec) -> list[str]:
        """Problems of resolved parameters that bounds alone do not catch; empty where there are none."""
        return []

    def warn(self, spec: Spec) -> list[str]:
        """Questionable parameters (a negative TIES weight, weights that sum to zero): one line each."""
        return []
