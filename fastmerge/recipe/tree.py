"""YAML text to plain values that remember their lines, with every limit checked first.

Recipes come from anywhere. Sizes, nesting, aliases and tags are bounded on the event stream, which is flat,
before libyaml composes nodes: composing is recursive in C and a deeply nested text would end the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent, ScalarEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from fastmerge.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 24
MAX_ALIASES = 200
MAX_NODES = 200_000
MAX_DOCUMENTS = 100

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = frozenset(_PREFIX + t for t in ("str", "int", "float", "bool", "null"))
_NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
_OCTAL = re.compile(r"[-+]?0[0-7]+")
_EXPECTED = "expected a mapping with 'merge_method' and 'models' or 'slices'"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Loc = tuple[str | int, ...]


class Map(dict[str, Any]):
    """A mapping that knows the line of each of its keys (None: it did not come from a file).

    The root of a document also has ``notes``: lines and what deserves a warning there.
    """

    def __init__(self, line: int | None = None) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int | None] = {}
        self.notes: list[tuple[int, str]] = []

    def put(self, key: str, value: Any, line: int | None) -> None:
        """Sets a key that stands on ``line``."""
        self[key] = value
        self.lines[key] = line


class Seq(list[Any]):
    """A list that knows the line of each of its items."""

    def __init__(self, line: int | None = None) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int | None] = []


class Odd:
    """A scalar that YAML reads as what its text does not say (``1:30`` is 90): nothing takes it as a value."""

    def __init__(self, text: str, meaning: str) -> None:
        self.text = text
        self.meaning = meaning

    def __repr__(self) -> str:
        return f"{self.text[:60]!r}, which YAML reads as {self.meaning}"


def parse(text: str, name: str, expected: str = _EXPECTED) -> list[Map]:
    """Reads YAML documents, each of which must be a mapping; empty ones are nothing.

    Args:
        text: at least one document; at most 100, and together 1 MB, 24 levels, 200 aliases, 200,000 nodes once
            aliases are expanded.
        name: what errors call the file.
        expected: what errors say of a document that is no mapping.

    Raises:
        RecipeError: for broken syntax, language-specific tags, keys twice with different values, non-string keys,
            recursion, a document that is no mapping, or a limit; with file and line.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{name}: a recipe of more than {MAX_BYTES:,} bytes is refused")
    documents: list[Map] = []
    try:
        _bound(text, name)
        loader = _LOADER(text)
        try:
            builder = _Builder(loader, name)
            while loader.check_node():
                node = loader.get_node()
                builder.notes = []
                tree = builder.value(node, 0)
                if isinstance(tree, Map):
                    tree.notes = builder.notes
                    documents.append(tree)
                elif tree is not None:
                    where = f"{name}:{node.start_mark.line + 1}" if documents else name
                    builder.problems.append(f"{where}: {expected}; this holds {kind(tree)}")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: not valid YAML: {e.problem or e.context or e}") from None
    except (yaml.YAMLError, UnicodeError) as e:
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise RecipeError(f"{name}: not valid YAML: {first}") from None
    if builder.problems:
        raise RecipeError(builder.problems)
    if not documents:
        raise RecipeError(f"{name}: {expected}; this is empty")
    return documents


def locate(value: Mapping[str, Any]) -> Map:
    """The same tree from Python objects; it has no lines.

    Raises:
        RecipeError: for keys that are not strings, or nesting as deep as recursion would be.
    """
    out: Map = _located(value, 0)
    return out


