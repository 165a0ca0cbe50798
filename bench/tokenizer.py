"""The union of two vocabularies of 128,000 tokens, beside mergekit's embedding step, in one process.

    python bench/tokenizer.py [--tokens 128000] [--rounds 3]

Two models of one embedding each, bfloat16: 15/16 of the tokens are both's, the rest each its own. In the second model
the shared ones have the same numbers, or are shuffled. What both sides are timed for, on one thread each: the rows of
both models for every token of the union, as two tensors in memory. mergekit's step is ``PermutedVocabulary.execute``;
ours finds where each row comes from, and reads the files (in the page cache) into slots that are reused, as a merge
does. Which number a token has in which model is known to both. The rows are compared. The last line is the whole
plan: both tokenizer.json read, united and written anew, everything but the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from mergekit.common import ModelReference
from mergekit.tokenizer.embed import PermutedVocabulary
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import Checkpoint, Files
from fastmerge.ops.sources import FileRange
from fastmerge.planning import plan
from fastmerge.planning.rows import Models
from fastmerge.planning.vocabulary import Vocabulary, align
from fastmerge.recipe import Recipe
from fastmerge.runtime.stores import OpStore

if TYPE_CHECKING:
    from fastmerge.ops.sources import Made

NAME = "model.embed_tokens.weight"
SHARED = 15 / 16
"""Of the tokens."""


def vocabularies(n: int, *, shuffled: bool) -> list[dict[str, int]]:
    """Two, with the shared tokens at the same or at other numbers in the second."""
    common = int(n * SHARED)
    order = np.random.default_rng(0).permutation(n).tolist() if shuffled else list(range(n))
    second = [f"t{i}" for i in range(common)] + [f"b{i}" for i in range(n - common)]
    first = second[:common] + [f"a{i}" for i in range(n - common)]
    return [dict(zip(first, range(n), strict=True)), dict(zip(second, order, strict=True))]


def write(directory: Path, vocabulary: dict[str, int], hidden: int, seed: int) -> None:
    """A model that is an embedding and a tokenizer."""
    directory.mkdir()
    tree = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(vocabulary)}))
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(vocabulary), hidden, generator=g).to(torch.bfloat16)
    save_file({NAME: rows}, directory / "model.safetensors", metadata={"format": "pt"})


def union(tables: list[dict[str, int]]) -> dict[str, int]:
    """The first's tokens, then those that only the second has."""
    first, second = tables
    return {t: i for i, t in enumerate([*first, *(t for t in second if t not in first)])}


def theirs(tables: list[dict[str, int]], paths: list[Path]) -> Callable[[], list[torch.Tensor]]:
    """Mergekit's embedding step."""
    numbers = union(tables)
    refs = [ModelReference.parse(str(path)) for path in paths]
    permutations = {
        ref: {i: t.get(token, -1) for token, i in numbers.items()} for ref, t in zip(refs, tables, strict=True)
    }
    info: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: numbers), permutations=permutations)
    tensors = {ref: load_file(path / "model.safetensors")[NAME] for ref, path in zip(refs, paths, strict=True)}
    task: Any = PermutedVocabulary.model_construct(
        tokens=None, pad_to_multiple_of=None, base_model=refs[0], vocabulary_axis=0
    )
    return lambda: list(task.execute(tokenizer_info=info, tensors=tensors).values())


def ours(recipe: Recipe, tables: list[dict[str, int]], hidden: int) -> Callable[[], list[torch.Tensor]]:
    """The same of ours, from the numbers of the tokens on."""
    numbers = union(tables)
    checkpoints = {ref: Checkpoint.open(ref.path) for ref in recipe.refs}
    store = OpStore((), Files([*checkpoints.values()]))
    slots = [torch.empty(len(numbers), hidden, dtype=torch.bfloat16) for _ in tables]

    rows = dict.fromkeys(recipe.refs, len(tables[0]))
    own, there = align(numbers, dict(zip(recipe.refs, tables, strict=True)), rows)
    files = [FileRange(c.tensors[NAME], i) for i, c in enumerate(checkpoints.values())]

    def work() -> list[torch.Tensor]:
        vocabulary = Vocabulary(Models(checkpoints, {}), rows, own, there, len(there), {}, {})
        sources = vocabulary.sources(NAME, recipe.refs, [NAME] * 2, files, 0)
        for source, slot in zip(sources, slots, strict=True):
            cast("Made", source).fill(store.bring, 0, slot.numel(), slot.data_ptr())
        return slots

    return work


def best(rounds: int, *works: Callable[[], Any]) -> list[float]:
    """Seconds of each, the best of all rounds, alternated."""
    found = [float("inf")] * len(works)
    for _ in range(rounds):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            found[i] = min(found[i], time.perf_counter() - start)
    return found


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description="Union of two vocabularies, beside mergekit's embedding step.")
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    print(f"{args.tokens:,} tokens each      mergekit  fastmerge  times as fast")
    for hidden, shuffled in itertools.product((64, 256, 1024), (False, True)):
        with tempfile.TemporaryDirectory() as temporary:
            paths = [Path(temporary) / name for name in "ab"]
            tables = vocabularies(args.tokens, shuffled=shuffled)
            for seed, (path, table) in enumerate(zip(paths, tables, strict=True)):
                write(path, table, hidden, seed)
            models = ", ".join(f"{{model: {path}}}" for path in paths)
            recipe = Recipe.load(
                f"merge_method: linear\nmodels: [{models}]\nbase_model: {paths[0]}\n"
                "parameters: {weight: 0.5}\ntokenizer_source: union\n"
            )
            one, two = theirs(tables, paths), ours(recipe, tables, hidden)
            assert all(torch.equal(a, b) for a, b in zip(one(), two(), strict=True)), "the rows differ"
            slow, fast = best(args.rounds, one, two)
            order = "shuffled" if shuffled else "in order"
            print(f"{hidden:5} wide, {order:12} {slow:8.2f} s {fast:8.3f} s {slow / fast:8.0f}")
            planned = best(1, lambda recipe=recipe: plan(recipe))  # type: ignore[misc]
    print(f"the whole plan {planned[0]:.2f} s")


if __name__ == "__main__":
    main()
