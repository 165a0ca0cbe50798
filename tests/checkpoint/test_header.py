"""The header parser: what it accepts, what it refuses, and safetensors as its oracle."""

from __future__ import annotations

import json
import random
from unittest import mock

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import header as headers
from fastmerge.checkpoint.header import Header, parse, read_header
from fastmerge.dtypes import BY_TAG
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import file_bytes, raw, tensor
from tests.counted import calls


def ours(content: bytes) -> Header:
    """The parser on a whole file in memory."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise CheckpointError("short")
    return parse(content[8 : 8 + length], 8 + length, len(content) - 8 - length, where="f")


Seen = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Type, shape and bytes of each tensor in a file."""


def accepted(content: bytes) -> Seen | None:
    """What we see in a file; None where we refuse it."""
    try:
        tensors = ours(content).tensors
    except CheckpointError:
        return None
    return {t.name: (t.dtype.tag, tuple(t.shape), content[t.offset : t.offset + t.nbytes]) for t in tensors}


def by_any_json(content: bytes) -> Seen | None:
    """The same without the short way for headers as programs write them."""
    with mock.patch.object(headers, "_usual", return_value=None):
        return accepted(content)


def theirs(content: bytes) -> Seen | None:
    """What safetensors sees in a file; None where it refuses it."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def entry(tag="U8", shape=(2,), offsets=(0, 2)) -> dict[str, object]:
    return {"dtype": tag, "shape": list(shape), "data_offsets": list(offsets)}


def test_accepts_every_dtype_scalars_and_empty_tensors():
    tensors = {f"t.{tag}": tensor(tag, 3, 4, seed=i) for i, tag in enumerate(BY_TAG)}
    tensors |= {"scalar": tensor("F32"), "empty": tensor("BF16", 0, 7), "größe": tensor("F16", 1)}
    content = file_bytes(tensors, {"format": "pt"})
    assert accepted(content) == theirs(content) == tensors
    header = ours(content)
    assert [t.name for t in header.tensors] == list(tensors)
    assert header.metadata == {"format": "pt"}


def test_accepts_a_file_without_tensors_trailing_spaces_and_misaligned_data():
    assert accepted(raw(b"{}")) == theirs(raw(b"{}")) == {}
    assert accepted(raw(b"{}" + b" " * 30)) == theirs(raw(b"{}" + b" " * 30)) == {}
    misaligned = {"a": tensor("U8", 3), "b": tensor("F32", 2)}
    assert accepted(file_bytes(misaligned)) == theirs(file_bytes(misaligned)) == misaligned


def test_accepts_entries_in_another_order_than_that_of_their_bytes():
    text = json.dumps({"b": entry(offsets=(2, 4)), "a": entry(), "c": entry(offsets=(4, 6))}, separators=(",", ":"))
    content = raw(text.encode(), b"abcdef")
    assert accepted(content) == theirs(content)
    assert [t.name for t in ours(content).tensors] == ["a", "b", "c"]
    for odd in (text.replace("},", "},,", 1), text.replace("},", "}", 1), "{," + text[1:], text[:-1] + ",}"):
        assert accepted(raw(odd.encode(), b"abcdef")) is None
        assert theirs(raw(odd.encode(), b"abcdef")) is None


BAD = {
    "hole": ({"a": entry(), "b": entry(offsets=(3, 5))}, 5, "hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(1, 3))}, 3, "overlaps"),
    "tail": ({"a": entry()}, 3, "expected 2 bytes of data, got 3"),
    "past the end": ({"a": entry()}, 1, "truncated"),
    "size": ({"a": entry(shape=(3,))}, 2, "takes 3 bytes"),
    "backwards": ({"a": entry(offsets=(2, 0))}, 2, "takes 2 bytes"),
    "overflow": ({"a": entry(shape=(2**32, 2**32))}, 2, "overflows"),
    "overflow by zero": ({"a": entry(shape=(2**62, 4, 0), offsets=(0, 0))}, 0, "overflows"),
    "huge size": ({"a": entry(shape=(2**64, 0), offsets=(0, 0))}, 0, "expected a shape"),
    "negative": ({"a": entry(shape=(-2,))}, 2, "expected a shape"),
    "bool size": ({"a": entry(shape=(True, 2))}, 2, "expected a shape"),
    "float size": ({"a": entry(shape=(2.0,))}, 2, "expected a shape"),
    "text size": ({"a": entry(shape=("x", 10**9))}, 2, "expected a shape"),
    "rank": ({"a": entry(shape=[1] * 65 + [2])}, 2, "expected a shape"),
    "dtype": ({"a": entry("F7")}, 2, "unknown dtype 'F7'"),
    "dtype list": ({"a": entry(["U8"])}, 2, "unknown dtype"),
    "one offset": ({"a": entry(offsets=(0,))}, 2, "data_offsets"),
    "bool offset": ({"a": entry(offsets=(False, 2))}, 2, "data_offsets"),
    "missing field": ({"a": {"dtype": "U8", "shape": [2]}}, 2, "expected the fields"),
    "unknown field": ({"a": entry() | {"strides": [1]}}, 2, "expected the fields"),
    "not an object": ({"a": [1]}, 2, "expected the fields"),
    "empty name": ({"": entry()}, 2, "empty tensor name"),
    "control": ({"a\u0000b": entry()}, 2, "control character"),
    "newline": ({"a\nb": entry()}, 2, "control character"),
    "C1 control": ({"a\u0085b": entry()}, 2, "control character"),
    "long name": ({"x" * 513: entry()}, 2, "513 bytes"),
    "long name in UTF-8": ({"é" * 257: entry()}, 2, "514 bytes"),
    "surrogate": ({"a\ud800": entry()}, 2, "not valid Unicode"),
    "metadata list": ({"__metadata__": ["a"]}, 0, "__metadata__"),
    "metadata number": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata surrogate": ({"__metadata__": {"a": "\ud800"}}, 0, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    header, nbytes, said = BAD[case]
    with pytest.raises(CheckpointError, match=said):
        ours(raw(json.dumps(header).encode(), bytes(nbytes)))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":1,"a":1}', "duplicate keys: 'a'"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "duplicate keys: 'dtype'"),
        (b'{"__metadata__":{"k":"1","k":"1"}}', "duplicate keys: 'k'"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "expected a shape"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "NaN is not JSON"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', "not valid"),
        (b"[]", "expected '{' first"),
        (b" {}", "expected '{' first"),
        (b"\xef\xbb\xbf{}", "not valid"),
        (b'{"\xff":1}', "not valid"),
        (b'{"a":' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a\tb":1}', "not valid"),
        (b"", "not valid"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9999999999999999999," * 99_999 + b'1],"data_offsets":[0,0]}}', "shape"),
    ],
)
def test_refuses_text(header, said):
    with pytest.raises(CheckpointError, match=said):
        ours(raw(header))


@pytest.mark.parametrize(
    ("tag", "shape", "nbytes", "said"),
    [
        ("F4", (3,), 2, "ends inside a byte"),
        ("F4", (1,), 0, "ends inside a byte"),
        ("F6_E2M3", (2,), 1, "ends inside a byte"),
        ("F4", (4,), 4, "takes 2 bytes"),
        ("F6_E3M2", (4,), 4, "takes 3 bytes"),
    ],
)
@pytest.mark.parametrize("compact", [True, False])
def test_types_below_a_byte_end_at_one(tag, shape, nbytes, said, compact):
    content = file_bytes({"a": (tag, shape, bytes(nbytes))}, compact=compact)
    assert theirs(content) is None
    with pytest.raises(CheckpointError, match=said):
        ours(content)


def test_a_range_that_runs_backwards_is_no_tensor_that_ends_inside_a_byte():
    text = b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[1,0]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert accepted(raw(text, b"x")) is None


@pytest.mark.parametrize("part", ['"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', '"t{}":{{}},"u{}":0'])
def test_a_header_of_endless_entries_is_refused_before_it_is_parsed(part, monkeypatch):
    monkeypatch.setattr(headers, "MAX_TENSORS", 100)
    monkeypatch.setattr(headers, "_MAX_VALUES", 800)
    text = ",".join(part.format(i, i) for i in range(1000))
    with pytest.raises(CheckpointError, match="expected at most (100|800)"):
        ours(raw(f"{{{text}}}".encode()))


def test_a_deeply_nested_entry_is_refused():
    with pytest.raises(CheckpointError, match="f: "):
        ours(raw(b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b"}}"))


def test_lists_all_problems_up_to_a_limit():
    header = {f"t{i}": entry("F7") for i in range(100)} | {"ok": entry()}
    with pytest.raises(CheckpointError) as caught:
        ours(raw(json.dumps(header).encode(), b"ab"))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "f: and 80 more problems"


tags = st.sampled_from([*BY_TAG, "F4", "f32", ""])
sizes = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**63, 2**64, True, 1.0, "1", None]))
odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=3)
)
names = st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=4))


@st.composite
def files(draw) -> bytes:
    """Files that are right, almost right, or cut and flipped at random."""
    header: dict[str, object] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.dictionaries(st.text(max_size=2), st.text(max_size=2)), odd))
    at = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        good = draw(st.integers(0, 9)) > 0
        shape = draw(st.lists(st.integers(0, 3) if good else sizes, max_size=3))
        tag = draw(st.sampled_from(list(BY_TAG)) if good else tags)
        nbytes = BY_TAG[tag].size if tag in BY_TAG else 1
        for d in shape:
            nbytes *= d if type(d) is int and 0 <= d < 5 else 1
        start = at if good else at + draw(st.integers(-2, 2))
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [start, start + nbytes]}
        if draw(st.integers(0, 19)) == 0:
            header[name] = draw(odd)
        at += nbytes
    separators = draw(st.sampled_from([None, (",", ":")]))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), separators=separators).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 2))
    content = bytearray(raw(text, bytes(i % 251 for i in range(at + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        where = draw(st.integers(0, len(content) - 1))
        content[where] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:-0123456789 \\.eE')))
    return bytes(content[: draw(st.sampled_from([None, None, None, 4, len(content) // 2]))])


@settings(max_examples=200, deadline=None)
@given(files())
@example(raw(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
@example(raw(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"x"))
@example(raw(b'{"__metadata__":null}'))
def test_fuzz_against_safetensors(content):
    seen = accepted(content)
    assert seen is None or seen == theirs(content)
    assert seen == by_any_json(content)


USUAL = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "header",
    [
        b"{," + USUAL + b"}",
        b"{" + USUAL + b",}",
        b"{" + USUAL + b"," + USUAL + b"}",
        b"{" + USUAL + b"}}",
        b"{" + USUAL + b"}\n ",
        b" {" + USUAL + b"}",
        b'{"__metadata__":{"k":"v"}' + USUAL + b"}",
        b'{"__metadata__":{"k":"1","k":"2"},' + USUAL + b"}",
        b'{"__metadata__":{"k":1},' + USUAL + b"}",
        b'{"__metadata__":{"k":{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}},' + USUAL + b"}",
        b'{"b":1,' + USUAL + b"}",
        b"{" + USUAL.replace(b"[1]", b"[01]") + b"}",
        b"{" + USUAL.replace(b"[1]", b"[1,]") + b"}",
        b"{" + USUAL.replace(b"[1]", b"[,1]") + b"}",
        b"{" + USUAL.replace(b"[0,1]", b"[00,1]") + b"}",
        b"{" + USUAL.replace(b"1", "\u0661".encode()) + b"}",
        b"{" + USUAL.replace(b"U8", b"U9") + b"}",
        b"{" + USUAL.replace(b"a", b"__metadata__", 1) + b"}",
        b"{" + USUAL.replace(b'"a"', b'""') + b"}",
        b"{" + USUAL.replace(b"[0,1]", b"[0,2]") + b"}",
    ],
)
def test_what_nearly_is_as_programs_write_it(header):
    content = raw(header, b"x")
    assert accepted(content) == by_any_json(content)
    assert accepted(content) in (None, theirs(content))


def test_mutated_files_against_safetensors():
    """Many more files than hypothesis can draw in the time: sound ones with random bytes changed."""
    rng = random.Random(1)
    sound = 0
    alphabet = b'{}[]",:-0123456789 \\.eEU8BF16'
    for i in range(4000):
        tensors = {
            rng.choice("abcé") * rng.randint(1, 3): tensor(
                rng.choice(list(BY_TAG)), *rng.choices((0, 1, 2, 3), k=rng.randint(0, 2)), rng.choice((0, 4))
            )
            for _ in range(rng.randint(0, 3))
        }
        metadata = {"k": "v"} if rng.random() < 0.3 else None
        content = bytearray(file_bytes(tensors, metadata, compact=i % 8 < 4))
        length = int.from_bytes(content[:8], "little")
        for _ in range(i % 4):
            end = 8 + length if rng.random() < 0.9 else len(content)
            content[rng.randrange(0 if rng.random() < 0.1 else 8, end)] = rng.choice(alphabet)
        seen = accepted(bytes(content))
        assert seen is None or seen == theirs(bytes(content)), bytes(content)
        assert seen == by_any_json(bytes(content)), bytes(content)
        sound += seen is not None
    assert 1000 < sound < 3000


def test_read_header(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"a": tensor("BF16", 4, 2)}))
    header = read_header(path, file=3)
    info = path.stat()
    assert header.identity == (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    assert header.tensors[0].file == 3
    assert header.tensors[0].offset + header.tensors[0].nbytes == header.size == info.st_size
    assert len(header.digest) == 64


def test_a_hundred_thousand_tensors_cost_no_python_each():
    rows = ",".join(
        f'"model.layers.{i}.mlp.weight":{{"dtype":"BF16","shape":[8,16],"data_offsets":[{256 * i},{256 * i + 256}]}}'
        for i in range(100_000)
    )
    text = ("{" + rows + "}").encode()
    assert len(parse(text, 0, 256 * 100_000, where="f").tensors) == 100_000
    assert calls(parse, text, 0, 256 * 100_000, where="f") < 200  # about 70, as for ten
