"""The shape of a recipe: frozen pydantic values, strict about keys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, InstanceOf, StrictInt, StrictStr

from fastmerge.dtypes import BY_NAME, FLOATS
from fastmerge.recipe.problems import hint
from fastmerge.recipe.settings import Parameters
from fastmerge.recipe.tree import Loc, Map, kind

SEED_BOUND = 2**63
_WRITE_PATHS = "a path with '+' or '@' is written {model: {path: ...}}"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model: a local directory, or ``org/name`` on the hub, at a revision, with an adapter or without.

    Attributes:
        path: of the directory or on the hub.
        revision: on the hub.
        lora: the adapter that is applied to it, itself without one.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        return model if self.lora is None else f"{model}+{self.lora}"

    def plain(self) -> Any:
        """As YAML writes it: a string, or mergekit's mapping where that string would say something else."""
        names = [self.path, self.revision or "", *((self.lora.path, self.lora.revision or "") if self.lora else ())]
        joined = self.lora is not None or self.revision is not None
        if not any(c in name for name in names for c in "@+") and not (joined and exists(str(self))):
            return str(self)
        return {"model": _plain_path(self), **({"lora": _plain_path(self.lora)} if self.lora else {})}


def _plain_path(ref: ModelRef) -> dict[str, str]:
    return {"path": ref.path, **({"revision": ref.revision} if ref.revision else {})}


UNION = ModelRef("union")
"""As a tokenizer's source: the tokens of all models."""