def _located(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise RecipeError(f"recipe: nested more than {MAX_DEPTH} levels deep")
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if isinstance(value, Mapping):
        out = Map()
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecipeError(f"recipe: keys are strings, not {key!r}")
            out.put(key, _located(item, depth + 1), None)
        return out
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        seq = Seq()
        for item in value:
            seq.append(_located(item, depth + 1))
            seq.lines.append(None)
        return seq
    if isinstance(value, str) and not _encodable(value):
        raise RecipeError(f"recipe: {value[:60]!r} is no text: it holds half of a surrogate pair")
    return value


def _encodable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def line_at(tree: Any, loc: Loc) -> int | None:
    """The line of the deepest part of ``loc`` that exists."""
    line: int | None = getattr(tree, "line", None)
    for part in loc:
        if isinstance(tree, Map) and isinstance(part, str) and part in tree.lines:
            line, tree = tree.lines[part], tree.get(part)
        elif isinstance(tree, Seq) and isinstance(part, int) and part < len(tree):
            line, tree = tree.lines[part], tree[part]
        else:
            break
    return line


def _bound(text: str, name: str) -> None:
    depth = aliases = nodes = documents = 0
    started: DocumentStartEvent | None = None
    for event in yaml.parse(text, Loader=_LOADER):
        if started is not None and not (isinstance(event, ScalarEvent) and event.value in _NOTHING):
            documents += 1
            if documents > MAX_DOCUMENTS:
                raise RecipeError(f"{name}:{_line(started)}: more than {MAX_DOCUMENTS} documents; refused")
        started = event if isinstance(event, DocumentStartEvent) else None
        if isinstance(event, CollectionEndEvent):
            depth -= 1
        elif isinstance(event, NodeEvent):
            nodes += 1
            if isinstance(event, CollectionStartEvent):
                depth += 1
            elif isinstance(event, AliasEvent):
                aliases += 1
            over = (
                f"nested more than {MAX_DEPTH} levels deep"
                if depth > MAX_DEPTH
                else f"more than {MAX_ALIASES} aliases"
                if aliases > MAX_ALIASES
                else f"more than {MAX_NODES:,} values"
                if nodes > MAX_NODES
                else None
            )
            if over:
                raise RecipeError(f"{name}:{_line(event)}: {over}; refused")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Builder:
    """Nodes to values; collects problems of tags and keys, stops at expansion limits."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader = loader
        self.name = name
        self.problems: list[str] = []
        self.notes: list[tuple[int, str]] = []
        self.nodes = 0
        self.open: set[int] = set()

    def value(self, node: Node, depth: int) -> Any:
        self.nodes += 1
        here = f"{self.name}:{node.start_mark.line + 1}"
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise RecipeError(f"{here}: aliases expand to too many or too deeply nested values; refused")
        if isinstance(node, ScalarNode):
            return self.scalar(node, here)
        if id(node) in self.open:
            raise RecipeError(f"{here}: a value that contains itself; refused")
        self.open.add(id(node))
        out = self.mapping(node, depth, here) if isinstance(node, MappingNode) else self.sequence(node, depth, here)
        self.open.discard(id(node))
        return out

    def scalar(self, node: ScalarNode, here: str) -> Any:
        if node.tag == _PREFIX + "timestamp":
            return Odd(node.value, "a date")
        if node.tag not in _SCALARS:
            self.problems.append(f"{here}: {_tag(node)} values have no place in a recipe: {node.value[:60]!r}")
            return None
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError) as e:
            self.problems.append(f"{here}: cannot read {node.value[:60]!r}: {e}")
            return None
        if isinstance(value, str) and not _encodable(value):
            self.problems.append(f"{here}: {value[:60]!r} is no text: it holds half of a surrogate pair")
        return value if node.tag == _PREFIX + "str" else _plain_number(node.value, value)

    def sequence(self, node: Node, depth: int, here: str) -> Seq:
        out = Seq(node.start_mark.line + 1)
        if node.tag != _PREFIX + "seq":
            self.problems.append(f"{here}: {_tag(node)} has no place in a recipe")
            return out
        for item in node.value:
            out.lines.append(item.start_mark.line + 1)
            out.append(self.value(item, depth + 1))
        return out

    def mapping(self, node: Node, depth: int, here: str) -> Map:
        out = Map(node.start_mark.line + 1)
        if node.tag != _PREFIX + "map":
            self.problems.append(f"{here}: {_tag(node)} has no place in a recipe")
            return out
        merged: list[Map] = []
        for n, (key, item) in enumerate(node.value):
            line = key.start_mark.line + 1
            if key.tag == _PREFIX + "merge":
                merged += self.inherited(item, depth, line)
                continue
            if not isinstance(key, ScalarNode) or key.tag != _PREFIX + "str":
                shown = repr(key.value[:60]) if isinstance(key, ScalarNode) else f"a {key.id}"
                number = _number(node.value[n - 1][1] if n else None, key, item)
                advice = f"write {number} for a number" if number else "quote it if it is a name"
                self.problems.append(f"{self.name}:{line}: keys are strings, not {shown} ({advice})")
                continue
            value = self.value(item, depth + 1)
            if key.value not in out:
                out.put(key.value, value, line)
                continue
            first = f"{key.value!r} (first on line {out.lines[key.value]})"
            if value == out[key.value]:
                self.notes.append((line, f"{self.name}:{line}: the key {first} stands here again, with the same value"))
            else:
                self.problems.append(f"{self.name}:{line}: duplicate key {first} with another value")
        for parent in merged:
            for name, item in parent.items():
                if name not in out:
                    out.put(name, item, parent.lines[name])
        return out

    def inherited(self, node: Node, depth: int, line: int) -> Iterator[Map]:
        """The mappings that ``<<`` names, earlier ones first: they win over later ones."""
        value = self.value(node, depth + 1)
        for item in value if isinstance(value, Seq) else [value]:
            if isinstance(item, Map):
                yield item
            else:
                self.problems.append(f"{self.name}:{line}: '<<' takes mappings, not {kind(item)}")


def _plain_number(text: str, value: Any) -> Any:
    """The value of a scalar that is no text; :class:`Odd` where people would read another number than YAML 1.1."""
    if isinstance(value, int | float) and ":" in text:
        return Odd(text, f"{value!r} (base 60)")
    digits = text.replace("_", "")
    if isinstance(value, int) and _OCTAL.fullmatch(digits) and int(digits, 10) != value:
        return Odd(text, f"{value!r} (base 8)")
    return value


def _tag(node: Node) -> str:
    tag = str(node.tag)
    return "!!" + tag[len(_PREFIX) :] if tag.startswith(_PREFIX) else tag


def kind(value: Any) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, Odd):
        return repr(value)
    names = {Seq: "a list", Map: "a mapping", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _number(before: Node | None, key: Node, item: Node) -> str:
    """What ``weight: 0,5`` was meant to be, which YAML takes for the entries ``weight: 0`` and ``5:``; else empty."""
    parts = [node.value for node in (before, key, item) if isinstance(node, ScalarNode)]
    whole, decimals, nothing = parts if len(parts) == 3 else ("", "", "")
    return f"{whole}.{decimals}" if (whole.lstrip("+-") + decimals).isdecimal() and not nothing else ""
