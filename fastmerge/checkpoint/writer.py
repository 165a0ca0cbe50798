"""Writing the output: any thread, any order, journalled, and there in one rename or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint import journal as _journal
from fastmerge.checkpoint import seal, system
from fastmerge.checkpoint import staging as _staging
from fastmerge.checkpoint.header import listing
from fastmerge.checkpoint.layout import INDEX_NAME, Layout
from fastmerge.checkpoint.parts import load as load_parts
from fastmerge.checkpoint.ranges import Ranges
from fastmerge.checkpoint.seal import Mark, mark
from fastmerge.checkpoint.shards import COPY_PIECE, ShardFiles
from fastmerge.errors import NoSpace, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Self

    from fastmerge.checkpoint.io import I64, Io
    from fastmerge.checkpoint.journal import Range


class Writer:
    """The output directory of one merge.

    All shards are created, reserved on disk and given their headers at once. :meth:`write`, :meth:`copy` and
    :meth:`done` may be called by any number of threads, :meth:`sync` by one more; :meth:`commit` publishes.
    Leaving a ``with`` block without it keeps what is done for ``resume``.

    Args:
        out: the output directory.
        layout: its shards.
        fingerprint: names the merge; only a journal with the same one is resumed.
        resume: continue an interrupted run where there is one; False starts anew and discards it.
        overwrite: replace an existing model directory, at the end and at once.
        inputs: directories and files of the models, which the output must not be or hold.
        io: the primitive; the extension's by default.

    Attributes:
        target: the output directory, absolute.
        staging: where the output grows, next to it.
        finished: the output is published: by :meth:`commit`, or by the run that was to be resumed.
        resumed: bytes of data that need not be written again, the finished parts' excepted.
        parts: the reports of parts that others wrote and finished.
        said: of a part that an earlier run finished: its report.
        features: system features that were looked for and are missing here (False), for the report.

    Raises:
        OutputError: the output exists, is an input, is being written by another process or does not fit on
            the disk; the journal belongs to another merge.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        layout: Layout,
        *,
        fingerprint: str,
        resume: bool = False,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
        io: Io | None = None,
    ) -> None:
        self.target = _staging.target_of(out)
        self.staging = _staging.staging_path(self.target)
        self.layout = layout
        self.finished = False
        self.resumed = 0
        self.parts: list[dict[str, Any]] = []
        self.said: dict[str, Any] | None = None
        self.features: dict[str, bool] = {}
        self._fingerprint = fingerprint
        self._overwrite = overwrite
        self._ranges = [Ranges() for _ in layout.shards]
        self._pending: list[Range] = []
        self._dirty = self._own_shards()
        self._extras: dict[str, bytes | Path] = {}
        self._marks: dict[str, Mark] = {}
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._journal: _journal.Journal | None = None
        self._broken: str | None = None
        self._worth_keeping = False
        with _wrapped(self.target):
            _staging.check(self.target, inputs, overwrite=overwrite)
            if not self.staging.exists():
                self._refuse_existing(resume=resume)
                if self.finished:
                    return
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._staging = self._lock_staging()
        self._shards = ShardFiles(self._staging.data, layout, io or _io.native(), self.features, self._dirty)
        try:
            with _wrapped(self.staging):
                self._begin(_journal.load(self._staging.journal) if resume else None, resume=resume)
        except BaseException:
            # Space that was reserved for nothing goes back; an interrupted run stays.
            self._close(remove=not os.path.lexists(self._staging.journal))
            raise

    @property
    def skips(self) -> bool:
        """Whether :meth:`done` can be true of anything from the start."""
        return self.resumed > 0 or bool(self.parts)

    def done(self, shard: int, offset: int, nbytes: int) -> bool:
        """Whether a range of a shard (absolute offset) is written, by this run or the one that it resumes."""
        return self.finished or self._ranges[shard].covers(offset, offset + nbytes)

    def write(self, table: I64) -> None:
        """Writes rows (shard, offset, address, nbytes) and remembers their checksums; one native call.

        Args:
            table: int64 [R, 4]; offsets absolute in the shard's file.

        Raises:
            OutputError: the disk is full, or writing failed.
            ValueError: a row lies outside its shard's data.
        """
        self._check_open()
        rows = self._shards.check(table)
        if rows:
            self._record(self._shards.write(rows))

    def copy(self, table: I64) -> None:
        """Copies rows (fd_in, offset_in, shard, offset_out, nbytes) from input files and remembers their checksums.

        Raises:
            OutputError: the disk is full, or writing failed.
            CheckpointError: an input ended early, or reading failed.
            ValueError: a row lies outside its shard's data.
        """
        self._check_open()
        rows = self._shards.check(table[:, [2, 3, 1, 4]])
        for (shard, to, source, nbytes), fd in zip(rows, table[:, 0].tolist(), strict=True):
            for at in range(0, nbytes, COPY_PIECE):
                size = min(COPY_PIECE, nbytes - at)
                self._record([self._shards.copy(fd, source + at, shard, to + at, size)])

    def add(self, name: str, data: bytes | Path) -> None:
        """Adds a file (config, tokenizer, card, report) that :meth:`commit` writes beside the shards.

        Args:
            name: a plain file name, perhaps in plain directories (``1_Pooling/config.json``).
            data: its content, or a file to copy.

        Raises:
            OutputError: the name leads elsewhere, or is one of the model's own files.
        """
        if not seal.plain_name(name):
            raise OutputError(f"{name!r}: expected a plain file name")
        if name == INDEX_NAME or name in {s.name for s in self.layout.shards}:
            raise OutputError(f"{name}: is written by the merge itself")
        self._extras[name] = data
        self._marks.pop(name, None)

    def sync(self) -> None:
        """Makes everything written so far durable and journals it; writers may go on meanwhile.

        Raises:
            OutputError: the disk reported that written data was lost; the shard is written again on resume.
        """
        if self.finished:
            return
        self._check_open()
        with self._sync_lock, _wrapped(self.staging):
            with self._lock:
                pending, self._pending = self._pending, []
                dirty, self._dirty = self._dirty, set()
            for shard in sorted(dirty):
                try:
                    self._shards.sync(shard)
                except OSError as error:
                    self._void(shard, error)
            self._log.done(pending)

    def checksums(self) -> list[tuple[str, int, int, str]]:
        """(shard name, offset, bytes, xxh3_64 in hex) of all data written or copied so far; syncs first."""
        if self.finished:
            return []
        self.sync()
        seen = [Ranges() for _ in self.layout.shards]
        found = []
        state = _journal.load(self._staging.journal)
        for shard, offset, nbytes, x in state.ranges if state else ():
            if not seen[shard].covers(offset, offset + nbytes):
                seen[shard].add(offset, offset + nbytes)
                found.append((self.layout.shards[shard].name, offset, nbytes, f"{x:016x}"))
        return sorted(found)

    def files(self) -> dict[str, Mark]:
        """Bytes and checksum of every file that :meth:`commit` will write so far; of shards, of their headers.

        Raises:
            OutputError: a file that is to be copied cannot be read.
        """
        found = {shard.name: mark(shard.header) for shard in self.layout.shards}
        if self.layout.index is not None:
            found[INDEX_NAME] = mark(self.layout.index)
        return found | {name: self._mark(name) for name in self._extras}

    def _mark(self, name: str) -> Mark:
        """Of one added file; known files are not read again."""
        if name not in self._marks:
            data = self._extras[name]
            with _wrapped(data if isinstance(data, Path) else self.target):
                self._marks[name] = mark(data)
        return self._marks[name]

    def commit(self) -> None:
        """Publishes the output: complete, durable, in one rename.

        Raises:
            OutputError: ranges are missing, the disk is full, or the output appeared meanwhile; the staging
                directory stays for ``resume``.
        """
        if self.finished:
            return
        self.sync()
        missing = [
            f"{shard.name}: bytes {a} to {b}"
            for shard, ranges in zip(self.layout.shards, self._ranges, strict=True)
            for a, b in ranges.missing(shard.data_start, shard.size)
        ]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise OutputError(f"{self.target}: not written: {'; '.join(missing[:5])}{more}")
        with _wrapped(self.staging):
            self._staging.tidy(self._shards.expected())
            if self.layout.index is not None:
                self._shards.write_file(INDEX_NAME, self.layout.index, mark(self.layout.index))
            for name, data in self._extras.items():
                self._shards.write_file(name, data, self._mark(name))
            self._shards.rename()
            system.sync_directory(self._staging.data)
            info = self._staging.data.stat()
            self._log.commit(info.st_dev, info.st_ino)
            if not self._overwrite and os.path.lexists(self.target):
                raise OutputError(f"{self.target}: appeared while the merge ran; the result is kept for --resume")
            self._staging.publish()
        self.finished = True
        # The output is there; what is left of the staging directory would not make it wrong.
        with contextlib.suppress(OSError):
            self._close(remove=True)

    def abort(self) -> None:
        """Stops: journals what is durable, keeps the staging directory for ``resume``, gives the lock back.

        A run that neither wrote nor copied nor resumed anything leaves no staging directory.
        """
        if self._journal is None:
            return
        with contextlib.suppress(OutputError):
            self.sync()
        self._close(remove=not self._worth_keeping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def _log(self) -> _journal.Journal:
        if self._journal is None:
            raise ValueError("the writer is closed")
        return self._journal

    def _check_open(self) -> None:
        if self._journal is None:
            raise ValueError("the writer is closed")
        if self._broken:
            raise OutputError(self._broken)

    def _refuse_existing(self, *, resume: bool) -> None:
        if self._overwrite or not os.path.lexists(self.target):
            return
        if resume:
            said, changed = self._finished()
            if changed:
                raise OutputError(
                    f"{self.target}: this merge was finished, and changed since: {listing(changed)}; "
                    f"--overwrite writes it anew"
                )
            self.finished = said
        if not self.finished:
            raise OutputError(f"{self.target}: exists; --overwrite replaces it")

    def _finished(self) -> tuple[bool, list[str]]:
        """Whether the output is that of this merge, and which of its files are not, the shards' data aside."""
        try:
            facts = seal.read_report(self.target) or {}
        except ValueError:
            return False, []
        said = facts.get("fingerprint") or facts.get("details", {}).get("fingerprint")
        if said != self._fingerprint:
            return False, []
        wrong = seal.changes(self.target, (seal.files_of(facts) or {}) | self.files())
        for shard in self.layout.shards:
            path = self.target / shard.name
            if path.is_file() and path.stat().st_size != shard.size:
                wrong.append(f"{path}: expected {shard.size} bytes, got {path.stat().st_size}")
        return True, wrong

    def _begin(self, state: _journal.State | None, *, resume: bool) -> None:
        digest = self.layout.digest
        if state and (state.fingerprint, state.layout) != (self._fingerprint, digest):
            raise OutputError(
                f"{self.staging}: holds an interrupted run of another recipe, seed, input or shard size; "
                f"leave --resume out to discard it and start anew"
            )
        if state and self._staging.published(state.commit):
            self.finished = True
            self._close(remove=True)
            return
        if state is not None:
            self._staging.check_own()
        self._staging.restore()
        self._refuse_existing(resume=resume)
        if self.finished:
            self._close(remove=True)
            return
        parts = [*load_parts(self.staging, self._fingerprint, digest)] if resume else []
        if state is None and not parts:
            self._staging.clear()
        self._worth_keeping = bool(state or parts)
        self._staging.data.mkdir(exist_ok=True)
        self._shards.open()
        self._take(state.ranges if state else ())
        self._journal = _journal.Journal(self._staging.journal, state)
        if state is None:
            self._journal.begin(self._fingerprint, digest)
            for directory in (self._staging.data, self.staging, self.target.parent):
                system.sync_directory(directory)
        for ranges, said in parts:
            self._log.done(self._take(ranges, trusted=said is not None))
            self.parts += [said] if said is not None else []

    def _own_shards(self) -> set[int]:
        """The shards that are written, by number."""
        return set(range(len(self.layout.shards)))

    def _lock_staging(self) -> _staging.Staging:
        return _staging.Staging(self.target, self.features)

    def _take(self, ranges: Iterable[Range], *, trusted: bool = False) -> list[Range]:
        """Counts journalled ranges as written that still have their checksum, and those that are ``trusted``."""
        found = []
        for record in ranges:
            shard, offset, nbytes, _ = record
            if trusted or self._shards.matches(record):
                self._ranges[shard].add(offset, offset + nbytes)
                self.resumed += 0 if trusted else nbytes
                found.append(record)
        return found

    def _record(self, ranges: list[Range]) -> None:
        with self._lock:
            for shard, start, nbytes, _ in ranges:
                self._ranges[shard].add(start, start + nbytes)
                self._dirty.add(shard)
            self._pending += ranges
            self._worth_keeping |= bool(ranges)

    def _void(self, shard: int, error: OSError) -> None:
        """The kernel lost written data and will not say which: nothing of the shard counts any more."""
        name = self._shards.name(self._shards.fds[shard])
        self._broken = f"{name}: fdatasync failed: {error.strerror}: the shard is written again with --resume"
        with contextlib.suppress(OSError):
            self._log.void(shard)
        raise OutputError(self._broken) from None

    def _close(self, *, remove: bool) -> None:
        self._shards.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._staging.release(remove=remove)


@contextlib.contextmanager
def _wrapped(path: Path) -> Iterator[None]:
    """System errors as output errors with the file's name."""
    try:
        yield
    except OSError as error:
        said = error.strerror or os.strerror(error.errno or errno.EIO)
        kind = NoSpace if error.errno in _io.FULL else OutputError
        raise kind(f"{error.filename or path}: {said}") from None