def exists(path: str) -> bool:
    """Whether this machine has something of that name: then it is a path, whatever ``@`` and ``+`` are in it."""
    return os.path.lexists(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises for unknown users


def model_ref(raw: Any) -> ModelRef:
    """Reads ``path``, ``org/name@revision``, either with ``+adapter``, or mergekit's mapping form.

    A text with ``@`` or ``+`` that exists as a path is that path.

    mergekit's ``override_architecture`` is accepted and has no effect: there is no architecture table.

    Raises:
        ValueError: for several adapters or revisions, a revision of a local path, an empty path or anything else.
    """
    if isinstance(raw, ModelRef):
        return raw
    if isinstance(raw, Map):
        return _mapping_ref(raw)
    text = os.fspath(raw) if isinstance(raw, os.PathLike) else raw
    if not isinstance(text, str) or not text.strip():
        shown = repr(raw) if isinstance(raw, str) else kind(raw)
        raise ValueError(f"expected a model: a directory or org/name[@revision]; got {shown}")
    if "+" not in text or exists(text):
        return _path_ref(text)
    cuts = [i for i, c in enumerate(text) if c == "+"]
    if len(cuts) > 1:
        cuts = [i for i in cuts if all("+" not in s or exists(s) for s in (text[:i], text[i + 1 :]))]
    if len(cuts) != 1:
        raise ValueError(f"{text!r}: expected one model[+adapter]; {_WRITE_PATHS}")
    model, adapter = text[: cuts[0]], text[cuts[0] + 1 :]
    if not model.strip() or not adapter.strip():
        raise ValueError(f"{text!r}: expected model+adapter; {_WRITE_PATHS}")
    return replace(_path_ref(model), lora=_path_ref(adapter))


def _path_ref(text: str) -> ModelRef:
    """``path[@revision]``, which stands for itself where it exists as a path."""
    if "@" not in text or exists(text):
        return _ref(text, None)
    path, _, revision = text.rpartition("@")
    if not path or not revision or ("@" in path and not exists(path)):
        raise ValueError(f"{text!r}: expected one path[@revision]")
    return _ref(path, revision)


def _ref(path: str, revision: str | None) -> ModelRef:
    if any(c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff" for c in path + (revision or "")):
        raise ValueError(f"expected a model: a directory or org/name[@revision]; got {path!r}: control characters")
    if path.startswith("~") and os.path.expanduser(path) == path:  # noqa: PTH111
        raise ValueError(f"{path!r}: no such user, whose directory it could be in")
    if revision and exists(path):
        raise ValueError(f"{path!r} is a path on this machine, which has no revisions; got revision {revision!r}")
    return ModelRef(path.rstrip("/") or path, revision or None)


_REF, _PATH = {"model", "lora", "override_architecture"}, {"path", "revision"}


def _mapping_ref(raw: Map) -> ModelRef:
    if "model" in raw and set(raw) <= _REF:
        model, adapter = _part(raw["model"]), _part(raw.get("lora"))
        if model is not None and (adapter is not None or raw.get("lora") is None):
            return replace(model, lora=adapter)
    inner = [(part, _PATH) for part in (raw.get("model"), raw.get("lora")) if isinstance(part, Map)]
    stray = [repr(key) for part, keys in ((raw, _REF), *inner) for key in part if key not in keys]
    got = f"unknown keys {', '.join(stray)} in" if stray and "model" in raw else "got"
    known = "{model: {path, revision}, lora: {path, revision}}"
    raise ValueError(f"expected a model, or {known}; {got} a mapping of {sorted(raw)}")


def _part(raw: Any) -> ModelRef | None:
    """A model or an adapter inside mergekit's mapping: ``path[@revision]``, or ``{path, revision}``."""
    if isinstance(raw, str) and raw.strip():
        return _path_ref(raw)
    if isinstance(raw, Map) and set(raw) <= _PATH:
        path, revision = raw.get("path"), raw.get("revision")
        if isinstance(path, str) and path.strip() and isinstance(revision, str | None):
            return _ref(path, revision)
    return None


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


def _integer(value: Any) -> Any:
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


Integer = Annotated[StrictInt, BeforeValidator(_integer)]
Ref = Annotated[InstanceOf[ModelRef], BeforeValidator(model_ref)]
DTypeName = Annotated[str, BeforeValidator(dtype_name)]
OutType = Annotated[str, BeforeValidator(out_type)]
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

    layer_range: Annotated[tuple[Integer, Integer], AfterValidator(_layer_range)]


class Slice(Value):
    """Layers of the output, merged from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: Ref | None = None
    parameters: Settings = NO_PARAMETERS


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
    token, number = fields.get("token"), _integer(fields.get("token_id"))
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


class Tokenizer(Value):
    """mergekit's ``tokenizer:`` block: whose tokens, rows of single tokens, and rows up to a multiple."""

    source: Ref = UNION
    tokens: Annotated[
        dict[StrictStr, Annotated[InstanceOf[Token], BeforeValidator(_token)]], BeforeValidator(_none_is_no_tokens)
    ] = {}
    pad_to_multiple_of: Annotated[Integer, AfterValidator(_multiple)] | None = None


class Module(Value):
    """Part of a model of several parts (its language model, its vision tower): merged from models or slices of its own.

    What a recipe without ``modules`` merges is one without a name, which is all of a model.
    """

    name: StrictStr = ""
    models: Annotated[tuple[Input, ...], BeforeValidator(_none_is_empty)] = ()
    slices: Annotated[tuple[Slice, ...], BeforeValidator(_none_is_empty)] = ()
    parameters: Settings = NO_PARAMETERS

    @property
    def loc(self) -> Loc:
        """Where it stands in the recipe."""
        return ("modules", self.name) if self.name else ()


class Shape(Value):
    """All keys of a recipe, in the order in which they are written."""

    merge_method: StrictStr
    preset: StrictStr | None = None
    base_model: Ref | None = None
    models: Annotated[tuple[Input, ...], BeforeValidator(_none_is_empty)] = ()
    slices: Annotated[tuple[Slice, ...], BeforeValidator(_none_is_empty)] = ()
    modules: Annotated[tuple[Module, ...], BeforeValidator(_none_is_empty)] = ()
    parameters: Settings = NO_PARAMETERS
    dtype: DTypeName | None = None
    out_dtype: OutType | None = None
    tokenizer_source: Ref | None = None
    tokenizer: Tokenizer | None = None
    chat_template: StrictStr | None = None
    seed: Annotated[Integer, AfterValidator(_seed)] | None = None
    missing: Literal["error", "merge"] | None = None

    @property
    def every_module(self) -> tuple[Module, ...]:
        """The modules; one without a name where the recipe names none."""
        return self.modules or (Module.model_construct(models=self.models, slices=self.slices),)


KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(Shape.model_fields),
    "models": tuple(Input.model_fields),
    "slices": tuple(Slice.model_fields),
    "sources": tuple(Source.model_fields),
    "modules": ("models", "slices", "parameters"),
    "tokenizer": tuple(Tokenizer.model_fields),
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
