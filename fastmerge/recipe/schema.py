"""The shape of a recipe: frozen values, strict about their keys, read so that every problem is found.

Plain dataclasses: importing pydantic for these six values was 29 % of the instructions of a whole ``plan``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from fastmerge.dtypes import BY_NAME, FLOATS
from fastmerge.recipe.problems import Problems, hint
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


def _mapping_ref(raw: Map) -> ModelRef:
    if "model" in raw and set(raw) <= {"model", "lora", "override_architecture"}:
        model, adapter = _part(raw["model"]), _part(raw.get("lora"))
        if model is not None and (adapter is not None or raw.get("lora") is None):
            return replace(model, lora=adapter)
    raise ValueError(
        f"expected a model, or {{model: {{path, revision}}, lora: {{path, revision}}}}; got a mapping of {sorted(raw)}"
    )


def _part(raw: Any) -> ModelRef | None:
    """A model or an adapter inside mergekit's mapping: ``path[@revision]``, or ``{path, revision}``."""
    if isinstance(raw, str) and raw.strip():
        return _path_ref(raw)
    if isinstance(raw, Map) and set(raw) <= {"path", "revision"}:
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
        raise ValueError(f"expected one of {', '.join(names)}; got {shown}")  # noqa: TRY004  these are collected
    name = raw.removeprefix("torch.")
    if name in names:
        return name
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
    near = f" (did you mean {short[name]!r}?)" if name in short else hint(name, names)
    what = "is no floating-point type" if name in BY_NAME else "is no known type"
    raise ValueError(f"{raw!r} {what}: expected one of {', '.join(names)}{near}")


def shown(value: Any) -> str:
    """A value as errors quote it."""
    return repr(value)[:60] if isinstance(value, str | int | float) else kind(value)


def _integer(raw: Any) -> int:
    """Integers as mergekit takes them: ``12``, ``"12"`` and ``12.0``."""
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, str) and re.fullmatch(r"[-+]?[0-9]{1,20}", raw):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError(f"expected a valid integer; got {shown(raw)}")


def _seed(raw: Any) -> int:
    value = _integer(raw)
    if not -SEED_BOUND <= value < SEED_BOUND:
        raise ValueError(f"expected a 64-bit signed integer; got {value}")
    return value


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"expected a valid string; got {shown(raw)}")  # noqa: TRY004  these are collected
    return raw


def _missing(raw: Any) -> str:
    if raw not in ("error", "merge"):
        raise ValueError(f"expected 'error' or 'merge'; got {shown(raw)}")
    return str(raw)


V = TypeVar("V")


class Reader:
    """Reads values from a tree and goes on after a problem, so that all are found.

    Args:
        problems: takes whatever is wrong.
        stray: is told the place of each key that its mapping does not have, and that mapping.

    Attributes:
        failed: whether a value could not be read: what came back is not to be used then.
    """

    def __init__(self, problems: Problems, stray: Callable[[Loc, Mapping[str, Any]], None]) -> None:
        self._problems = problems
        self._stray = stray
        self.failed = False

    def wrong(self, loc: Loc, message: str) -> None:
        """One problem; the reading goes on."""
        self.failed = True
        self._problems.add(loc, message)

    def value(self, convert: Callable[[Any], V], raw: Any, loc: Loc) -> V | None:
        """What ``convert`` makes of a value, or None and a problem."""
        try:
            return convert(raw)
        except ValueError as e:
            self.wrong(loc, str(e))
            return None

    def mapping(self, cls: type[V], raw: Any, loc: Loc) -> V | None:
        """One of the values below from its mapping; null stands for the default of a key that has one."""
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            self.wrong(loc, f"expected a mapping; got {shown(raw)}")
            return None
        keys = {f.name: f for f in fields(cls) if f.name in _READ}  # type: ignore[arg-type]
        found = {}
        for name, key in keys.items():
            here = (*loc, name)
            if name not in raw:
                if key.default is MISSING:
                    self.wrong(here, "this key is required")
            elif raw[name] is not None or key.default is MISSING or _READ[name] is _as_it_is:
                found[name] = _READ[name](self, raw[name], here)
        for name in raw:
            if name not in keys:
                self._stray((*loc, name), raw)
        return None if self.failed else cls(**found)


Read = Callable[[Reader, Any, Loc], Any]


def _of(convert: Callable[[Any], Any]) -> Read:
    return lambda reader, raw, loc: reader.value(convert, raw, loc)


def _as_it_is(reader: Reader, raw: Any, loc: Loc) -> Any:
    del reader, loc
    return raw


def _all(cls: type[Any]) -> Read:
    def read(reader: Reader, raw: Any, loc: Loc) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            reader.wrong(loc, f"expected a list; got {shown(raw)}")
            return ()
        return tuple(reader.mapping(cls, item, (*loc, i)) for i, item in enumerate(raw))

    return read


def _layer_range(reader: Reader, raw: Any, loc: Loc) -> tuple[int, int] | None:
    if not isinstance(raw, list):
        reader.wrong(loc, f"expected a list; got {shown(raw)}")
        return None
    if len(raw) > 2:
        reader.wrong(loc, f"tuple should have at most 2 items after validation, not {len(raw)}; got {shown(raw)}")
        return None
    ends = [reader.value(_integer, item, (*loc, i)) for i, item in enumerate(raw)]
    for i in range(len(raw), 2):
        reader.wrong((*loc, i), "this key is required")
    match ends:
        case [int(first), int(end)] if not 0 <= first < end:
            reader.wrong(loc, f"expected [first, end) with 0 <= first < end; got [{first}, {end}]")
        case [int(first), int(end)]:
            return first, end
    return None


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


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """mergekit's ``tokenizer:`` block; only ``source`` can be carried out so far."""

    source: Any = "union"
    tokens: Any = None
    pad_to_multiple_of: Any = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All keys of a recipe, in the order in which they are written."""

    merge_method: str
    preset: str | None = None
    base_model: ModelRef | None = None
    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Any = None
    parameters: Parameters = NO_PARAMETERS
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelRef | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int | None = None
    missing: Literal["error", "merge"] | None = None


_READ: dict[str, Read] = {
    "base_model": _of(model_ref),
    "chat_template": _of(_text),
    "dtype": _of(dtype_name),
    "layer_range": _layer_range,
    "merge_method": _of(_text),
    "missing": _of(_missing),
    "model": _of(model_ref),
    "models": _all(Input),
    "modules": _as_it_is,
    "out_dtype": _of(dtype_name),
    "pad_to_multiple_of": _as_it_is,
    "parameters": _as_it_is,
    "preset": _of(_text),
    "seed": _of(_seed),
    "slices": _all(Slice),
    "source": _as_it_is,
    "sources": _all(Source),
    "tokenizer": lambda reader, raw, loc: reader.mapping(Tokenizer, raw, loc),
    "tokenizer_source": _of(model_ref),
    "tokens": _as_it_is,
}
"""How each key is read, wherever it stands."""

KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(f.name for f in fields(Shape) if f.name != "modules"),
    "models": tuple(f.name for f in fields(Input)),
    "slices": tuple(f.name for f in fields(Slice)),
    "sources": tuple(f.name for f in fields(Source)),
    "modules": ("models", "slices", "parameters"),
    "tokenizer": tuple(f.name for f in fields(Tokenizer)),
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
