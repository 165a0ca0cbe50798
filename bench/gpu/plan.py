"""What a run consists of: parts, their items, and what an item may use."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run.

    Attributes:
        about: what it shows.
        least: of the budget, what the parts before it leave to it while it has items left.
        most: of the budget, what it may take before those that are left a share had theirs.
        first: whether nothing else runs before all of it is done; it may take the whole budget.
    """

    about: str
    least: float = 0.0
    most: float = 1.0
    first: bool = False


PARTS: Mapping[str, Part] = {
    "build": Part("the missing packages from WHEELS, and the extension", first=True),
    "tests": Part("every test that is marked gpu", most=0.375),
    "calls": Part("whole calls on resident tensors beside mergekit, torch eager and torch.compile", least=0.3),
    "kernels": Part("every kernel beside the copy bandwidth of the same run", least=0.15),
    "merges": Part("whole merges from disk to disk, cold and warm, one and two devices, the same bytes"),
    "tune": Part("elements per program and warps of the elementwise kernels"),
    "sanitize": Part("compute-sanitizer over the extension and a Triton kernel"),
}
"""Parts in the order in which they run; each is the module of that name, with a function ``items``."""


class Absent(Exception):
    """What an item needs is not on this machine. It is reported, and the rest runs."""


class Cut(Exception):
    """An item ended before its time did: the next call goes on with what it kept."""

    def __init__(self, reason: str, row: Row, kept: Any) -> None:
        """Keeps what it found so far, to be shown, and what the next turn has to know."""
        super().__init__(reason)
        self.row = row
        self.kept = kept


@dataclass(frozen=True, slots=True)
class Turn:
    """What an item that ends by itself is told.

    Attributes:
        seconds: that it has.
        kept: what an earlier turn of it kept, if there was one.
    """

    seconds: float
    kept: Any = None


@dataclass(frozen=True, slots=True)
class Context:
    """What every item may know.

    Attributes:
        dry: toy sizes on the CPU, in Triton's interpreter: proves that the code runs, measures nothing.
        wheels: folder of wheels for packages that the machine lacks.
        cache: where packages, the build, generated models and merged outputs go.
    """

    dry: bool
    wheels: str | None
    cache: str

    @property
    def site(self) -> Path:
        """Where missing packages are installed, one folder per Python."""
        return Path(self.cache) / f"site-{platform.python_version()}"

    @property
    def data(self) -> Path:
        """Where generated models and merged outputs go."""
        return Path(self.cache) / "data"

    def environment(self) -> dict[str, str]:
        """The environment of every process of the run."""
        env = dict(os.environ)
        paths = [str(ROOT), str(self.site), *filter(None, [env.get("PYTHONPATH")])]
        return {
            **env,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PATH": os.pathsep.join([str(self.site / "bin"), env.get("PATH", os.defpath)]),
            "TRITON_INTERPRET": "1" if self.dry else "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def to_json(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Context:
        """The inverse."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to do; its row is kept as soon as it is there.

    Attributes:
        name: unique in its part.
        run: does it, in a worker process, and returns what is to be shown.
        needs: seconds that it usually takes: with less left of the budget it is not begun.
        limit: seconds after which its process is killed.
        stops: whether ``run`` takes a :class:`Turn`, ends in time by :class:`Cut` and goes on in the next call.
    """

    name: str
    run: Callable[..., Row]
    needs: float = 15.0
    limit: float = 120.0
    stops: bool = False


def items(part: str, context: Context) -> Sequence[Item]:
    """The items of a part, in order."""
    found: Sequence[Item] = importlib.import_module(f"bench.gpu.{part}").items(context)
    return found
