"""What config.json says about single layers, for an output whose layers come from elsewhere.

Lists with one entry per layer are composed from the entry of each output layer's source, in that model's own
configuration. Lists of layer numbers and mappings by layer number are renumbered. Scalars that give the kinds of
layers by their position get the value that gives the same kinds, or an explicit list, or are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmerge.errors import RecipeError
from fastmerge.planning.config_json import PREDICTED
from fastmerge.planning.structure import COUNT_KEYS, TEXT_CONFIGS
from fastmerge.planning.traits import HANDLED, SPARSE, TRAITS, Block, number

_NUMBERS = frozenset({
    "moe_layers", "full_attn_idxs", "mlp_only_layers", "cross_attention_layers", "attn_layer_indices",
    "hybrid_layer_ids", "kda_layers", "full_attn_layers", "layers_to_skip", "skip_layers",
})  # fmt: skip
"""Lists of layer numbers."""

_PER_LAYER = frozenset({
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers", "block_configs",
    "num_attention_heads_per_layer", "moe_layer_freq", "attn_type_list", "hybrid_layer_pattern", "indexer_types",
})  # fmt: skip
"""Lists with one entry per layer, whatever their length."""

_ABOUT_LAYERS = re.compile(r"layer|block|attn|attention|mlp|idxs|indices|indexes")
_OF_SOMETHING_ELSE = re.compile(
    r"token|_ids?$|architectures|label|image|vision|video|audio|grid|stage|kernel|stride|task|languages?$|auto_map"
)
_PERIODIC = re.compile(
    r"(?=.*(every|interval|period|pattern))(?=.*(layer|attn|attention|moe|expert|mlp|window|global|rope|sparse|mamba))"
    r"|(layer|moe|expert|sparse|mlp|attn|attention).*(step|freq)$"
)
_OTHER_MODULES = re.compile(r"vision|audio|image|video|speech|encoder|quantization|compression")
_COUNT = re.compile(r"^(n|num)_([a-z]+_)?layers?$")


class SourceLayer(NamedTuple):
    """Where an output layer comes from: a model, its config.json and the layer there."""

    model: str
    config: Mapping[str, Any]
    layer: int


@dataclass(frozen=True, slots=True)
class _Own:
    """An output layer's source with the block of its configuration that counts the layers."""

    model: str
    block: Block
    count: int
    layer: int


def count_keys(config: Mapping[str, Any], count: int) -> list[tuple[str, ...]]:
    """Places in a configuration that count the layers under an unusual name, or that list them without counting.

    The last key of a path is empty where nothing counts.
    """
    blocks = [((), config), *(((name,), config.get(name)) for name in TEXT_CONFIGS)]
    counted = [
        (*path, key) for path, b in blocks if isinstance(b, Mapping) for key in b
        if _COUNT.fullmatch(key) and number(b, key) == count
    ]  # fmt: skip
    listed: list[tuple[str, ...]] = [
        (*path, "") for path, b in blocks if isinstance(b, Mapping) for key in _PER_LAYER
        if isinstance(b.get(key), list) and len(b[key]) == count
    ]  # fmt: skip
    return counted or listed[:1]


def restack(
    out: dict[str, Any], keys: Sequence[tuple[str, ...]], count: int, layers: Sequence[SourceLayer]
) -> list[str]:
    """Rewrites a configuration in place.

    Args:
        out: the donor's, to be that of the output.
        keys: where it counts its layers.
        count: the layers that the donor has.
        layers: the source of each output layer.

    Returns:
        Warnings.

    Raises:
        RecipeError: with every key whose meaning the new order of layers cannot keep.
    """
    problems: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for path in keys:
        block = out
        for key in path[:-1]:
            block = block[key]
        _Block(block, path, count, layers, problems, warnings).rewrite()
    if problems:
        raise RecipeError(list(problems))
    return list(warnings)


