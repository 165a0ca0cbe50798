"""What the tests of sessions share: a family on disk, recipes as mappings, and the merge on disk to compare with."""

import itertools

import torch

import fastmerge as fm
from tests.api.test_merge import load

COUNT = itertools.count()


def recipe(paths, method, *, base=None, names=("a", "b", "c"), dtype="bfloat16", extra=None, **per_model):
    """A recipe as a mapping; a value of ``per_model`` is that of all models, or a list of one for each."""
    models = []
    for i, name in enumerate(names):
        values = {k: v[i] if isinstance(v, list) else v for k, v in per_model.items()}
        models.append({"model": str(paths[name]), "parameters": values})
    out = {"merge_method": method, "models": models, **({"dtype": dtype} if dtype else {})}
    if base:
        out["base_model"] = str(paths[base])
    return {**out, **(extra or {})}


def merged(document, directory, **options):
    """The tensors of the merge on disk."""
    out = directory / f"out-{next(COUNT)}"
    fm.merge(document, out, **options)
    return load(out)


def different(got, expected):
    """Names of tensors that are not there, or whose types or bytes differ."""
    wrong = sorted(got.keys() ^ expected.keys())
    for name in got.keys() & expected.keys():
        a, b = got[name].detach(), expected[name]
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            wrong.append(name)
    return wrong
