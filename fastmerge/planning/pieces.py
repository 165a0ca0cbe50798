"""Where in the tensors of a model the updates of an adapter go.

An adapter names modules as the program that trained it had them in memory, and a model may lie on disk in another
layout: experts fused in one tensor, or each by itself. An update of the one is one of the other: of a fused
``gate_up_proj`` the upper half of the rows is ``gate_proj``'s (``w1``), the lower one ``up_proj``'s (``w3``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint.header import TensorInfo
from fastmerge.planning.names import align

if TYPE_CHECKING:
    from fastmerge.checkpoint.update import Update

_CONTAINERS = ("mlp", "block_sparse_moe", "feed_forward")
"""What layers call the module that holds a router and its experts."""

_EXPERT = re.compile(r"(?P<module>.+\.)?experts\.(?P<number>0|[1-9]\d{0,5})\.(?P<kind>\w+)\.weight")
_FUSED = re.compile(r"(?P<module>.+\.)?(?P<kind>gate_up_proj|down_proj|input_linear|output_linear)(\.weight)?")
_CONTAINER = re.compile(rf"((?:{'|'.join(_CONTAINERS)})\.)?(experts\.)?$")
_KINDS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_BOTH, _DOWN = ("gate", "up"), ("down",)
_WHOLE = {"gate_up_proj": _BOTH, "input_linear": _BOTH, "down_proj": _DOWN, "output_linear": _DOWN}


class Piece(NamedTuple):
    """A matrix in a tensor, and what is added to it.

    Attributes:
        first: element of the tensor at which it begins.
        shape: as it is stored.
        update: what is added.
        expert: which of the update's.
        row: first row of the update that it takes.
        transposed: it is stored ``[in, out]``.
    """

    first: int
    shape: tuple[int, ...]
    update: Update
    expert: int = 0
    row: int = 0
    transposed: bool = False


class Places:
    """Finds the pieces of a model's tensors that updates of an adapter belong to.

    Args:
        tensors: of the model.
        model_type: of the model.
        flag: ``fan_in_fan_out`` of the adapter.
        updates: of the adapter, by the names that it uses.

    Attributes:
        pieces: by tensor of the model.
        absent: names for which the model has no tensor.
        unfit: names by what is wrong with them.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], model_type: Any, updates: Mapping[str, Update], *, flag: bool
    ) -> None:
        self._tensors, self._type, self._flag = tensors, model_type, flag
        self._updates = updates
        self.pieces: dict[str, list[Piece]] = {}
        self.absent: list[str] = []
        self.unfit: dict[str, list[str]] = {}
        self._singles: dict[str, dict[int, dict[str, str]]] = {}
        self._fused: dict[tuple[str, str], str] = {}
        missing = [name for name in updates if name not in tensors]
        if missing:
            self._index()
        for name, update in updates.items():
            if name in tensors:
                self._whole(name, tensors[name], update)
            elif not self._elsewhere(name, update):
                self.absent.append(name)

    def _index(self) -> None:
        """The experts of the model: single ones by layer, number and kind, fused ones by layer and kind."""
        for name, info in self._tensors.items():
            if (one := _EXPERT.fullmatch(name)) and (kind := _KINDS.get(one["kind"])) is not None:
                layer = self._singles.setdefault(_layer(one["module"]), {})
                layer.setdefault(int(one["number"]), {})[kind] = name
            elif (many := _FUSED.fullmatch(name)) and len(info.shape) == 3:
                for kind in _WHOLE[many["kind"]]:
                    self._fused[_layer(many["module"]), kind] = name

    def _add(self, name: str, piece: Piece) -> None:
        self.pieces.setdefault(name, []).append(piece)

    def _wrong(self, what: str, name: str) -> None:
        self.unfit.setdefault(what, []).append(name)

    def _whole(self, name: str, info: TensorInfo, update: Update) -> None:
        """An update of a tensor of its own name: a matrix, a bias, or all experts."""
        if len(info.shape) != 3:
            transposed = None if update.experts > 1 else self._transposes(name, info.shape, update)
            if transposed is None:
                self._wrong(f"{given(update)} does not fit {shown(info)}", name)
                return
            self._add(name, Piece(0, info.shape, update, transposed=transposed))
            return
        experts, *matrix = info.shape
        transposed = self._transposes(name, tuple(matrix), update)
        if transposed is None or update.experts != experts:
            self._wrong(f"{given(update)} does not fit {shown(info)}", name)
            return
        for e in range(experts):
            self._add(name, Piece(e * matrix[0] * matrix[1], tuple(matrix), update, e, transposed=transposed))

    def _transposes(self, name: str, shape: tuple[int, ...], update: Update) -> bool | None:
        """Whether a matrix is stored ``[in, out]``; of square experts as their sibling's, and None where none tells."""
        found = update.transposes(name, shape, self._type, flag=self._flag)
        if update.experts == 1 or found is None or len(set(shape)) > 1:
            return found
        for other in (f"{name.rpartition('.')[0]}.{kind}" for kind in _WHOLE):
            sibling, info = self._updates.get(other), self._tensors.get(other)
            if info is None or len(set(info.shape[1:])) == 1:
                continue
            if sibling is not None:
                return sibling.transposes(other, info.shape[1:], self._type, flag=self._flag)
            # Stored [E, in, out]; only of some types is that known to be what peft took it for.
            if info.shape[1] < info.shape[2] and not found:
                return None
        return found

    def _elsewhere(self, name: str, update: Update) -> bool:
        """An update of a tensor that the model has under another name, or in another layout."""
        single, fused = _EXPERT.fullmatch(name), _FUSED.fullmatch(name)
        if single and single["kind"] in _KINDS:
            return self._of_one(name, _layer(single["module"]), int(single["number"]), _KINDS[single["kind"]], update)
        if fused and ".experts." in f".{name}":
            layer, kinds = _layer(fused["module"]), _WHOLE[fused["kind"]]
            if (layer, kinds[0]) in self._fused:
                other = self._fused[layer, kinds[0]]
                self._whole(other, self._tensors[other], update)
                return True
            return self._of_all(name, layer, kinds, update)
        for old in _CONTAINERS:
            for new in _CONTAINERS:
                other = name.replace(f".{old}.", f".{new}.")
                if old != new and other != name and other in self._tensors:
                    self._whole(other, self._tensors[other], update)
                    return True
        return False

    def _of_one(self, name: str, layer: str, number: int, kind: str, update: Update) -> bool:
        """An update of a single expert, of one that has another name or is a part of a fused tensor."""
        other = self._singles.get(layer, {}).get(number, {}).get(kind)
        if other is not None:
            self._whole(other, self._tensors[other], update)
            return True
        fused = self._fused.get((layer, kind))
        if fused is None:
            return False
        experts, rows, columns = self._tensors[fused].shape
        height = rows // 2 if kind != "down" else rows
        fits = update.matrix == (height, columns) and number < experts and (kind == "down" or rows % 2 == 0)
        # Of a square matrix that is stored [in, out] the shape would fit as well.
        if not fits or update.magnitude is not None or self._stored_transposed(layer):
            self._wrong(f"{given(update)} does not fit an expert of {shown(self._tensors[fused])}", name)
            return True
        first = (number * rows + (height if kind == "up" else 0)) * columns
        self._add(fused, Piece(first, (height, columns), update))
        return True

    def _stored_transposed(self, layer: str) -> bool:
        """Whether fused experts of a layer are ``[E, in, out]``: gate and up are then side by side in the columns."""
        both = [
            self._tensors[self._fused[layer, kind]].shape for kind in ("gate", "down") if (layer, kind) in self._fused
        ]
        if len(both) < 2:
            return True  # not known
        (_, rows, columns), (_, height, width) = both
        return not (rows == 2 * width and columns == height)

    def _of_all(self, name: str, layer: str, kinds: tuple[str, ...], update: Update) -> bool:
        """An update of fused experts, of which the model has each by itself."""
        singles = self._singles.get(layer)
        if not singles:
            return False
        numbers = range(update.experts)
        names = [[singles.get(e, {}).get(kind) for kind in kinds] for e in numbers]
        whole = len(singles) == update.experts and all(all(parts) for parts in names)
        out, columns = update.matrix
        for e, parts in zip(numbers, names, strict=True) if whole else ():
            infos = [self._tensors[n] for n in parts if n is not None]
            sizes = [i.shape for i in infos]
            if any(len(s) != 2 or s[1] != columns for s in sizes) or sum(s[0] for s in sizes) != out:
                whole = False
                break
            row = 0
            for info in infos:
                self._add(info.name, Piece(0, info.shape, update, e, row))
                row += info.shape[0]
        if not whole:
            some = next((self._tensors[n] for parts in names for n in parts if n is not None), None)
            ones = f"{len(singles)} single ones" + (f", such as {shown(some)}" if some is not None else "")
            self._wrong(f"{given(update)} of {update.experts} experts does not fit {ones}", name)
        return True


def aligned(names: Iterable[tuple[str, tuple[int, ...]]], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Names of a model for those of an adapter that differ from them by a prefix.

    Args:
        names: of the adapter, with the shapes that their tensors have.
        tensors: of the model.
    """
    some = next(iter(tensors.values()), None)
    other = {name: some._replace(name=name, shape=shape) for name, shape in names} if some else {}
    found = align(tensors, other)
    return {old: new for old, new in found.names.items() if new in tensors}


def _layer(module: str | None) -> str:
    """What the names of a layer begin with, whatever it calls the module of its experts."""
    return _CONTAINER.sub("", module or "", count=1)


def given(update: Update) -> str:
    """An update, for messages."""
    b = "lora_B.bias" if update.b is None else f"lora_B {list(update.b.shape)} x lora_A"
    return f"{b} {list(update.a.shape[update.b is None :])}"


def shown(info: TensorInfo) -> str:
    """A tensor, for messages."""
    return f"{info.dtype.name} {list(info.shape)}"
