"""Merges of tiny models of many architectures, loaded by transformers (``make conformance``; a few in ``make test``).

docs/architectures.md is the same, written as a table.
"""

import pytest
import torch

pytest.importorskip("transformers")

from tests.conformance.architectures import page
from tests.conformance.architectures.judge import MERGES, Family, judge
from tests.conformance.architectures.models import MODELS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of much

QUICK = {"qwen2", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "gemma3_vision", "t5", "mamba"}
"""Those that ``make test`` runs as well."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.conformance) for n in MODELS])
def test_architecture(name, tmp_path):
    family = Family(MODELS[name], tmp_path)
    merges = [m for m in MERGES if m != "depth" or MODELS[name].changes]
    assert {m: said for m in merges if (said := judge(family, m))} == {}


def test_the_page_has_every_architecture_and_all_are_right():
    rows = {
        line.split("|")[1].strip(" `"): line for line in page.PAGE.read_text().splitlines() if line.startswith("| `")
    }
    assert rows.keys() == MODELS.keys(), "python -m tests.conformance.architectures.page --write"
    for name, row in rows.items():
        cells = [cell.strip() for cell in row.split("|")[5:-1]]
        assert len(cells) == len(MERGES)
        assert set(cells) <= {page.RIGHT, page.NONE}, name
        assert (page.NONE in cells) == (not MODELS[name].changes), name
