"""A validated model on disk: every problem is known before one weight is read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import content, discover, formats, hub, index
from fastmerge.checkpoint.header import MAX_TENSORS, Seen, TensorInfo, listing, read_header
from fastmerge.checkpoint.quantised import Found, Quantised, find
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAME = attrgetter("name")


@dataclass(frozen=True)
class ShardFile:
    """One input file.

    Attributes:
        path: as opened.
        size: bytes.
        identity: (device, inode, size, mtime_ns) when its header was read.
        header_hash: sha256 of the header, in hex.
        metadata: its ``__metadata__``.
    """

    path: Path
    size: int
    identity: tuple[int, int, int, int]
    header_hash: str
    metadata: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose headers, index and config have been checked.

    Attributes:
        ref: what it was opened as; hub ids carry the commit (``org/name@sha``).
        path: the directory of config, tokenizer and weights.
        files: weight files; ``TensorInfo.file`` counts in them.
        tensors: by name, in the order of files and bytes.
        config: ``config.json``, or empty.
        warnings: what a user should know about it.
        stale_quantisation: keys of the config, as dotted paths (``text_config.quantization_config``), that speak of
            a quantisation which no weight has: a result must not have them.
        quantised: weights that are stored as codes and scales, by their names; only where they were asked for.
        about: scales of the activations of a quantised model.
        alike: of a model that is in no file, as a merge is yet to make it, for each tensor that will hold the bytes of
            another one the name of that; None for a model on disk.
    """

    ref: str
    path: Path
    files: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    warnings: tuple[str, ...] = ()
    stale_quantisation: tuple[str, ...] = ()
    quantised: Mapping[str, Quantised] = field(default_factory=dict, repr=False)
    about: tuple[TensorInfo, ...] = field(default=(), repr=False)
    alike: Mapping[str, str] | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        ref_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        seen: Seen | None = None,
        quantised: bool = False,
    ) -> Checkpoint:
        """Opens a file, an index, a model directory or a hub id; reads headers and config only. Pickles are refused.

        What exists as a path is a path, also with an ``@`` in its name; anything else that looks like
        ``org/name[@revision]`` is looked up in the local Hugging Face cache, or downloaded.

        Args:
            ref_or_path: where the model is.
            revision: branch, tag or commit of a hub id; files on disk have none.
            seen: shared by the models of one recipe, so that equal headers are checked once.
            quantised: whether codes and scales are read as the weights that they are, where their layout is known.

        Raises:
            CheckpointError: with every problem found in the model.
        """
        ref, path = hub.locate(os.fspath(ref_or_path), revision)
        return cls._from_path(ref, path, seen, quantised=quantised)

    @classmethod
    def open_files(cls, ref_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
        """Opens a model for its small files alone: it has no tensors here, and need have none on disk.

        Raises:
            CheckpointError: there is nothing, or its config is damaged.
        """
        ref, path = hub.locate(os.fspath(ref_or_path), revision, weights=False)
        directory = path if path.is_dir() else path.parent
        config, problems = _config(directory)
        if problems:
            raise CheckpointError(problems)
        return cls(ref, directory, (), {}, config)

    @classmethod
    def _from_path(cls, ref: str, path: Path, seen: Seen | None, *, quantised: bool) -> Checkpoint:
        try:
            found = discover.find(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
        problems = list(found.problems)
        seen = seen or Seen()
        files: list[ShardFile] = []
        every: list[tuple[TensorInfo, ...]] = []
        for file in found.files:
            try:
                header = read_header(file, file=len(files), seen=seen)
            except CheckpointError as error:
                problems.extend(error.problems)
                continue
            files.append(ShardFile(file, header.size, header.identity, header.digest, header.metadata))
            every.append(header.tensors)
            if sum(map(len, every)) > MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {MAX_TENSORS} tensors")
        key = tuple([(file.header_hash, file.size) for file in files])
        tensors = seen.tables.get(key)
        if tensors is None:
            tensors, twice = _by_name(files, every)
            problems += [f"{found.directory}: tensors in both {pair}: {listing(n)}" for pair, n in twice.items()]
            if not twice:
                seen.tables[key] = tensors
        config, said = _config(found.directory)
        warnings = list(found.warnings)
        if found.weight_map is not None:
            wrong, odd = index.compare(found.directory, found.weight_map, files, tensors, config=config)
            problems += wrong
            warnings += odd
        problems += said
        packed = None
        if quantised and formats.not_floats(tensors):
            packed = find([f.path for f in files], formats.settings(config), tensors)
        said, stale = formats.quantised(found.directory, config, tensors, packed)
        problems += said
        problems += formats.adapters(found.directory, tensors)
        if problems:
            raise CheckpointError(problems)
        warnings += formats.stale(found.directory, stale)
        packed = packed or Found({}, (), ())
        warnings += formats.unsaid(found.directory, config, packed)
        return cls(
            ref,
            found.directory,
            tuple(files),
            tensors,
            config,
            tuple(warnings),
            stale,
            packed.weights,
            packed.activations,
        )

    @property
    def identity(self) -> str:
        """sha256 over the headers' hashes: free of paths and times, and blind to the weights' values.

        Two fine-tunes saved by the same program have equal headers; :meth:`content_id` tells them apart.
        """
        h = hashlib.sha256()
        for file in self.files:
            h.update(bytes.fromhex(file.header_hash))
        return h.hexdigest()

    def content_id(self) -> str:
        """A hash that changes when the weights do, without reading all of them.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        return content.of(f.path for f in self.files)

    def recheck(self) -> None:
        """Makes sure that the files are still those whose headers were read.

        Raises:
            CheckpointError: naming every file that was changed, replaced or removed.
        """
        problems = []
        for file in self.files:
            try:
                info = file.path.stat()
            except OSError as error:
                problems.append(f"{file.path}: {error.strerror} since it was opened")
                continue
            now = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
            names = ("device", "inode", "size", "mtime_ns")
            changes = [f"{n} {a}, now {b}" for n, a, b in zip(names, file.identity, now, strict=True) if a != b]
            if changes:
                problems.append(f"{file.path}: changed since it was opened: {'; '.join(changes)}")
        if problems:
            raise CheckpointError(problems)


def _by_name(
    files: Sequence[ShardFile], every: Sequence[tuple[TensorInfo, ...]]
) -> tuple[dict[str, TensorInfo], dict[str, list[str]]]:
    """The tensors of all files, and the names that are in two of them."""
    tensors: dict[str, TensorInfo] = {}
    twice: dict[str, list[str]] = {}
    for file, infos in zip(files, every, strict=True):
        mine = dict(zip(map(_NAME, infos), infos, strict=True))
        if not tensors.keys().isdisjoint(mine.keys()):
            for name in (n for n in mine if n in tensors):
                pair = f"{files[tensors[name].file].path.name} and {file.path.name}"
                twice.setdefault(pair, []).append(name)
        tensors |= mine
    return tensors, twice


def _config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    path = directory / "config.json"
    if not os.path.lexists(path):
        return {}, []
    try:
        return discover.read_json(path, strict=False), []
    except CheckpointError as error:
        return {}, error.problems
