"""The layout: pure, aligned, and readable by safetensors."""

from __future__ import annotations

import json
import sys

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import layout
from fastmerge.checkpoint.header import parse
from fastmerge.dtypes import BF16, BY_TAG, F32
from fastmerge.errors import OutputError


def faults(plan, tensors) -> list[str]:
    """Where shards do not parse to these tensors, lie unaligned, or places say other things than the headers."""
    found, seen = [], {}
    for number, shard in enumerate(plan.shards):
        header = parse(shard.header[8:], shard.data_start, shard.size - shard.data_start, where=shard.name)
        if shard.data_start % 4096 or header.metadata["format"] != "pt":
            found.append(f"{shard.name}: data from {shard.data_start} on, metadata {header.metadata}")
        if tuple(t.name for t in header.tensors) != shard.tensors:
            found.append(f"{shard.name}: {header.tensors}, want {shard.tensors}")
        for info in header.tensors:
            if plan.places[info.name] != (number, info.offset, info.nbytes) or info.offset % info.dtype.size:
                found.append(f"{info} of {shard.name} at {plan.places[info.name]}")
            seen[info.name] = (info.dtype, info.shape)
    return found if seen == tensors else [*found, f"{seen}, want {tensors}"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(BY_TAG.values())), st.lists(st.integers(0, 9), max_size=3)), max_size=20),
    st.integers(1, 3000),
)
def test_any_layout(entries, shard_size):
    # Types below a byte come in fours.
    tensors = {f"t{i}": (d, (*s, 4) if d.bits else tuple(s)) for i, (d, s) in enumerate(entries)}
    plan = layout([(n, d, s) for n, (d, s) in tensors.items()], shard_size=shard_size, metadata={"recipe": "{}"})
    assert faults(plan, tensors) == []
    for shard in plan.shards:
        content = shard.header + bytes(shard.size - shard.data_start)
        assert {n for n, _ in safetensors.deserialize(content)} == set(shard.tensors)
        data = shard.size - shard.data_start
        assert data <= shard_size or sum(plan.places[t].nbytes > 0 for t in shard.tensors) == 1
    assert plan.total == sum(s.size for s in plan.shards)


def test_names_index_and_order():
    plan = layout(
        [("h", BF16, (4,)), ("w", F32, (4,)), ("z", BF16, (4,)), ("big", F32, (100,)), ("last", BF16, (1,))],
        shard_size=40,
        metadata={},
    )
    assert [s.name for s in plan.shards] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [s.tensors for s in plan.shards] == [("w", "h", "z"), ("big",), ("last",)]
    index = json.loads(plan.index)
    assert index["metadata"]["total_size"] == 8 + 16 + 8 + 400 + 2
    assert index["weight_map"]["big"] == "model-00002-of-00003.safetensors"


def test_one_shard_has_no_index():
    plan = layout([("a", BF16, (4,))], shard_size=5e9, metadata={"k": "v"})
    assert [s.name for s in plan.shards] == ["model.safetensors"]
    assert plan.index is None
    assert layout([], shard_size=1, metadata={}).shards[0].tensors == ()


def test_equal_layouts_have_equal_digests():
    def digest(**kwargs):
        return layout([("a", BF16, (4,))], **({"shard_size": 10, "metadata": {}} | kwargs)).digest

    assert digest() == digest()
    assert digest(metadata={"k": "v"}) != digest()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([("a", BF16, (1,)), ("a", BF16, (1,))], "named twice: 'a'"),
        ([("", BF16, (1,))], "empty tensor name"),
        ([("a\n", BF16, (1,))], "control character"),
        ([("__metadata__", BF16, (1,))], "reserved"),
    ],
)
def test_refuses_names(tensors, said):
    with pytest.raises(OutputError, match=said):
        layout(tensors, shard_size=10, metadata={})


def test_refuses_shard_sizes_below_one_byte():
    with pytest.raises(OutputError, match="at least 1 byte"):
        layout([], shard_size=0, metadata={})


def test_refuses_a_header_that_no_reader_takes(monkeypatch):
    monkeypatch.setattr(sys.modules["fastmerge.checkpoint.layout"], "MAX_HEADER", 10_000)
    names = ((f"tensor.{i}", BF16, (1,)) for i in range(500))
    with pytest.raises(OutputError, match="lower the shard size"):
        layout(names, shard_size=10**9, metadata={})


def test_offsets_beyond_32_bits():
    plan = layout([("a", F32, (2**31 + 7,)), ("b", F32, (2**31 + 1,))], shard_size=1e12, metadata={})
    assert plan.places["b"].offset == plan.shards[0].data_start + 4 * (2**31 + 7)
    assert faults(plan, {"a": (F32, (2**31 + 7,)), "b": (F32, (2**31 + 1,))}) == []


def test_whole_blocks_come_first_and_start_at_blocks():
    tensors = {
        "norm": (BF16, (3,)),
        "a": (BF16, (64, 64)),
        "scale": (F32, (5,)),
        "b": (F32, (2, 1024)),
        "c": (BF16, (4096,)),
    }
    plan = layout([(n, *t) for n, t in tensors.items()], shard_size=1e9, metadata={})
    assert list(plan.places) == ["b", "a", "c", "scale", "norm"]
    assert all(plan.places[n].offset % 4096 == 0 for n in "abc")
    assert faults(plan, tensors) == []
