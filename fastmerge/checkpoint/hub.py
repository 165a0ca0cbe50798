"""Hub ids (``org/name[@revision]``) to a local snapshot of one commit, through huggingface_hub."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.checkpoint.header import listing
from fastmerge.errors import CheckpointError, hint

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "bpe.codes",
    "dict.txt",
    "tokenizer*",
    "vocab*",
    "merges*.txt",
    "LICEN[SC]E*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
"""Files of a snapshot that are fetched: weights, configuration, tokenizer, licence, and the card that names it."""

_DIRECTORIES = ("[!0-9a]*/*", "[0-9][!_]*/*", "a/*", "a[!d]*/*")
"""All but ``1_Pooling`` and its like (sentence-transformers), and ``additional_chat_templates``."""

IGNORED = (*_DIRECTORIES, "*.py", "*.bin", "*.pt", "*.pth", "*.onnx", "*.gguf", "consolidated*.safetensors")
"""Never fetched, whatever the patterns say: code, pickles, other formats, second copies, other directories."""

_ID = r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,255}))?"
_COMMIT = r"[0-9a-f]{40}"
_PRIVATE = r"\bhf_[A-Za-z0-9_]+|(?i:bearer)\s+\S+"


class Snapshot(NamedTuple):
    """A repository at one commit, on disk.

    Attributes:
        ref: ``org/name@<commit sha>``.
        path: its directory.
        commit: the sha.
    """

    ref: str
    path: Path
    commit: str


def looks_like_id(ref: str) -> bool:
    """Whether a reference that is no path on this machine can be a hub id."""
    match = re.fullmatch(_ID, ref)
    return match is not None and ".." not in ref


def locate(ref: str, revision: str | None = None, *, weights: bool = True) -> tuple[str, Path]:
    """Finds a model or adapter: what exists as a path is that path, also with an ``@``; else it is a hub id.

    Without ``weights`` a snapshot may lack them.

    Returns:
        The reference, with the commit where it is a hub id, and the path, which exists.

    Raises:
        CheckpointError: there is nothing, or a revision is asked of a path.
    """
    if not ref.strip() or "\0" in ref:
        raise CheckpointError(f"{ref!r}: expected a path or a hub id")
    local, at, said = (ref, "", revision) if revision or _exists(ref) else ref.partition("@")
    if (at or revision) and local and _exists(local):
        raise CheckpointError(
            f"{local}: a local path has no revisions, and no {local}@{said} is there: leave {said!r} out, or name "
            f"the directory that holds it"
        )
    path = _expanded(ref)
    if not _exists(ref):
        if not looks_like_id(ref):
            raise CheckpointError(f"{ref}: no such file or directory{_near(ref)}")
        snapshot = resolve(ref, revision=revision, weights=weights)
        return snapshot.ref, snapshot.path
    if not path.exists():
        raise CheckpointError(f"{ref}: a link to {os.path.realpath(path)}, which does not exist")
    return ref, path


def _expanded(ref: str) -> Path:
    """The path, its ``~`` replaced where there is such a user."""
    return Path(os.path.expanduser(ref))  # noqa: PTH111  Path.expanduser raises for users that do not exist


def _exists(ref: str) -> bool:
    return os.path.lexists(_expanded(ref))


def _near(ref: str) -> str:
    """A hint at the directory beside a path which is not there whose name is closest to it, if any is."""
    path = _expanded(ref)
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    return hint(path.name, beside)


def resolve(ref: str, *, revision: str | None = None, weights: bool = True) -> Snapshot:
    """Finds, or downloads, the snapshot that a hub id names.

    The revision is resolved to a commit first, so that a branch which moves between plan and run changes
    nothing. With ``HF_HUB_OFFLINE`` only the local cache is asked.

    Args:
        ref: ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit; wins over none in ``ref``, and must not contradict one.
        weights: whether weights are fetched as well.

    Raises:
        CheckpointError: not a hub id, not found, gated, or the hub is out of reach.
    """
    match = re.fullmatch(_ID, ref)
    if match is None:
        raise CheckpointError(f"{ref}: expected a path or a hub id org/name[@revision]")
    repo, said = match["repo"], match["revision"]
    if said and revision and said != revision:
        raise CheckpointError(f"{ref}: revision {revision!r} contradicts the one in the name")
    revision = said or revision
    ref = f"{repo}@{revision}" if revision else repo
    hub = _library(ref)
    offline = _offline()
    try:
        if offline or (revision and re.fullmatch(_COMMIT, revision)):
            commit = revision
        else:
            commit = hub.HfApi().model_info(repo, revision=revision).sha
        path = Path(
            hub.snapshot_download(
                repo,
                revision=commit,
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(IGNORED if weights else (*IGNORED, "*.safetensors")),
                local_files_only=offline,
            )
        )
    except Exception as error:  # noqa: BLE001 - the library raises many unrelated types, some with its requests inside
        known = _cached(repo) if offline and revision else []
        raise CheckpointError(_explain(ref, error, known, offline=offline)) from None
    # In the cache a snapshot's directory is named by its commit, also where only a branch was asked for.
    commit = path.name if re.fullmatch(_COMMIT, path.name) else commit or path.name
    return Snapshot(f"{repo}@{commit}", path, commit)


def _library(ref: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(
            f"{ref}: no such path here{_near(ref)}, and hub ids need huggingface_hub; install it (the extra 'hub')"
        ) from None


def _offline() -> bool:
    return bool(importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE)


def _cached(repo: str) -> list[str]:
    """Branches and commits of a repository that the local cache holds."""
    cache = getattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_CACHE", None)
    if cache is None:
        return []
    root = Path(cache) / f"models--{repo.replace('/', '--')}"
    refs = sorted(str(p.relative_to(root / "refs")) for p in root.glob("refs/**/*") if p.is_file())
    return refs + sorted(p.name for p in root.glob("snapshots/*"))


def _explain(ref: str, error: Exception, known: Sequence[str], *, offline: bool) -> str:
    """One line about a failure of the library, without credentials and without its advice."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{ref}: the repository is gated: accept its terms on the hub and log in with `hf auth login`"
    if kind == "RepositoryNotFoundError":
        return f"{ref}: no such path here{_near(ref)}, and no such repository on the hub (or it is private)"
    if kind == "RevisionNotFoundError":
        return f"{ref}: the repository has no such revision: name a branch, a tag or a commit of it"
    if known:
        return (
            f"{ref}: the local cache does not hold this revision, and HF_HUB_OFFLINE is set: it holds {listing(known)}"
        )
    if offline:
        return f"{ref}: no such path here{_near(ref)}, and not in the local cache (HF_HUB_OFFLINE is set): {kind}"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    said = re.sub(_PRIVATE, "***", first)[:300]
    return f"{ref}: no such path here{_near(ref)}, and the hub could not be reached: {kind}: {said}"
