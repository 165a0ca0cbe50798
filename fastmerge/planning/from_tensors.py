"""Ops for tensors that a caller owns: the planner beside that of recipes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fastmerge.checkpoint import of_fields
from fastmerge.dtypes import DType, promote
from fastmerge.errors import RecipeError
from fastmerge.keys import checked_seed, tensor_key
from fastmerge.methods.base import Method
from fastmerge.methods.parameters import Resolver
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Source, Spec


class TensorPlanner:
    """Makes ops of one method, one per tensor; alike ones share a spec.

    Args:
        resolver: of the parameters.
        has_base: whether the first input of each tensor is the base.
        seed: of the random numbers.
    """

    def __init__(self, resolver: Resolver, *, has_base: bool, seed: int = 0) -> None:
        self._resolver = resolver
        self._has_base = has_base
        self._seed = checked_seed(seed)
        self._specs: dict[tuple[object, ...], Spec] = {}

    def spec(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: tuple[DType, ...],
        models: tuple[int, ...],
        out_dtype: DType | None = None,
        *,
        t: float = 0.0,
        indices: tuple[int, ...] | None = None,
    ) -> Spec:
        """The spec of one tensor.

        Args:
            name: of the tensor.
            shape: of all inputs.
            dtypes: of the inputs, base first where there is one.
            models: number of the model of each input but the base, for its parameters.
            out_dtype: of the result; None is the inputs' common type.
            t: place of the tensor's layer, 0 .. 1, for gradients.
            indices: numbers of the models for the random numbers; None takes ``models``.

        Raises:
            RecipeError: for parameters that have no value or do not fit.
        """
        method = self._resolver.method(name, [(i, name) for i in models], t)
        key = (id(method), shape, dtypes, out_dtype, models, indices)
        found = self._specs.get(key)
        if found is None:
            found = self._specs[key] = self._make(method, shape, dtypes, indices or models, out_dtype)
        return found

    def _make(
        self,
        method: Method,
        shape: tuple[int, ...],
        dtypes: tuple[DType, ...],
        models: tuple[int, ...],
        out_dtype: DType | None,
    ) -> Spec:
        dtype = functools.reduce(promote, dtypes) if out_dtype is None else out_dtype
        spec = Spec(method, shape, dtypes, dtype, has_base=self._has_base, models=models)
        if problems := method.check(spec):
            raise RecipeError(problems)
        return spec

    def op(self, name: str, spec: Spec, inputs: Sequence[int | Source], result: int) -> Op:
        """The op of one tensor, from its inputs (addresses, or other sources) and the address of its result."""
        key = tensor_key(self._seed, name) if spec.method.random else 0
        pairs = zip(inputs, spec.dtypes, strict=True)
        shape = spec.shape
        sources = tuple([of_fields(Memory, (x, d, shape)) if isinstance(x, int) else x for x, d in pairs])
        return of_fields(Op, (name, spec, key, sources, (of_fields(Memory, (result, spec.out_dtype, shape)),)))
