"""The demo: train a base and three specialists, merge them in six ways, show who knows what.

    python demo/run.py [--cache DIR]

Everything is real and runs here: small Llama checkpoints in Hugging Face's layout (about a minute to train
on two cores, then cached), recipes in YAML, ``fastmerge merge`` as a user would call it, and accuracies
measured on 2,000 fixed questions per skill, which no model was trained on. Weights and densities in the
recipes were picked by such scores, so they flatter the merges a little. Exits with 1 when no merge keeps all
three skills.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from skills import SKILLS, accuracy, complete
from train import fixture
from transformers.utils import logging

KEPT = 0.8
"""A merge holds a skill when it answers at least this share of the questions."""


def recipes(models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The merges of the demo as recipes in mergekit's YAML grammar, by name of method."""
    base = str(models["base"])

    def each(names: Sequence[str] = tuple(SKILLS), **parameters: float) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"model": str(models[name])} for name in names]
        return [{**row, "parameters": parameters} for row in rows] if parameters else rows

    first, second = list(SKILLS)[:2]
    return {
        "linear": {"models": each(weight=1.0)},
        "slerp": {"models": each((first, second)), "base_model": str(models[first]), "parameters": {"t": 0.5}},
        "task_arithmetic": {"models": each(weight=0.65), "base_model": base},
        "ties": {"models": each(weight=1.0, density=0.2), "base_model": base, "parameters": {"lambda": 1.25}},
        "dare_ties": {"models": each(weight=0.65, density=0.8), "base_model": base},
        "model_stock": {"models": each(), "base_model": base},
    }


def merge(recipe: Path, out: Path) -> float:
    """Runs ``fastmerge merge`` in a process of its own and returns its wall time in seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fastmerge", "merge", str(recipe), str(out), "--overwrite", "--quiet"]
    subprocess.run([*command, "--device", "cpu"], check=True)
    return time.perf_counter() - start


def row(name: str, scores: Mapping[str, float], note: str = "") -> str:
    """One line of the table."""
    cells = "".join(f"{scores[skill]:>9.1%}" for skill in SKILLS)
    return f"{name:<28}{cells}{sum(scores.values()) / len(scores):>9.1%}   {note}".rstrip()


def main() -> int:
    """Prints the table; the exit status says whether some merge kept all three skills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where models and merges are kept [./.cache/demo]")
    home = (parser.parse_args().cache or Path(os.environ.get("FASTMERGE_DEMO_CACHE", ".cache/demo"))).resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    print(f"A base and three specialists, below {home} (about a minute where they are not there yet)")
    start = time.perf_counter()
    models = fixture(home)
    print(f"ready after {time.perf_counter() - start:.0f} s\n")

    print(f"{'answers entirely right':<28}" + "".join(f"{skill:>9}" for skill in SKILLS) + "     mean")
    for name, directory in models.items():
        print(row("base" if name == "base" else f"specialist: {name}", accuracy(directory)), flush=True)
    print()
    best, best_dir = 0.0, None
    for name, recipe in recipes(models).items():
        text, out = home / "recipes" / f"{name}.yml", home / "merged" / name
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(yaml.safe_dump({"merge_method": name, **recipe, "dtype": "bfloat16"}, sort_keys=False))
        out.parent.mkdir(parents=True, exist_ok=True)
        seconds = merge(text, out)
        scores = accuracy(out)
        note = f"merged in {seconds:.2f} s" + (" (two models)" if len(recipe["models"]) == 2 else "")
        print(row(f"merge: {name}", scores, note), flush=True)
        if min(scores.values()) > best:
            best, best_dir = min(scores.values()), out

    if best < KEPT or best_dir is None:
        print(f"\nNo merge kept all three skills at {KEPT:.0%}.")
        return 1
    print(f"\n{best_dir.name} holds all three skills: at least {best:.1%} on each. It writes")
    prompts = [f"{skill} 314159 =" for skill in SKILLS]
    for prompt, answer in zip(prompts, complete(best_dir, prompts), strict=True):
        print(f"  {prompt} {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
