"""Host memory in the place of a GPU's streams."""

import torch


class HostStreams:
    """Host memory in the place of a GPU: everything happens at once."""

    def __init__(self, free=1 << 40):
        """Pretends to have ``free`` bytes."""
        self._free = free

    def enter(self):
        """There is one stream."""

    def free(self):
        """As given."""
        return self._free

    def reserve(self, nbytes):
        """Ordinary memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def zeros(self, n):
        """Ordinary zeros."""
        return torch.zeros(n, dtype=torch.int64)

    def pin(self, buffer):
        """The buffer's memory."""
        offset = buffer.address - buffer.data.ctypes.data
        return torch.from_numpy(buffer.data[offset : offset + buffer.nbytes])

    def unpin(self, buffer):
        """Nothing was locked."""

    def h2d(self, there, here):
        """A copy."""
        there.copy_(here)

    def d2h(self, here, there, counters):
        """A copy."""
        here.copy_(there)
        return counters.numpy()

    def synchronize(self):
        """Nothing is under way."""
