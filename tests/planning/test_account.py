"""What becomes of every tensor of every model."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import ShapeError
from fastmerge.ops.sources import FileRange
from tests.planning.plans import LINEAR, SLERP, STOCK, TIES, by_name, make, method_of, models_of
from tests.recipe.fakes import checkpoint, llama

COPY = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"


def everything(made):
    """Whether the account has every tensor of every model, once."""
    found = made.account.models
    return {ref: set(t) for ref, t in found.items()} == {
        str(ref): set(c.tensors) for ref, c in zip(made.recipe.refs, made.checkpoints, strict=True)
    }


@pytest.mark.parametrize("text", [LINEAR, TIES, SLERP, STOCK], ids=["linear", "ties", "slerp", "model_stock"])
def test_tensors_that_are_merged(text):
    made = make(text, base=llama(), a=llama(), b=llama())
    assert everything(made)
    assert all(counts == {"merged": 15} for counts in made.account.counts().values())


def test_tensors_that_are_left_out():
    extra = {"v_head.summary.weight": (8,), "rotary_emb.inv_freq": (4,)}
    ids = {"ids": ("int64", (4,))}
    made = make(LINEAR, a=llama(extra=ids), b=llama(extra=ids | extra))
    assert everything(made)
    assert made.account.counts()["b"] == {
        "merged": 15,
        "copied": 1,
        "dropped: a value head, which is no part of the model": 1,
        "dropped: a buffer that models make for themselves": 1,
    }
    assert json.loads(json.dumps(made.summary()))["account"] == made.account.counts()
    assert made.account.names()["b"]["dropped: a value head, which is no part of the model"] == [
        "v_head.summary.weight"
    ]


def test_layers_that_no_slice_takes():
    made = make(COPY, a=llama(4))
    assert everything(made)
    assert made.account.counts()["a"] == {"copied": 9, "dropped: not asked for by the recipe": 6}


def test_a_base_that_gives_its_configuration_alone():
    text = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.25}\n"
    made = make(text, base=llama(), a=llama(), b=llama())
    assert everything(made)
    assert made.account.counts()["base"] == {"dropped: not asked for by the recipe": 15}


def test_names_are_those_of_the_files():
    kept = {f"module.{n}": i.shape for n, i in llama().tensors.items()}
    made = make(TIES, base=llama(), a=checkpoint(kept), b=llama())
    assert everything(made)
    assert made.account.models["a"]["module.model.norm.weight"] == "merged"


@pytest.fixture
def counted(tmp_path):
    def write(name, count):
        (tmp_path / name).mkdir()
        tensors = {"bn.weight": np.ones(4, np.float32), "bn.num_batches_tracked": np.array(count, np.int64)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        return Checkpoint.open(tmp_path / name)

    return write


@pytest.mark.parametrize("text", [LINEAR, TIES, SLERP], ids=["linear", "ties", "slerp"])
def test_counters_that_differ_are_those_of_the_reference(counted, text):
    models = {n: counted(n, i) for i, n in enumerate(("base", "a", "b"))}
    made = make(text, **models)
    out = by_name(made)["bn.num_batches_tracked"]
    first = made.checkpoints[0]
    assert (models_of(out), out.inputs, method_of(out)) == (
        (0,),
        (FileRange(first.tensors["bn.num_batches_tracked"], 0),),
        None,
    )
    assert any("bn.num_batches_tracked: taken from" in w for w in made.warnings)
    assert everything(made)


def test_counters_that_agree_are_compared_as_ever(counted):
    models = {n: counted(n, 7) for n in ("a", "b")}
    made = make(LINEAR, **models)
    assert models_of(by_name(made)["bn.num_batches_tracked"]) == (0, 1)
    assert made.warnings == ()


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_buffers_of_different_length_are_those_of_the_reference(kind):
    a, b = (llama(extra={"x.position_ids": (kind, (1, n))}) for n in (4, 8))
    made = make(TIES + "dtype: float32\n", base=b, a=a, b=a)
    assert (by_name(made)["x.position_ids"].spec.shape, models_of(by_name(made)["x.position_ids"])) == ((1, 8), (0,))


def empty(model):
    tensors = {n: (0,) if "proj" in n or "embed" in n else i.shape for n, i in model.tensors.items()}
    return checkpoint(tensors, config=dict(model.config))


def test_empty_tensors_are_no_other_vocabulary():
    for models in ({"a": empty(llama()), "b": llama()}, {"a": llama(), "b": empty(llama())}):
        with pytest.raises(ShapeError) as e:
            make(LINEAR, **models)
        (only,) = e.value.problems
        assert "(9 tensors): empty tensors, as DeepSpeed's ZeRO-3 saves them without gathering" in only
        assert "vocabular" not in only


def test_an_empty_model_is_not_copied():
    with pytest.raises(Exception, match="ZeRO-3"):
        make("merge_method: passthrough\nmodels: [{model: a}]\n", a=empty(llama()))


def test_shapes_of_one_kind_are_one_line():
    with pytest.raises(ShapeError) as e:
        make(LINEAR, a=llama(9), b=llama(9, hidden=16))
    assert len(e.value.problems) == 4
    with pytest.raises(ShapeError) as e:
        make(LINEAR, a=llama(extra={"score.weight": (3000, 8)}), b=llama(extra={"score.weight": (2000, 8)}))
    assert e.value.problems == ["score.weight: shapes differ: 'a' [3000, 8], 'b' [2000, 8]"]
