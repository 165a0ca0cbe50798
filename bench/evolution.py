"""Evolution beside grids on the demo's specialists: ``python bench/evolution.py``.

Each searches the weights of the demo's three specialists (task arithmetic, 0 to 1.5 each) with the same number of
evaluations on the same validation questions, for each of three seeds. ``grid`` has evenly spaced weights for each
specialist, ``line`` one weight for all of them, evenly spaced as well. The questions of a seed are drawn by it, and so
is which of them are validation and which are held out; no model was trained on any. The score is the share of answers
that are entirely right. Exits with 1 when evolution stays behind a grid on the validation questions of a seed; what
the held-out ones say is printed, whatever it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from report import Row, provenance, save, table, unfit

from fastmerge.search import search
from fastmerge.search.evaluators import Accuracy

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from skills import DIGITS, SKILLS, lines
from train import fixture

HIGH = 1.5
"""The largest weight of a specialist."""


def questions(file: Path, count: int, seed: int) -> Path:
    """Writes ``count`` questions of each skill as prompts and completions."""
    with file.open("w") as out:
        for skill in SKILLS:
            for row in lines(skill, count, torch.Generator().manual_seed(10_000 + seed)).tolist():
                asked, answer = ("".join(map(str, row[i : i + DIGITS])) for i in (1, DIGITS + 2))
                line = {"prompt": f"{skill} {asked} =", "completion": f" {answer}", "category": skill}
                out.write(json.dumps(line) + "\n")
    return file


def space(models: Mapping[str, Path], *, together: bool = False) -> dict[str, Any]:
    """Task arithmetic with a gene for each specialist, or ``together`` with one gene for all."""
    gene = {"low": 0.0, "high": HIGH}
    rows = [{"model": str(models[s]), "parameters": {"weight": 1.0 if together else dict(gene)}} for s in SKILLS]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models["base"]), "models": rows, "dtype": "float32"}
    return recipe | {"parameters": {"lambda": gene}} if together else recipe


def ways(steps: int, population: int) -> dict[str, tuple[bool, dict[str, dict[str, int]]]]:
    """How each searches: whether with one gene, and the sampler."""
    return {
        "grid": (False, {"grid": {"steps": steps}}),
        "line": (True, {"grid": {"steps": steps**3}}),
        "genetic": (False, {"genetic": {"population_size": population}}),
        "cma": (False, {"cma": {"population_size": 8}}),
    }


def run(models: Mapping[str, Path], *, seeds: Sequence[int], steps: int, validation: int, held_out: int) -> list[Row]:
    """A row for each seed and way.

    Args:
        models: the base and the specialists.
        seeds: of the questions, their split and the samplers.
        steps: weights of the grid for each specialist; its cube is the number of evaluations of each way.
        validation: questions of each skill that choose.
        held_out: questions of each skill that judge.
    """
    from transformers import AutoModelForCausalLM

    rows: list[Row] = []
    budget, count = steps**3, validation + held_out
    live = AutoModelForCausalLM.from_pretrained(str(models["base"]), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            file = questions(Path(place) / f"{seed}.jsonl", count, seed)
            evaluate = Accuracy(file, models["base"], batch_size=256)
            for name, (together, sampler) in ways(steps, max(4, budget // 5)).items():
                found = search(
                    space(models, together=together),
                    evaluate,
                    model=live,
                    sampler=sampler,
                    budget=budget,
                    held_out=held_out / count,
                    baselines=name == "genetic",
                    seed=seed,
                )
                recipe = found.recipe
                scale = recipe.get("parameters", {}).get("lambda", 1.0)
                weights = [round(scale * m["parameters"]["weight"], 3) for m in recipe["models"]]
                shown = {"validation": percent(found.scores["score"]), "held out": percent(found.held_out["score"])}
                row = {"seed": seed, "way": name, "evaluations": len(found.evaluations), **shown}
                rows.append(row | {"weights": " ".join(map(str, weights))})
                for other, scores in found.baselines.items():
                    beside = {"validation": None, "held out": percent(scores["score"])}
                    rows.append({"seed": seed, "way": other, "evaluations": None, **beside, "weights": None})
    return rows


def percent(share: float | None) -> float:
    """A share of the questions in percent."""
    assert share is not None
    return round(100 * share, 2)


def behind(rows: Sequence[Row]) -> list[str]:
    """Where evolution found less than a grid on the validation questions."""
    found = {(row["seed"], row["way"]): row["validation"] for row in rows}
    return [
        f"seed {seed}: {way} {score} %, {grid} {found[seed, grid]} %"
        for (seed, way), score in found.items()
        if way in ("genetic", "cma")
        for grid in ("grid", "line")
        if score < found[seed, grid]
    ]


def main() -> int:
    """Prints the table, and keeps it where the machine and the tree are fit for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where the demo's models are kept [./.cache/demo]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5, help="weights of each specialist in the grid [5: 125 in all]")
    parser.add_argument("--validation", type=int, default=200, help="questions of each skill that choose")
    parser.add_argument("--held-out", type=int, default=1000, help="questions of each skill that judge")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    about = provenance()
    models = fixture(args.cache)
    rows = run(models, seeds=args.seeds, steps=args.steps, validation=args.validation, held_out=args.held_out)
    print(table(rows))
    failed = behind(rows)
    print("\n".join(failed) or "evolution is at least as good as the grids on the validation questions of every seed")
    if not args.no_save:
        print(unfit(about) or f"saved as {save('evolution', {'evolution': rows}, about)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
