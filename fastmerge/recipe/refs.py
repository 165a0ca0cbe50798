"""References to models, as recipes write them: paths, ids on the hub, adapters on top."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

from fastmerge.recipe.tree import Map, kind

_WRITE_PATHS = "a path with '+' or '@' is written {model: {path: ...}}"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model: a local directory, or ``org/name`` on the hub, at a revision, with adapters or without.

    Attributes:
        path: of the directory or on the hub.
        revision: on the hub.
        lora: the adapter that is applied to it, itself without one.
        more: further adapters that are applied to it, whose updates are added.
        weight: of an adapter: what its updates are multiplied by.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None
    more: tuple[ModelRef, ...] = ()
    weight: float = 1.0

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        weight = f":{self.weight!r}" if self.weight != 1 else ""
        return "+".join([model + weight, *map(str, self.adapters)])

    @property
    def adapters(self) -> tuple[ModelRef, ...]:
        """All adapters that are applied to it."""
        return () if self.lora is None else (self.lora, *self.more)

    @property
    def bare(self) -> ModelRef:
        """The model without adapters, or an adapter without its weight."""
        return ModelRef(self.path, self.revision)

    def plain(self) -> Any:
        """As YAML writes it: a string, or a mapping where that string would say something else."""
        names = [name for ref in (self, *self.adapters) for name in (ref.path, ref.revision or "")]
        joined = self.lora is not None or self.revision is not None
        weighed = self.more or any(ref.weight != 1 for ref in self.adapters)
        if not weighed and not any(c in name for name in names for c in "@+") and not (joined and exists(str(self))):
            return str(self)
        adapters = [_plain_path(ref) for ref in self.adapters]
        lora = {"lora": adapters if self.more else adapters[0]} if adapters else {}
        return {"model": _plain_path(self), **lora}


def _plain_path(ref: ModelRef) -> dict[str, Any]:
    weight = {"weight": ref.weight} if ref.weight != 1 else {}
    return {"path": ref.path, **({"revision": ref.revision} if ref.revision else {}), **weight}


UNION = ModelRef("union")
"""As a tokenizer's source: the tokens of all models."""


def exists(path: str) -> bool:
    """Whether this machine has something of that name: then it is a path, whatever ``@`` and ``+`` are in it."""
    return os.path.lexists(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises for unknown users


def model_ref(raw: Any) -> ModelRef:
    """Reads ``path``, ``org/name@revision``, either with ``+adapter``, or mergekit's mapping form.

    In the mapping an adapter may have a ``weight``, and there may be a list of them.

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
_ADAPTER = _PATH | {"weight"}


def _mapping_ref(raw: Map) -> ModelRef:
    if "model" in raw and set(raw) <= _REF:
        lora = raw.get("lora")
        model, adapters = _part(raw["model"]), [_adapter(part) for part in (lora if isinstance(lora, list) else [lora])]
        found = [ref for ref in adapters if ref is not None]
        if model is not None and (len(found) == len(adapters) or lora is None):
            names = [str(ref.bare) for ref in found]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"adapters are listed twice: {', '.join(sorted(twice))}")
            return replace(model, lora=found[0] if found else None, more=tuple(found[1:]))
    lora = raw.get("lora")
    listed = [(part, _ADAPTER) for part in (lora if isinstance(lora, list) else [lora])]
    inner = [(part, keys) for part, keys in ((raw.get("model"), _PATH), *listed) if isinstance(part, Map)]
    stray = [repr(key) for part, keys in ((raw, _REF), *inner) for key in part if key not in keys]
    got = f"unknown keys {', '.join(stray)} in" if stray and "model" in raw else "got"
    known = "{model: {path, revision}, lora: {path, revision, weight}}, or a list of such adapters"
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


def _adapter(raw: Any) -> ModelRef | None:
    """An adapter inside the mapping: a part that may have a weight."""
    if not isinstance(raw, Map) or "weight" not in raw:
        return _part(raw)
    weight, rest = raw["weight"], Map()
    for key in raw:
        if key != "weight":
            rest.put(key, raw[key], None)
    if type(weight) not in (int, float) or not math.isfinite(weight) or not weight:
        raise ValueError(f"weight of an adapter: expected a finite number other than 0; got {weight!r:.80}")
    found = _part(rest)
    return None if found is None else replace(found, weight=float(weight))
