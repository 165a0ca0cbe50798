"""Experts are found by names and shapes, whatever layout they are in."""

import pytest

from fastmerge.planning.experts import DOWN, GATE, UP, find, other
from tests.recipe.fakes import checkpoint

E, I, H = 4, 6, 10


def single(module="mlp.experts", leaves=("gate_proj", "up_proj", "down_proj"), *, layers=2, bias=False):
    out = {}
    for i in range(layers):
        for e in range(E):
            for leaf in leaves:
                shape = (H, I) if leaf == leaves[-1] else (I, H)
                out[f"model.layers.{i}.{module}.{e}.{leaf}.weight"] = shape
                if bias:
                    out[f"model.layers.{i}.{module}.{e}.{leaf}.bias"] = shape[:1]
    return out


def stacks(module="mlp.experts", names=("gate_up_proj", "down_proj"), *, layers=2, turned=False, bias=False, times=2):
    out = {}
    for i in range(layers):
        first, last = (E, times * I, H), (E, H, I)
        for name, shape in zip(names, (first, last), strict=True):
            out[f"model.layers.{i}.{module}.{name}"] = (shape[0], shape[2], shape[1]) if turned else shape
            if bias:
                out[f"model.layers.{i}.{module}.{name}_bias"] = shape[:2]
    return out


def found(shapes, **config):
    model = checkpoint(shapes, config=config)
    return find(model.tensors, model.config)


@pytest.mark.parametrize(
    ("shapes", "gated", "turned"),
    [
        (single(), True, False),
        (single("block_sparse_moe.experts", ("w1", "w3", "w2")), True, False),
        (single("feed_forward.experts", bias=True), True, False),
        (single("mixer.experts", ("up_proj", "down_proj")), False, False),
        (stacks(), True, False),
        (stacks(turned=True), True, True),
        (stacks(turned=True, bias=True), True, True),
        (stacks("block_sparse_moe", ("input_linear.weight", "output_linear.weight")), True, False),
        (stacks("mixer.experts", ("up_proj", "down_proj"), times=1), False, False),
    ],
)
def test_layouts(shapes, gated, turned):
    experts = found({"model.layers.0.mlp.gate.weight": (E, H), **shapes})
    assert [e.layer for e in experts] == ["model.layers.0", "model.layers.1"]
    one = experts[0]
    assert (one.number, one.inner, one.hidden) == (E, I, H)
    assert (one.spelling.gated, one.spelling.turned) == (gated, turned)
    assert sorted(n for e in experts for n in e.names) == sorted(shapes)


def test_roles():
    one = found(single("block_sparse_moe.experts", ("w1", "w3", "w2")))[0]
    names = [one.of(role, 3) for role in (GATE, UP, DOWN)]
    assert [n.removeprefix("model.layers.0.block_sparse_moe.experts.3.") for n in names] == [
        "w1.weight", "w3.weight", "w2.weight",
    ]  # fmt: skip


def test_rows_that_alternate():
    shapes = stacks(turned=True, bias=True)
    assert found(shapes, model_type="gpt_oss")[0].spelling.woven
    assert not found(shapes, model_type="openai_privacy_filter")[0].spelling.woven, "biases alone do not tell"
    assert found(shapes)[0].spelling.woven, "unless there is nothing else"
    assert not found(stacks(turned=True), model_type="llama4")[0].spelling.woven
    assert found(stacks(), text_config={"model_type": "gpt_oss"})[0].spelling.woven


@pytest.mark.parametrize(
    "broken",
    [
        {k: v for k, v in single().items() if "1.mlp.experts.2.up_proj" not in k},
        single() | {"model.layers.1.mlp.experts.3.up_proj.weight": (I + 1, H)},
        single() | {f"model.layers.1.mlp.experts.{e}.extra.weight": (I, H) for e in range(E)},
        stacks() | {"model.layers.1.mlp.experts.down_proj": (E, H, I + 1)},
        {k: v for k, v in stacks().items() if k != "model.layers.1.mlp.experts.down_proj"},
        stacks() | {"model.layers.1.mlp.experts.gate_up_proj_bias": (E, 2 * I)},
    ],
)
def test_what_is_not_whole_is_none(broken):
    assert [e.layer for e in found(broken)] == ["model.layers.0"]


def test_matrices_of_a_dense_layer_are_no_stacks():
    dense = {"model.layers.0.mlp.gate_up_proj.weight": (2 * I, H), "model.layers.0.mlp.down_proj.weight": (H, I)}
    assert found(dense) == []


@pytest.mark.parametrize(
    ("kind", "shapes", "fused", "path", "turned"),
    [
        ("mixtral", single("block_sparse_moe.experts", ("w1", "w3", "w2")), True, "mlp.experts", False),
        ("mixtral", stacks(), False, "block_sparse_moe.experts", False),
        ("qwen3_moe", stacks(), False, "mlp.experts", False),
        ("llama4_text", single("feed_forward.experts"), True, "feed_forward.experts", True),
        ("nemotron_h", single("mixer.experts", ("up_proj", "down_proj")), True, "mixer.experts", False),
    ],
)
def test_names_of_the_other_layout(kind, shapes, fused, path, turned):
    spelling = other(found(shapes, model_type=kind)[0].spelling, [kind], fused=fused)
    assert (spelling.path, spelling.turned, bool(spelling.stacks)) == (path, turned, fused)
