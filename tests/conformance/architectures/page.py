"""The table of docs/architectures.md: every architecture of :mod:`tests.conformance.architectures.models`, merged.

python -m tests.conformance.architectures.page            # prints it
python -m tests.conformance.architectures.page --write    # and writes the page
"""

import argparse
import datetime as dt
import importlib.metadata
import logging
import tempfile
import warnings
from pathlib import Path

from safetensors import safe_open

from tests.conformance.architectures.judge import MERGES, Family, judge
from tests.conformance.architectures.models import MODELS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "architectures.md"
RIGHT, NONE = "✓", "-"

HEAD = """# Merges of {count} architectures

Written by `python -m tests.conformance.architectures.page --write` on {date}, with fastmerge {fastmerge},
transformers {transformers}, torch {torch}.

Every row is a tiny random model, a base and two fine-tunes of it, made and saved by transformers. ✓: transformers loads
the output without a missing, an unexpected or a mismatched tensor; every tensor and all logits are those of the same
merge computed by hand in fp64 (differences up to 1e-5 of the largest value: the output is rounded to float32 once); and
`generate` runs where the model can. No architecture has code of its own in fastmerge.

- *linear*: the mean of both fine-tunes. *ties*: TIES of both on the base, half of each delta kept.
- *depth*: layers 0 to 2 and 1 to 3 of the first fine-tune on each other, so that every layer after the third moves; by
  hand, the layer objects of the loaded model are put in that order. Jamba: 0 and 1, then 0 to 3, as
  its periods say no other order. -: two stacks of layers, of which `modules` names one.
- *other fine-tune*, *other base*: task arithmetic, where one fine-tune, or the base, has the names and shapes that the
  model has in memory in transformers 5 (`save_original_format=False`, or a raw state dict): fused experts and other
  prefixes. Where those are the same, it has the prefix that `torch.compile` leaves (`_orig_mod.`).
- *tensors*: in the file; *renamed*: those of another name or shape in the other layout.

| architecture | kind | tensors | renamed | {merges} |
|---|---|---|---|{lines}|
"""


def headers(path):
    """Names and shapes of a file."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return {(n, tuple(file.get_slice(n).get_shape())) for n in file.keys()}  # noqa: SIM118  it is no mapping


def row(name, home):
    """One line of the table."""
    model = MODELS[name]
    family = Family(model, home)
    cells = []
    for merge in MERGES:
        wrong = judge(family, merge) if merge != "depth" or model.changes else NONE
        cells.append(wrong or RIGHT)
    mine, other = headers(home / "base"), headers(family.other("base", family.states[0]))
    return f"| `{name}` | {model.group} | {len(mine)} | {len(mine - other)} | {' | '.join(cells)} |"


def main():
    """Prints the page, and writes it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    versions = {n: importlib.metadata.version(n) for n in ("fastmerge", "transformers", "torch")}
    text = HEAD.format(
        count=len(MODELS),
        date=dt.datetime.now(tz=dt.UTC).date(),
        merges=" | ".join(MERGES),
        lines="|".join("---" for _ in MERGES),
        **{n: v.partition("+")[0] for n, v in versions.items()},
    )
    for name in MODELS:
        with tempfile.TemporaryDirectory() as home:
            text += row(name, Path(home)) + "\n"
            print(text.splitlines()[-1], flush=True)
    if options.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
