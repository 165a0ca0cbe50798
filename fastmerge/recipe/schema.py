"""The shape of a recipe: frozen values, and what pydantic's core reads them from, strict about keys.

The schemas are written here rather than derived from annotations by pydantic itself, which is a third of the time that
a process takes from its start to a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, cast, get_args

from pydantic_core import SchemaValidator

from fastmerge.dtypes import BY_NAME, FLOATS
from fastmerge.recipe.problems import hint
from fastmerge.recipe.refs import UNION, ModelRef, model_ref
from fastmerge.recipe.settings import Parameters
from fastmerge.recipe.tree import Loc, kind

SEED_BOUND = 2**63

Layout = Literal["base", "per-expert", "fused"]
"""Of experts in the output: as the base has them, tensors of its own for each, or stacks of all."""


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


def out_type(raw: Any) -> str:
    """Reads a type of results: that of :func:`dtype_name`, or ``as-base``.

    Raises:
        ValueError: for anything else, with the nearest name.
    """
    if raw in ("as-base", "as_base"):
        return "as-base"
    try:
        return dtype_name(raw)
    except ValueError as error:
        raise ValueError(f"{error}; or as-base") from None


def integer(value: Any) -> Any:
    """Integers as mergekit takes them: ``12``, ``"12"`` and ``12.0``; anything else goes on as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,20}", value):
        return int(value)
    return value


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


NO_PARAMETERS = Parameters()


@dataclass(frozen=True, kw_only=True)
class Input:
    """One model of a merge, with its own parameters."""

    model: ModelRef
    parameters: Parameters = NO_PARAMETERS


@dataclass(frozen=True, kw_only=True)
class Source(Input):
    """One model of a slice: its layers ``[first, end)``."""

    layer_range: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the output, merged from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where the row of a token comes from.

    Attributes:
        model: whose row; None for zeros.
        token: of the model, where it is another one.
        token_id: its number in the model instead.
    """

    model: ModelRef | None
    token: str | None = None
    token_id: int | None = None

    def plain(self, model: Any) -> Any:
        """As YAML writes it; ``model`` says how a reference is written."""
        if self.model is None:
            return {"kind": "zero"}
        which = {"token": self.token, "token_id": self.token_id}
        given = {key: value for key, value in which.items() if value is not None}
        return {"kind": "model_token", "model": model(self.model), **given} if given else model(self.model)


@dataclass(frozen=True, slots=True)
class Token:
    """What a recipe says of one token: where its row comes from, and whether it replaces those that models have."""

    source: TokenSource | None = None
    force: bool = False

    def plain(self, model: Any) -> dict[str, Any]:
        """As YAML writes it."""
        source = {} if self.source is None else {"source": self.source.plain(model)}
        return source | ({"force": True} if self.force else {})


def _token(raw: Any) -> Any:
    """Reads ``{source: model | {kind: model_token, ...} | {kind: zero}, force: bool}``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(raw, Token):
        return raw
    if raw is not None and not isinstance(raw, Mapping):
        raise ValueError(f"expected a mapping with 'source' and 'force'; got {kind(raw)}")
    fields = dict(raw or {})
    source, force = fields.pop("source", None), fields.pop("force", False)
    if fields:
        key = next(iter(fields))
        raise ValueError(f"unknown key {key!r}{hint(str(key), ('source', 'force'))}; known: source, force")
    if not isinstance(force, bool) and force not in (0, 1):
        raise ValueError(f"'force': expected true or false; got {kind(force)}")
    if force and source is None:
        raise ValueError("'force' needs a 'source' to force")
    return Token(None if source is None else _token_source(source), bool(force))


def _token_source(raw: Any) -> TokenSource:
    if not isinstance(raw, Mapping) or "kind" not in raw:
        return TokenSource(model_ref(raw))
    fields = dict(raw)
    what = fields.pop("kind")
    known = {"zero": (), "model_token": ("model", "token", "token_id")}.get(what) if isinstance(what, str) else None
    if known is None:
        raise ValueError(f"'kind': expected model_token or zero; got {what!r}")
    if stray := [str(key) for key in fields if key not in known]:
        raise ValueError(f"{what!r} has no key {stray[0]!r}{hint(stray[0], known)}")
    if what == "zero":
        return TokenSource(None)
    token, number = fields.get("token"), integer(fields.get("token_id"))
    if (token is None) == (number is None):
        raise ValueError("'model_token' takes either 'token' or 'token_id'")
    if token is not None and not isinstance(token, str):
        raise ValueError(f"'token': expected a text; got {kind(token)}")
    if number is not None and (type(number) is not int or number < 0):
        raise ValueError(f"'token_id': expected a number of 0 or more; got {number!r}")
    if "model" not in fields:
        raise ValueError("'model_token' needs a 'model'")
    return TokenSource(model_ref(fields["model"]), token, number)


def _none_is_no_tokens(value: Any) -> Any:
    return {} if value is None else value


