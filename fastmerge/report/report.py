"""The report of one merge: bytes, seconds, bottleneck, what was noticed."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import seal
from fastmerge.errors import OutputError
from fastmerge.sizes import show_bytes


@dataclass(frozen=True)
class Report:
    """What :func:`fastmerge.merge` did.

    Attributes:
        out: the directory that was written.
        seconds: wall time of the whole merge.
        bytes_read: input bytes, counted once per pass that read them.
        bytes_written: output bytes.
        stages: seconds that the workers spent reading, computing and writing, summed over workers.
        bottleneck: the largest of these.
        tensors: output tensors.
        devices: names of the workers' devices.
        backend: what computed.
        fingerprint: of recipe, seed, inputs, layout and engine: equal ones give equal bytes.
        nonfinite: tensors with NaN or Inf in their output, with counts.
        warnings: everything that the plan and the run warned about.
        account: what became of the tensors of every model: counts, and the names of what is left out.
        details: versions, recipe, inputs, checksums: what ``merge_report.json`` holds besides.
    """

    out: str
    seconds: float
    bytes_read: int
    bytes_written: int
    stages: Mapping[str, float]
    bottleneck: str
    tensors: int
    devices: tuple[str, ...]
    backend: str
    fingerprint: str
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    account: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read and written per second of wall time, in 1e9 bytes."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9

    def joined(self, parts: Sequence[Mapping[str, Any]]) -> Report:
        """With what the reports of parts of the same merge count, for whoever publishes it."""
        if not parts:
            return self
        every: list[Mapping[str, Any]] = [*parts, asdict(self)]
        nonfinite: Counter[str] = Counter()
        stages: Counter[str] = Counter()
        for said in every:
            nonfinite.update(said["nonfinite"])
            stages.update(said["stages"])
        lost = [said["details"]["quantised"] for said in every if said["details"].get("quantised")]
        return replace(
            self,
            details={**self.details, **({"quantised": _lost(lost)} if lost else {})},
            bytes_read=sum(said["bytes_read"] for said in every),
            bytes_written=sum(said["bytes_written"] for said in every),
            stages=dict(stages),
            bottleneck=max(stages, key=stages.__getitem__),
            devices=tuple(name for said in parts for name in said["devices"]),
            nonfinite=dict(nonfinite),
            warnings=tuple(dict.fromkeys(text for said in every for text in said["warnings"])),
        )

    def to_json(self) -> str:
        """The text of ``merge_report.json``, with a checksum of itself."""
        facts = {**asdict(self), "gigabytes_per_second": self.gigabytes_per_second}
        return json.dumps({**facts, "digest": seal.digest(facts)}, indent=2) + "\n"

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Report:
        """The report that a merge left in its output directory.

        Raises:
            OutputError: there is none, or something else in its place.
        """
        path = Path(directory) / seal.REPORT_NAME
        try:
            facts = seal.read_report(Path(directory))
        except ValueError as error:
            raise OutputError(str(error)) from None
        if facts is None:
            raise OutputError(f"{path}: is missing")
        missing = [f.name for f in fields(cls) if f.name not in facts and f.default is f.default_factory is MISSING]
        if missing:
            raise OutputError(f"{path}: not a merge report: without {', '.join(missing)}")
        return cls.of(facts)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Report:
        """From the values of its JSON."""
        known: dict[str, Any] = {f.name: facts[f.name] for f in fields(cls) if f.name in facts}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)

    def __str__(self) -> str:
        devices = ", ".join(dict.fromkeys(self.devices))
        return (
            f"{self.out}: {self.tensors} tensors, read {show_bytes(self.bytes_read)}, "
            f"wrote {show_bytes(self.bytes_written)} in {self.seconds:.2f} s on {devices} "
            f"({self.gigabytes_per_second:.2f} GB/s, bottleneck {self.bottleneck})"
        )


def _lost(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all parts lose together that were written as codes and scales."""
    squares, errors = (sum(part[key] for part in parts) for key in ("squares", "squared_errors"))
    return {
        "tensors": sum(part["tensors"] for part in parts),
        "relative_error": math.sqrt(errors / squares) if squares else 0.0,
        "largest_error": max(part["largest_error"] for part in parts),
        "squares": squares,
        "squared_errors": errors,
        "worst": max((part["worst"] for part in parts), key=lambda worst: worst["relative_error"]),
    }