class _Block:
    """One block of the output's configuration that counts the layers."""

    def __init__(
        self,
        block: dict[str, Any],
        path: tuple[str, ...],
        count: int,
        layers: Sequence[SourceLayer],
        problems: dict[str, None],
        warnings: dict[str, None],
    ) -> None:
        self.block, self.count, self.problems, self.warnings = block, count, problems, warnings
        self.key = path[-1]
        before = dict(block)
        known: dict[int, tuple[Block, int]] = {}
        for source in layers:
            if id(source.config) not in known:
                known[id(source.config)] = _own_block(source.config, path, before, count)
        self.layers = [_Own(s.model, *known[id(s.config)], s.layer) for s in layers]
        self.extra = number(block, PREDICTED) or 0
        self.moved = [own.layer for own in self.layers] != list(range(count))

    def rewrite(self) -> None:
        self._predicted()
        self._spread()
        self._lists(self.block, [own.block for own in self.layers], nested=False)
        self._unknown_scalars()
        if self.key:
            self.block[self.key] = len(self.layers)
        self._traits()
        self._shared()

    def _entries(self, key: str, owns: Sequence[Block], kind: type) -> list[Any]:
        """The entries of all output layers."""
        return [e for i, own in enumerate(owns) for e in self._pick(key, own, i, kind)]

    def _fail(self, key: str, why: str) -> None:
        self.problems[f"config.json: {key}: {why}"] = None

    def _predicted(self) -> None:
        """Layers that predict further tokens come from the end of the last slice's model."""
        last = self.layers[-1].block
        if PREDICTED in self.block and self.block[PREDICTED] != last.get(PREDICTED, 0):
            self.block[PREDICTED] = last.get(PREDICTED, 0)
            self.warnings[
                f"config.json: {PREDICTED} is {self.block[PREDICTED]}, as in {self.layers[-1].model!r}, which gives "
                "the end of the output"
            ] = None

    def _spread(self) -> None:
        """A number for all layers becomes a list where another model has one by layer."""
        for own in self.layers:
            for key, value in own.block.items():
                one = self.block.get(key)
                if isinstance(value, list) and len(value) == own.count and isinstance(one, int | float):
                    self.block[key] = [one] * self.count

    def _lists(self, block: dict[str, Any], owns: Sequence[Block], *, nested: bool) -> None:
        """Whatever names layers one by one."""
        jointly = "decoder_sparse_step" in block
        ones = int(nested and _counts_from_one(block, self.count))
        for key, value in list(block.items()):
            if isinstance(value, dict):
                if _ABOUT_LAYERS.search(key) and value and all(_below(k, self.count) for k in value):
                    entries = [self._pick(key, own, i, dict) for i, own in enumerate(owns)]
                    block[key] = {str(i): e[0] for i, e in enumerate(entries) if e}
                elif not nested and self._part(key, value):
                    below = [b if isinstance(b := own.get(key), Mapping) else value for own in owns]
                    self._lists(value, below, nested=True)
            elif isinstance(value, str) and "pattern" in key and len(value) == self.count > 1:
                block[key] = "".join(self._entries(key, owns, str))
            elif isinstance(value, list) and value:
                kind = self._kind(key, value, nested=nested)
                if kind == "entries":
                    block[key] = self._entries(key, owns, list) + self._tail(key, value)
                elif kind == "numbers" and not (key == "mlp_only_layers" and jointly):
                    listed = [self._numbers(key, own, i) for i, own in enumerate(owns)]
                    found = [i + ones for i, at in enumerate(listed) if self.layers[i].layer + ones in at]
                    block[key] = found
                    if self.moved or found != value:
                        self.warnings[f"config.json: {key} was read as a list of layer numbers and renumbered"] = None

    def _part(self, key: str, value: Mapping[str, Any]) -> bool:
        """Whether a mapping inside the block speaks of these layers, and not of another module of the model."""
        if key in TEXT_CONFIGS or "model_type" in value or _OTHER_MODULES.search(key):
            return False
        return key.endswith("_config") or _ABOUT_LAYERS.search(key) is not None

    def _kind(self, key: str, value: list[Any], *, nested: bool) -> str | None:
        """Whether a list has one entry per layer, or names layers by their numbers."""
        n = len(value)
        about = bool(_ABOUT_LAYERS.search(key))
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        distinct = whole and len(set(value)) == n and min(value) >= 0 and max(value) < self.count + nested
        if key in _NUMBERS:
            return "numbers" if whole else None
        if key in _PER_LAYER:
            return "entries" if n >= self.count else None
        if n == self.count and value == list(range(n)) and about:
            return "numbers"
        other = _OF_SOMETHING_ELSE.search(key) is not None
        if n in (self.count, self.count + self.extra) and n > 1 and (about or not (other or nested)):
            return "entries"
        return "numbers" if about and distinct and not other else None

    def _pick(self, key: str, own: Block, i: int, kind: type) -> list[Any]:
        """The entry of one output layer: a list of it, empty where there is none."""
        source = self.layers[i]
        entries = own.get(key)
        if isinstance(entries, kind):
            if isinstance(entries, dict):
                return [entries[str(source.layer)]] if str(source.layer) in entries else []
            if isinstance(entries, list | str) and source.layer < len(entries):
                return [entries[source.layer]]
        if kind is list and isinstance(entries, int | float):
            return [entries]  # one for all layers
        for trait in TRAITS:
            sparse = key == "mlp_layer_types" and trait in SPARSE
            if key == trait.keys[-1] or sparse:
                kinds = trait.read(source.block, source.count)
                kind_of = kinds[source.layer] if kinds else trait.default
                if kind_of is not None:
                    return [("dense", "sparse")[kind_of] if sparse else kind_of]
        self._fail(key, f"{source.model!r} has no entry for its layer {source.layer}")
        return []

    def _tail(self, key: str, value: list[Any]) -> list[Any]:
        """Entries beyond the layers, which belong to layers that predict further tokens."""
        last = self.layers[-1]
        extra = number(self.block, PREDICTED) or 0
        own = last.block.get(key)
        if not self.extra or len(value) != self.count + self.extra or not isinstance(own, list):
            return []
        return own[last.count : last.count + extra]

    def _numbers(self, key: str, own: Block, i: int) -> list[Any]:
        """The layers that a list of the source of an output layer names."""
        found = own.get(key)
        if not isinstance(found, list) and key not in HANDLED:
            self._fail(key, f"{self.layers[i].model!r} does not say this of its layers")
        return found if isinstance(found, list) else []

    def _unknown_scalars(self) -> None:
        """Periods that no trait knows: fine where every layer keeps its place in the period."""
        for key, period in self.block.items():
            if key in HANDLED or not _PERIODIC.search(key) or (number(self.block, key) or 0) < 2:
                continue
            if any(own.block.get(key) != period or (own.layer - i) % period for i, own in enumerate(self.layers)):
                self._fail(
                    key,
                    f"{period} gives kinds of layers by their position, and the slices move layers to positions of "
                    "another kind",
                )

    def _traits(self) -> None:
        """Scalars that give the kinds of layers by their position."""
        n = len(self.layers)
        for trait in TRAITS:
            kinds: dict[int, list[Any] | None] = {}
            for own in self.layers:
                if id(own.block) not in kinds:
                    kinds[id(own.block)] = trait.read(own.block, own.count)
            if all(k is None for k in kinds.values()):
                continue
            wanted = [k[own.layer] if (k := kinds[id(own.block)]) else trait.default for own in self.layers]
            key = next((k for k in trait.keys if k in self.block), trait.keys[-1])
            if None in wanted:
                model = self.layers[wanted.index(None)].model
                self._fail(key, f"{model!r} does not say this of its layers")
                continue
            change = {} if trait.read(self.block, n) == wanted else trait.fit(self.block, wanted)
            if change is None and trait in SPARSE and "mlp_layer_types" in self.block:
                continue  # the list decides
            if change is None:
                shown = f" ({self.block[key]!r})" if key in self.block else ""
                self._fail(
                    key,
                    f"no value gives the output's layers the kinds that they have in their models{shown}: "
                    f"{_short(wanted)}",
                )
                continue
            for name, value in change.items():
                if self.block.get(name) != value:
                    self.warnings[f"config.json: {name} is {_short(value)}, so that layers keep their kinds"] = None
                self.block[name] = value

    def _shared(self) -> None:
        """``num_kv_shared_layers``: the last layers use keys and values of the last layer of their kind before."""
        key = "num_kv_shared_layers"
        shared = [own.layer >= own.count - (number(own.block, key) or 0) for own in self.layers]
        if not any(number(own.block, key) for own in self.layers):
            return
        n, k = len(shared), sum(shared)
        if key not in self.block or shared != [i >= n - k for i in range(n)]:
            self._fail(key, "the layers that share keys and values of earlier ones would not be the last ones")
            return
        kinds = {id(own.block): TRAITS[0].read(own.block, own.count) or [None] * own.count for own in self.layers}
        given = [kinds[id(own.block)][own.layer] for own in self.layers]
        for i in range(n - k, n):
            own = self.layers[i]
            first = own.count - (number(own.block, key) or 0)
            before = _last(kinds[id(own.block)][:first], given[i])
            now = _last(given[: n - k], given[i])
            if before is not None and (
                now is None or (self.layers[now].model, self.layers[now].layer) != (own.model, before)
            ):
                self._fail(key, f"layer {own.layer} of {own.model!r} would share keys and values of another layer")
                return
        self.block[key] = k