def _multiple(value: int) -> int:
    if value < 1:
        raise ValueError(f"expected a number of 1 or more; got {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """mergekit's ``tokenizer:`` block: whose tokens, rows of single tokens, and rows up to a multiple."""

    source: ModelRef | None = UNION
    tokens: Mapping[str, Token] = field(default_factory=dict, hash=False)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Module:
    """Part of a model of several parts (its language model, its vision tower): merged from models or slices of its own.

    What a recipe without ``modules`` merges is one without a name, which is all of a model.
    """

    name: str = ""
    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = NO_PARAMETERS

    @property
    def loc(self) -> Loc:
        """Where it stands in the recipe."""
        return ("modules", self.name) if self.name else ()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All keys of a recipe, in the order in which they are written."""

    merge_method: str
    preset: str | None = None
    base_model: ModelRef | None = None
    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    parameters: Parameters = NO_PARAMETERS
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelRef | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int | None = None
    missing: Literal["error", "merge"] | None = None
    layout: Layout | None = None

    @property
    def every_module(self) -> tuple[Module, ...]:
        """The modules; one without a name where the recipe names none."""
        return self.modules or (Module(models=self.models, slices=self.slices),)


Schema = dict[str, Any]
"""What pydantic's core validates by: https://docs.pydantic.dev/latest/api/pydantic_core_schema."""


def _before(read: Callable[[Any], Any], schema: Schema) -> Schema:
    return {"type": "function-before", "function": {"type": "no-info", "function": read}, "schema": schema}


def _after(schema: Schema, check: Callable[[Any], Any]) -> Schema:
    return {"type": "function-after", "function": {"type": "no-info", "function": check}, "schema": schema}


def _or_null(schema: Schema) -> Schema:
    return {"type": "nullable", "schema": schema}


def _is(cls: type) -> Schema:
    return {"type": "is-instance", "cls": cls}


def _list(items: Schema) -> Schema:
    return {"type": "tuple", "items_schema": [items], "variadic_item_index": 0}


def _mapping(cls: type, **keys: Schema) -> Schema:
    """A mapping with these keys and no others; those for which ``cls`` has no default are required."""
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    of = {key: {"type": "typed-dict-field", "schema": s, "required": key in required} for key, s in keys.items()}
    return {"type": "typed-dict", "fields": of, "extra_behavior": "forbid"}


def _value(cls: type, **keys: Schema) -> Schema:
    return _after(_mapping(cls, **keys), lambda found: cls(**found))


_TEXT: Schema = {"type": "str", "strict": True}
_INTEGER = _before(integer, {"type": "int", "strict": True})
_REF = _before(model_ref, _is(ModelRef))
_SETTINGS = _is(Parameters)
_INPUT = {"model": _REF, "parameters": _SETTINGS}
_RANGE = _after({"type": "tuple", "items_schema": [_INTEGER, _INTEGER]}, _layer_range)
_SLICE = {
    "sources": _list(_value(Source, **_INPUT, layer_range=_RANGE)),
    "base_model": _or_null(_REF),
    "parameters": _SETTINGS,
}
_TOKENS: Schema = {"type": "dict", "keys_schema": _TEXT, "values_schema": _before(_token, _is(Token))}
_TOKENIZER = {
    "source": _REF,
    "tokens": _before(_none_is_no_tokens, _TOKENS),
    "pad_to_multiple_of": _or_null(_after(_INTEGER, _multiple)),
}
_MEMBERS = {
    "models": _before(_none_is_empty, _list(_value(Input, **_INPUT))),
    "slices": _before(_none_is_empty, _list(_value(Slice, **_SLICE))),
    "parameters": _SETTINGS,
}
_RECIPE = {
    "merge_method": _TEXT,
    "preset": _or_null(_TEXT),
    "base_model": _or_null(_REF),
    **_MEMBERS,
    "modules": _before(_none_is_empty, _list(_value(Module, name=_TEXT, **_MEMBERS))),
    "dtype": _or_null(_before(dtype_name, {"type": "str"})),
    "out_dtype": _or_null(_before(out_type, {"type": "str"})),
    "tokenizer_source": _or_null(_REF),
    "tokenizer": _or_null(_value(Tokenizer, **_TOKENIZER)),
    "chat_template": _or_null(_TEXT),
    "seed": _or_null(_after(_INTEGER, _seed)),
    "missing": _or_null({"type": "literal", "expected": ["error", "merge"]}),
    "layout": _or_null({"type": "literal", "expected": [*get_args(Layout)]}),
}
_VALIDATOR = SchemaValidator(cast("Any", _mapping(Shape, **_RECIPE)))


def validate(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`Shape` from a tree whose ``parameters`` are read.

    Raises:
        pydantic_core.ValidationError: with everything that is wrong.
    """
    found: dict[str, Any] = _VALIDATOR.validate_python(data)
    return found


KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(f.name for f in fields(Shape)),
    "models": tuple(_INPUT),
    "slices": tuple(_SLICE),
    "sources": (*_INPUT, "layer_range"),
    "modules": tuple(_MEMBERS),
    "tokenizer": tuple(_TOKENIZER),
}
"""The keys that each kind of mapping has; the recipe itself is ``""``."""

PLACES = {
    "": "the recipe itself",
    "models": "an entry of 'models'",
    "slices": "a slice",
    "sources": "a source of a slice",
    "modules": "a module",
    "tokenizer": "'tokenizer'",
}
"""What errors call each kind of mapping."""
