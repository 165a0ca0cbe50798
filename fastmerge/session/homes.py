"""The GPUs of a session: which tensor lies on which, and copies of those that an op needs from another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import BudgetError
from fastmerge.ops.sources import Memory, Result
from fastmerge.ops.spec import Op
from fastmerge.runtime.devices.cuda import out_of_memory
from fastmerge.runtime.resident import current
from fastmerge.sizes import available, show_bytes

if TYPE_CHECKING:
    import torch

    from fastmerge.backends.choose import Backend


@dataclass(frozen=True, eq=False)
class Home:
    """One GPU.

    Attributes:
        name: ``cuda:0``.
        backend: of its kernels; ``home`` is what torch calls the device.
    """

    name: str
    backend: Backend

    def current(self) -> AbstractContextManager[Any]:
        """Makes it the current device meanwhile."""
        return current(self.backend.home)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The same, with its errors as fastmerge's own.

        Raises:
            BudgetError: where the kernels' temporaries find no room.
        """
        try:
            with self.current():
                yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise BudgetError(
                f"{self.name}: no room for the kernels' temporaries beside the session's models"
            ) from None

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies there."""
        return str(tensor.device) == self.backend.home

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor there.

        Raises:
            BudgetError: if it has no room.
        """
        import torch

        try:
            return torch.empty(tuple(shape), dtype=dtype, device=self.backend.home)
        except torch.OutOfMemoryError:
            nbytes = math.prod(shape) * dtype.itemsize
            raise BudgetError(f"{self.name}: {show_bytes(nbytes)} more do not fit in its memory") from None

    def wait(self) -> None:
        """Until it has done everything."""
        if self.backend.home.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.backend.home)

    def free(self) -> int:
        """Bytes that can be had."""
        import torch

        if not self.backend.home.startswith("cuda"):
            return available()
        return int(torch.cuda.mem_get_info(self.backend.home)[0])


class Homes:
    """The tensors of a session on its GPUs.

    All tensors of one name lie on one GPU; each new name goes to the GPU that has the fewest bytes.

    Args:
        homes: the GPUs, at least one.
    """

    def __init__(self, homes: Sequence[Home]) -> None:
        self.all = tuple(homes)
        self._held: list[torch.Tensor] = []
        self._where: dict[int, int] = {}
        self._names: dict[str, int] = {}
        self._bytes = [0] * len(self.all)
        self._copies: dict[tuple[Memory, int], Memory] = {}

    def __len__(self) -> int:
        return len(self.all)

    @property
    def fewest(self) -> int:
        """The GPU with the fewest bytes."""
        return self._bytes.index(min(self._bytes))

    def place(self, name: str, home: int | None = None) -> int:
        """The GPU of the tensors of a name; ``home`` for a name of which one is there already."""
        return self._names.setdefault(name, self.fewest if home is None else home)

    def of_tensor(self, tensor: torch.Tensor) -> int | None:
        """The GPU that a tensor lies on, if it is one of the session's."""
        return next((i for i, home in enumerate(self.all) if home.has(tensor)), None)

    def of(self, op: Op) -> int:
        """The GPU that has most of what an op reads."""
        shares = [0] * len(self.all)
        for source in op.inputs:
            at = self.of(source.op) if type(source) is Result else self._where.get(getattr(source, "address", 0), 0)
            shares[at] += source.dtype.size
        return shares.index(max(shares))

    def keep(self, tensor: torch.Tensor, dtype: DType, shape: Sequence[int], home: int) -> Memory:
        """A tensor that lies on a GPU, for as long as the session lives."""
        self._held.append(tensor)
        self._where[tensor.data_ptr()] = home
        self._bytes[home] += dtype.nbytes(math.prod(shape))
        return Memory(tensor.data_ptr(), dtype, tuple(shape))

    def bring(self, source: torch.Tensor, dtype: DType, shape: Sequence[int], home: int) -> Memory:
        """A copy of a contiguous tensor, for as long as the session lives; it is there for every stream."""
        there = self.all[home].new(source.shape, source.dtype)
        there.copy_(source)
        self.all[home].wait()
        return self.keep(there, dtype, shape, home)

    def together(self, op: Op) -> Op:
        """The same op with inputs on one GPU: what others have is copied there once."""
        home = self.of(op)
        return op._replace(inputs=tuple([self._near(s, home) if type(s) is Memory else s for s in op.inputs]))

    def _near(self, source: Memory, home: int) -> Memory:
        if self._where.get(source.address, home) == home:
            return source
        if (source, home) not in self._copies:
            flat = self.flat(source, self._where[source.address])
            self._copies[source, home] = self.bring(flat, source.dtype, source.shape, home)
        return self._copies[source, home]

    def flat(self, memory: Memory, home: int) -> torch.Tensor:
        """The bytes of a tensor on a GPU."""
        return flat(memory, self.all[home].backend.home)

    def same(self, one: Memory, other: Memory) -> bool:
        """Whether two tensors of one op have the same bytes; waits."""
        import torch

        home = self._where.get(one.address, 0)
        return bool(torch.equal(self.flat(one, home), self.flat(other, home)))

    def free(self) -> int:
        """Bytes that can be had on all of them."""
        return sum([home.free() for home in self.all])

    def close(self) -> None:
        """Gives all memory back."""
        for owned in (self._held, self._where, self._names, self._copies):
            owned.clear()


def flat(memory: Memory, device: str) -> torch.Tensor:
    """The bytes of a tensor that is somewhere, as a tensor."""
    from fastmerge.backends.reference import borrow

    return borrow(memory.address, memory.dtype.nbytes(math.prod(memory.shape)), BY_NAME["uint8"], device)


def homes_of(backend: Backend) -> Homes:
    """The GPUs of a backend, each once."""
    return Homes(
        [Home(f"cuda:{i}", replace(backend, gpus=(i,), home=f"cuda:{i}")) for i in dict.fromkeys(backend.gpus)]
    )
