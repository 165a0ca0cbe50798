"""mergekit 0.1.5 in this process: as it is, and as the fp64 evaluation that both are judged against.

What no implementation can agree on is made equal: random masks are those of fastmerge, drawn from the output's name
and the model's position, and elements that tie are taken lowest index first. All arithmetic stays mergekit's.
"""

import contextlib
import logging
import warnings
from unittest.mock import patch

import torch
import yaml

from fastmerge.keys import tensor_key
from fastmerge.philox import DROP, u16

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import config as mk_config
    from mergekit import merge as mk_merge
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge_methods import generalized_task_arithmetic as deltas
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.options import MergeOptions
    from mergekit.scripts import multimerge


class Draws:
    """Which tensor is being merged, and which of its models comes next."""

    name, model = "", -1

    def start(self, name):
        self.name, self.model = name, -1


@contextlib.contextmanager
def aligned(seed=0):
    """mergekit with fastmerge's random numbers and its rule for ties; gives what has to know the tensor's name."""
    draws, sort, sparsify, execute = Draws(), torch.sort, deltas.sparsify, ExecuteMergeMethodTask.execute

    def named(task, tensors, **kwargs):
        draws.start(task.output_weight.name)
        return execute(task, tensors, **kwargs)

    def next_model(*args, **kwargs):
        draws.model += 1
        return sparsify(*args, **kwargs)

    def bernoulli(p):
        random = torch.from_numpy(u16(tensor_key(seed, draws.name), draws.model, DROP, 0, p.numel()).astype("int64"))
        return (random.reshape(p.shape) < (p.double() * 65536 + 0.5).floor().clamp(min=1)).to(p.dtype)

    def stable(x, dim=-1, descending=False):
        return sort(x, dim=dim, descending=descending, stable=True)[1]

    def from_the_top(x, dim=-1, *, descending=False):
        indices = stable(x, dim, descending=True)
        indices = indices if descending else indices.flip(dim)
        return torch.return_types.sort((x.gather(dim, indices), indices))

    def largest(x, k, dim=-1, **_):
        indices = stable(x.float(), dim, descending=True)  # in fp64, variances that are equal differ by rounding
        return x.gather(dim, indices).narrow(dim, 0, k), indices.narrow(dim, 0, k)

    with (
        patch.object(ExecuteMergeMethodTask, "execute", named),
        patch.object(deltas, "sparsify", next_model),
        patch.object(torch, "bernoulli", bernoulli),
        patch.object(torch, "sort", from_the_top),
        patch.object(torch, "argsort", stable),
        patch.object(torch, "topk", largest),
        patch.object(mk_config.MergeConfiguration, "referenced_models", in_order(mk_config.MergeConfiguration)),
    ):
        yield draws


def in_order(cls):
    """The models that a recipe names in one order: mergekit's own is that of a set, which changes from run to run."""
    named = cls.referenced_models
    return lambda self: sorted(named(self), key=str)


def stored(document, count):
    """The type of what an exact merge writes: fp64, or that of the recipe where others read the result."""
    return document.get("out_dtype") or document["dtype"] if "name" in document and count > 1 else "float64"


def merge(text, out, *, exact=False):
    """Merges a recipe, of one document or several; ``exact`` in fp64, stages stored in their own type."""
    logging.getLogger("mergekit").setLevel(logging.ERROR)
    LoaderCache().loaders.clear()  # it is one for the process, and keeps what an adapter gave in another type
    documents = list(yaml.safe_load_all(text))
    if exact:
        documents = [{**d, "dtype": "float64", "out_dtype": stored(d, len(documents))} for d in documents]
    options = MergeOptions(
        lora_merge_cache=str(out.with_name(f"{out.name}-lora")),
        lora_merge_dtype="float64" if exact else None,
        quiet=True,
        clone_tensors=True,
    )
    with warnings.catch_warnings(), aligned():
        warnings.simplefilter("ignore")
        if len(documents) == 1:
            documents[0].pop("name", None)
            mk_merge.run_merge(mk_config.MergeConfiguration.model_validate(documents[0]), str(out), options)
            return
        stages = out.with_name(f"{out.name}-stages")
        stages.mkdir()
        configs, needed = multimerge.load_config(yaml.safe_dump_all(documents), str(stages))
        tasks = multimerge.make_tasks(configs, needed, options, str(stages), str(out), False)
        multimerge.Executor(tasks, math_device="cpu", storage_device="cpu").execute(desc="merging")
