"""The bytes of merges are those that were recorded; `python bench/bytes.py` compares all of them."""

import itertools
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastmerge._native", reason="the extension is not built")

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import bytes as merges

RECORDED = BENCH / "results/bytes-1d9f8df.txt"
SINCE = BENCH / "results/bytes-since.txt"


def test_every_23rd_merge_gives_the_recorded_bytes(tmp_path):
    recorded = merges.recorded(RECORDED, SINCE)
    some = itertools.islice(merges.cases(tmp_path), 0, None, 23)
    found = {name: merges.result(name, work) for name, work in some}
    assert found == dict(itertools.islice(recorded.items(), 0, None, 23))


def test_the_list_holds_every_case_once(tmp_path):
    recorded = merges.recorded(RECORDED)
    assert [name for name, _ in merges.cases(tmp_path)] == list(recorded)
    assert len(recorded) == len(RECORDED.read_text().splitlines())
    assert merges.recorded(SINCE).keys() < recorded.keys()
