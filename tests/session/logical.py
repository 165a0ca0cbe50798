"""Logical GPUs: Triton's interpreter on host memory, with books of what lies on which of them."""

from dataclasses import dataclass, field, replace

from fastmerge.backends.choose import Backend
from fastmerge.kernels import TritonKernels, _call
from fastmerge.session import session
from fastmerge.session.homes import Home, Homes


@dataclass(frozen=True, eq=False)
class Logical(Home):
    """A GPU of host memory: what it made lies there."""

    made: dict = field(default_factory=dict)

    def has(self, tensor):
        return self.made.get(tensor.data_ptr()) is not None

    def new(self, shape, dtype):
        tensor = super().new(shape, dtype).fill_(77)
        self.made[tensor.data_ptr()] = tensor.untyped_storage()
        return tensor


def pretend(monkeypatch, count):
    """Makes ``device="cuda..."`` so many logical GPUs; gives those of each session as it is opened."""
    whole, opened = session.choose, []

    def choose(device, name, **said):
        if not device.startswith("cuda"):
            return whole(device, name, **said)
        return Backend("triton", TritonKernels("cpu"), tuple(range(count)))

    def homes_of(backend):
        opened.append([Logical(f"cuda:{i}", replace(backend, gpus=(i,), home="cpu")) for i in backend.gpus])
        return Homes(opened[-1])

    monkeypatch.setattr(session, "choose", choose)
    monkeypatch.setattr(session, "homes_of", homes_of)
    return opened


def log(monkeypatch):
    """The names of the kernels that are launched from now on; ``bind``, ``send`` and ``bring`` between them."""
    seen = []
    runner, bind, send, bring = _call.Gpu.runner, _call.Call._bind, _call.Gpu.send, _call.Gpu.bring

    def noted(self, launch):
        run = runner(self, launch)
        name = launch.kernel.fn.__name__.removesuffix("_kernel")
        return lambda *args, **named: seen.append(name) or run(*args, **named)

    monkeypatch.setattr(_call.Gpu, "runner", noted)
    monkeypatch.setattr(_call.Call, "_bind", lambda self: seen.append("bind") or bind(self))
    monkeypatch.setattr(_call.Gpu, "send", lambda self, *args: seen.append("send") or send(self, *args))
    monkeypatch.setattr(_call.Gpu, "bring", lambda self, *args: seen.append("bring") or bring(self, *args))
    return seen
