"""The shape of a recipe: frozen pydantic values, strict about keys."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, InstanceOf, StrictInt, StrictStr

from fastmerge.dtypes import BY_NAME, FLOATS
from fastmerge.recipe.problems import hint
from fastmerge.recipe.settings import Parameters
from fastmerge.recipe.tree import Map, kind

SEED_BOUND = 2**63
NO_ADAPTERS = "adapters (model+lora) are not supported yet: merge the adapter into its model first"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model: a local directory, or ``org/name`` on the hub, at a revision."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def plain(self) -> Any:
        """As YAML writes it: a string, or mergekit's mapping where ``@`` or ``+`` belong to the path."""
        if not any(c in self.path + (self.revision or "") for c in "@+"):
            return str(self)
        return {"model": {"path": self.path, **({"revision": self.revision} if self.revision else {})}}


def model_ref(raw: Any) -> ModelRef:
    """Reads ``path``, ``org/name@revision``, or mergekit's mapping form.

    A text with ``@`` or ``+`` that exists as a path is that path.

    mergekit's ``override_architecture`` is accepted and has no effect: there is no architecture table.

    Raises:
        ValueError: for adapters (``+lora``), several revisions, an empty path or anything else.
    """
    if isinstance(raw, ModelRef):
        return raw
    if isinstance(raw, Map):
        return _mapping_ref(raw)
    if not isinstance(raw, str) or not _sound(raw):
        shown = repr(raw) if isinstance(raw, str) else kind(raw)
        raise ValueError(f"expected a model: a directory or org/name[@revision]; got {shown}")
    if ("@" in raw or "+" in raw) and os.path.lexists(os.path.expanduser(raw)):  # noqa: PTH111  ~user may not exist
        return ModelRef(raw)
    if "+" in raw:
        raise ValueError(f"{raw!r}: {NO_ADAPTERS} (a path with '+' is written {{model: {{path: ...}}}})")
    path, at, revision = raw.partition("@")
    if at and (not path or not revision or "@" in revision):
        raise ValueError(f"{raw!r}: expected one path[@revision]")
    return ModelRef(path, revision or None)


def _sound(text: str) -> bool:
    """Whether a text can be a path or a hub id: not blank, no zero byte, nothing that no file can hold."""
    return bool(text.strip()) and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _mapping_ref(raw: Map) -> ModelRef:
    if raw.get("lora") is not None:
        raise ValueError(NO_ADAPTERS)
    inner = raw.get("model")
    if set(raw) <= {"model", "lora", "override_architecture"}:
        if isinstance(inner, str):
            return model_ref(inner)
        if isinstance(inner, Map) and set(inner) <= {"path", "revision"}:
            path, revision = inner.get("path"), inner.get("revision")
            if isinstance(path, str) and _sound(path) and isinstance(revision, str | None):
                return ModelRef(path, revision or None)
    raise ValueError(f"expected a model, or {{model: {{path, revision}}}}; got a mapping of {sorted(raw)}")


def dtype_name(raw: Any) -> str:
    """Reads a floating-point type by torch's name, with or without ``torch.``.

    Raises:
        ValueError: for anything else, with the nearest name.
    """
    names = [d.name for d in FLOATS]
    if not isinstance(raw, str):
        shown = raw if isinstance(raw, int | float) else kind(raw)
        raise ValueError(f"expected one of {', '.join(names)}; got {shown}")  # noqa: TRY004  pydantic collects these
    name = raw.removeprefix("torch.")
    if name in names:
        return name
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
    near = f" (did you mean {short[name]!r}?)" if name in short else hint(name, names)
    what = "is no floating-point type" if name in BY_NAME else "is no known type"
    raise ValueError(f"{raw!r} {what}: expected one of {', '.join(names)}{near}")


def _layer_range(value: tuple[int, int]) -> tuple[int, int]:
    first, end = value
    if not 0 <= first < end:
        raise ValueError(f"expected [first, end) with 0 <= first < end; got [{first}, {end}]")
    return value


def _seed(value: int) -> int:
    if not -SEED_BOUND <= value < SEED_BOUND:
        raise ValueError(f"expected a 64-bit signed integer; got {value}")
    return value


def _none_is_empty(value: Any) -> Any:
    return () if value is None else value


Ref = Annotated[InstanceOf[ModelRef], BeforeValidator(model_ref)]
DTypeName = Annotated[str, BeforeValidator(dtype_name)]
Settings = InstanceOf[Parameters]
NO_PARAMETERS = Parameters()


class Value(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Input(Value):
    """One model of a merge, with its own parameters."""

    model: Ref
    parameters: Settings = NO_PARAMETERS


class Source(Input):
    """One model of a slice: its layers ``[first, end)``."""

    layer_range: Annotated[tuple[StrictInt, StrictInt], AfterValidator(_layer_range)]


class Slice(Value):
    """Layers of the output, merged from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: Ref | None = None
    parameters: Settings = NO_PARAMETERS


class Tokenizer(Value):
    """mergekit's ``tokenizer:`` block; only ``source`` can be carried out so far."""

    source: Any = "union"
    tokens: Any = None
    pad_to_multiple_of: Any = None


class Shape(Value):
    """All keys of a recipe, in the order in which they are written."""

    merge_method: StrictStr
    preset: StrictStr | None = None
    base_model: Ref | None = None
    models: Annotated[tuple[Input, ...], BeforeValidator(_none_is_empty)] = ()
    slices: Annotated[tuple[Slice, ...], BeforeValidator(_none_is_empty)] = ()
    modules: Any = None
    parameters: Settings = NO_PARAMETERS
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: Ref | None = None
    tokenizer: Tokenizer | None = None
    chat_template: StrictStr | None = None
    seed: Annotated[StrictInt, AfterValidator(_seed)] | None = None


KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(name for name in Shape.model_fields if name != "modules"),
    "models": tuple(Input.model_fields),
    "slices": tuple(Slice.model_fields),
    "sources": tuple(Source.model_fields),
    "tokenizer": tuple(Tokenizer.model_fields),
}
"""The keys that each kind of mapping has, for hints."""