def _own_block(config: Mapping[str, Any], path: tuple[str, ...], donor: Block, count: int) -> tuple[Block, int]:
    """The block that counts a model's layers, and the count; the donor's where the model has no configuration."""
    if not config:
        return donor, count
    candidates: list[Any] = [_at(config, path[:-1]), config, *(config.get(name) for name in TEXT_CONFIGS)]
    blocks = [b for b in candidates if isinstance(b, Mapping)]
    for block in blocks:
        for key in (path[-1], *COUNT_KEYS):
            found = number(block, key)
            if found is not None:
                return block, found
    listed: Iterator[tuple[Block, int]] = (
        (b, len(b[key])) for b in blocks for key in sorted(_PER_LAYER) if isinstance(b.get(key), list)
    )
    return next(listed, (blocks[0], count))


def _last(kinds: Sequence[Any], kind: Any) -> int | None:
    return max((i for i, other in enumerate(kinds) if other == kind), default=None)


def _below(key: str, count: int) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 7 and int(key) < count


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _counts_from_one(block: Block, count: int) -> bool:
    """Whether a block's lists of layer numbers begin at 1."""
    lists = [v for k, v in block.items() if k in _NUMBERS and isinstance(v, list) and v]
    flat = [i for v in lists for i in v if isinstance(i, int)]
    return bool(flat) and 0 not in flat and max(flat) == count


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
