"""Tensors that some models lack, parameters, and what is refused."""

import pytest

from fastmerge.errors import CheckpointError, RecipeError
from tests.planning.plans import LINEAR, SLERP, STOCK, TIES, by_name, make, method_of, models_of, names, tensors_of
from tests.recipe.fakes import checkpoint, llama


def without(model, *parts):
    kept = {n: (i.dtype.name, i.shape) for n, i in model.tensors.items() if not any(p in n for p in parts)}
    return checkpoint(kept, config=dict(model.config))


def lacking(text, **models):
    """The only problem of a merge that lacks tensors."""
    with pytest.raises(CheckpointError) as e:
        make(text, **models)
    (only,) = e.value.problems
    return only


class TestRequired:
    """What every model must have, whatever the method is."""

    COPY = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {m}, layer_range: [0, 4]}}]\n" for m in "ab"
    )

    @pytest.mark.parametrize("text", [LINEAR, TIES, SLERP, STOCK], ids=["linear", "ties", "slerp", "model_stock"])
    @pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj", "model.norm", "embed_tokens", "q_proj"])
    def test_a_lost_tensor_is_an_error(self, text, name):
        models = {"base": llama(), "a": llama(), "b": without(llama(), name)}
        said = lacking(text, **models)
        assert name in said.replace("layers.*", "layers.1")
        assert "missing from 'b'" in said

    @pytest.mark.parametrize("lost", [("a", "b"), ("b", "a")])
    def test_a_layer_of_a_slice_that_lost_one(self, lost):
        broken, fine = lost
        models = {broken: without(llama(), "layers.2.self_attn.q_proj"), fine: llama()}
        said = lacking(self.COPY, **models)
        assert f"'{broken}' lacks model.layers.2.self_attn.q_proj.weight" in said

    def test_a_layer_of_a_lone_model_that_lost_one(self):
        copy = "merge_method: passthrough\nmodels: [{model: a}]\n"
        rest = {f"model.layers.{i}.self_attn.k_proj.weight": (8, 8) for i in range(2)}
        said = lacking(copy, a=without(llama(2, extra=rest), "layers.1.self_attn.q_proj"))
        assert "'a' lost model.layers.1.self_attn.q_proj.weight" in said
        said = lacking(copy, a=without(llama(4), "layers.1.input_layernorm"))
        assert "'a' lost model.layers.1.input_layernorm.weight" in said

    def test_layers_that_are_built_apart_lost_nothing(self):
        copy = "merge_method: passthrough\nmodels: [{model: a}]\n"
        dense = without(llama(4), "layers.0.mlp")
        assert make(copy, a=dense), "a layer without a module that others have"
        assert make(copy, a=without(llama(4), "layers.0.input_layernorm")), "the first needs no norm of its own"
        stages = {f"stages.{i}.layers.0.conv.weight": (4,) for i in range(2)}
        stages["stages.1.layers.0.shortcut.conv.weight"] = (4,)
        assert make(copy, a=checkpoint(stages, config={"model_type": "resnet"}))

    def test_the_base_must_have_it(self):
        said = lacking(TIES, base=llama(), a=llama(extra={"bias": (8,)}), b=llama())
        assert "bias (missing from 'base', 'b')" in said.replace("'b', 'base'", "'base', 'b'")
        assert "the base must have them" in said

    def test_two_layouts_of_experts(self):
        single = {f"model.layers.{i}.moe.experts.{e}.w1.weight": (2, 8) for i in range(4) for e in range(3)}
        fused = {f"model.layers.{i}.mlp.experts.gate_up_proj": (3, 2, 8) for i in range(4)}
        said = lacking(LINEAR, a=llama(extra=single), b=llama(extra=fused))
        assert "model.layers.*.moe.experts.*.w1.weight (12 tensors) (missing from 'b')" in said
        assert "the experts are fused in one model and single in another" in said

    def test_many_are_one_line(self):
        said = lacking(LINEAR, a=llama(9), b=without(llama(9), "q_proj"))
        assert "model.layers.*.self_attn.q_proj.weight (9 tensors)" in said

    def test_other_architectures(self):
        b = checkpoint({"lm_head.weight": (32, 8), "x": (1,)})
        assert "missing from 'b'" in lacking(LINEAR, a=llama(), b=b)
        said = lacking(LINEAR, a=llama(), b=checkpoint({"y": (1,), "h.0.x": (1,)}))
        assert "'b' has no tensor name in common with 'a' (h.0.x here, model.layers.0.input_layernorm" in said

    def test_a_lost_head_is_not_replaced(self):
        untied = {"tie_word_embeddings": False}
        said = lacking(TIES, base=llama(), a=llama(), b=llama(head=False, config=untied))
        assert "lm_head.weight" in said
        assert "config.json of 'b' says that its head is not tied" in said

    def test_a_first_layer_that_is_built_apart_stays_the_first(self):
        """ModernBERT: all layers but the first have a norm; transformers makes none for the first, whatever it is."""
        copy = "merge_method: passthrough\nslices:\n" + "- sources: [{model: a, layer_range: [%d, %d]}]\n" * 2
        bare = without(llama(4), "layers.0.input_layernorm")
        for ranges in ((0, 2, 0, 4), (1, 3, 2, 4)):
            said = lacking(copy % ranges, a=bare)
            assert "the first layer of 'a' has no input_layernorm.weight, which every other layer has" in said
        assert len(make(copy % (0, 3, 1, 4), a=bare).ops) > len(bare.tensors)
        assert make(copy % (0, 2, 0, 4), a=llama(4))


class TestOptional:
    """What a model may do without."""

    @pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "h.0.attn.masked_bias", "position_ids"])
    @pytest.mark.parametrize("text", [LINEAR, TIES, SLERP, STOCK], ids=["linear", "ties", "slerp", "model_stock"])
    def test_buffers(self, text, name):
        have, lack = llama(extra={name: (4,)}), llama()
        first = make(text, base=have, a=have, b=lack)
        assert name in names(first)
        second = make(text, base=lack, a=lack, b=have)
        assert name not in names(second)
        assert any("a buffer that models make for themselves" in w for w in second.warnings)

    def test_masks_have_four_dimensions(self):
        mask, bias = {"h.0.attn.bias": (1, 1, 4, 4)}, {"h.0.attn.bias": (4,)}
        assert "h.0.attn.bias" in names(make(LINEAR, a=llama(extra=mask), b=llama()))
        assert "h.0.attn.bias" in lacking(LINEAR, a=llama(extra=bias), b=llama())

    def test_value_heads_are_left_out_unless_every_model_has_one(self):
        head = llama(extra={"v_head.summary.weight": (1, 8)})
        for a, b in ((head, llama()), (llama(), head)):
            made = make(LINEAR, a=a, b=b)
            assert "v_head.summary.weight" not in names(made)
            assert any("a value head" in w for w in made.warnings)
        assert "v_head.summary.weight" in names(make(LINEAR, a=head, b=head))

    def test_prediction_layers(self):
        extra = {"model.layers.4.eh_proj.weight": (8, 8), "mtp.fc.weight": (8, 8)}
        made = by_name(make(TIES, base=llama(extra=extra), a=llama(extra=extra), b=llama()))
        assert models_of(made["model.layers.4.eh_proj.weight"]) == (0, 1)
        assert "mtp.fc.weight" not in names(make(TIES, base=llama(), a=llama(extra=extra), b=llama()))
        alone = by_name(make(LINEAR, a=llama(extra=extra), b=llama()))
        assert method_of(alone["mtp.fc.weight"]) is None


class TestParts:
    """Models that are a part of the reference."""

    @staticmethod
    def clip():
        out = {"logit_scale": (), "visual_projection.weight": (4, 8), "text_projection.weight": (4, 8)}
        for side in ("text", "vision"):
            for i in range(2):
                out[f"{side}_model.encoder.layers.{i}.mlp.fc1.weight"] = (8, 8)
                out[f"{side}_model.encoder.layers.{i}.mlp.fc2.weight"] = (8, 8)
            out[f"{side}_model.norm.weight"] = (8,)
        return out

    def tower(self, side="vision_model", lost="?"):
        kept = {n: s for n, s in self.clip().items() if n.startswith(side) and lost not in n}
        return checkpoint(kept, config={"model_type": "clip_vision_model", "num_hidden_layers": 2})

    @property
    def whole(self):
        return checkpoint(self.clip(), config={"model_type": "clip", "vision_config": {"num_hidden_layers": 2}})

    def test_a_tower_of_the_base(self):
        made = make(TIES, base=self.whole, a=self.tower(), b=self.tower())
        out = by_name(made)
        assert set(out) == set(self.clip())
        assert all(len(o.inputs) == (3 if n.startswith("vision_model") else 1) for n, o in out.items())
        (only,) = (w for w in made.warnings if "model_type" not in w)
        assert "(8 tensors): a part of 'base': taken from 'base' alone" in only

    def test_a_tower_beside_a_whole_model(self):
        out = by_name(make(TIES, base=self.whole, a=self.tower(), b=self.whole))
        assert models_of(out["text_model.norm.weight"]) == (0, 2)

    @pytest.mark.parametrize("lost", ["layers.1.mlp.fc1", "fc1", "norm"])
    def test_a_tower_that_lost_something(self, lost):
        assert lost in lacking(TIES, base=self.whole, a=self.tower(lost=lost), b=self.whole).replace("*", "1")

    def test_a_whole_model_that_lost_a_module_is_no_part(self):
        kept = {n: s for n, s in self.clip().items() if n != "logit_scale"}
        b = checkpoint(kept, config={"model_type": "clip"})
        assert "logit_scale (missing from 'b')" in lacking(TIES, base=self.whole, a=self.whole, b=b)

    @pytest.mark.parametrize("head", [True, False])
    def test_a_text_model_with_and_without_its_head(self, head):
        untied = {"tie_word_embeddings": False, "num_hidden_layers": 4}
        vision = {f"visual.blocks.{i}.mlp.w": (8, 8) for i in range(3)}
        vlm, text = llama(extra=vision, config=untied), llama(config=untied, head=head)
        if head:
            out = by_name(make(TIES, base=vlm, a=text, b=text))
            assert (len(out["lm_head.weight"].inputs), len(out["visual.blocks.1.mlp.w"].inputs)) == (3, 1)
        else:
            assert "'b' says that its head is not tied" in lacking(TIES, base=vlm, a=vlm, b=text)

    def test_methods_without_a_base_take_what_one_model_alone_has(self):
        made = make(LINEAR, a=self.whole, b=self.tower())
        assert method_of(by_name(made)["logit_scale"]) is None
        three = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
        assert "logit_scale" in lacking(three, a=self.whole, b=self.tower(), c=self.whole)

    def test_model_stock_needs_two(self):
        assert "logit_scale" in lacking(STOCK, base=self.whole, a=self.whole, b=self.tower())

    def test_the_reference_is_no_part(self):
        assert "missing from 'a'" in lacking(LINEAR, a=self.tower(), b=self.whole)

    def test_towers_beyond_a_base_of_text_are_left_out(self):
        vision = {f"visual.blocks.{i}.mlp.w": (8, 8) for i in range(3)} | {"visual.merger.w": (8, 8)}
        text, vlm = llama(), llama(extra=vision, config={"num_hidden_layers": 4, "vision_config": {"depth": 3}})
        made = make(TIES, base=text, a=vlm, b=llama())
        assert set(names(made)) == set(text.tensors)
        rules = made.account.counts()["a"]
        assert rules["dropped: a part that 'base' does not have"] == 4
        assert any("not in the output: a part that 'base' does not have" in w for w in made.warnings)
        tied = without(vlm, "lm_head")
        assert "lm_head.weight" in names(make(TIES, base=text, a=tied, b=llama())), "its embedding is its head"
        assert "missing from" in lacking(TIES, base=without(text, "layers.1.self_attn"), a=vlm, b=llama())
        extra = llama(extra=vision | {"model.layers.0.self_attn.bias": (8,)}, config=dict(vlm.config))
        assert "self_attn.bias" in lacking(TIES, base=text, a=extra, b=llama())

    def test_only_what_was_trained(self):
        kept = {n: i.shape for n, i in llama().tensors.items() if "q_proj" in n}
        for config in ({"model_type": "llama"}, {}):
            made = make(TIES, base=llama(), a=checkpoint(kept, config=config), b=llama())
            assert models_of(by_name(made)["model.norm.weight"]) == (0, 2)
        other = checkpoint(kept, config={"model_type": "gpt2"})
        assert "missing from 'a'" in lacking(TIES, base=llama(), a=other, b=llama())

    def test_biases_are_no_part(self):
        biases = {f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(4)}
        assert "q_proj.bias" in lacking(TIES, base=llama(extra=biases), a=llama(), b=llama())


class TestOptingIn:
    """``missing: merge``: mergekit's rules."""

    @pytest.fixture(autouse=True)
    def opted_in(self, monkeypatch):
        whole = make
        merging = "missing: merge\n"
        monkeypatch.setitem(globals(), "make", lambda text, **models: whole(text + merging, **models))

    def test_methods_without_a_base_merge_what_is_there(self):
        extra = {"bias": (8,)}
        made = make(LINEAR, a=llama(extra=extra), b=llama())
        out = by_name(made)["bias"]
        assert (method_of(out), len(out.inputs), len(out.spec.method.weight)) == ("linear", 1, 1)
        assert made.warnings == ("missing from 'b': bias: the others are merged",)
        text = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
        made = make(text, a=llama(extra=extra), b=llama(), c=llama(extra=extra))
        out = by_name(made)["bias"]
        assert models_of(out) == (0, 2)
        assert out.spec.models == (0, 2)
        assert len(out.spec.method.weight) == 2
        assert made.warnings == ("missing from 'b': bias: the others are merged",)

    def test_tensors_that_the_first_model_lacks_come_last(self):
        made = make(LINEAR, a=llama(), b=llama(extra={"bias": (8,)}))
        assert names(made)[-1] == "bias"

    def test_the_base_must_have_it(self):
        assert "the base must have them" in lacking(TIES, base=llama(), a=llama(extra={"bias": (8,)}), b=llama())

    def test_the_base_alone_passes_through_and_others_are_skipped(self):
        extra = {"bias": (8,)}
        made = make(TIES + "dtype: float32\n", base=llama(extra=extra), a=llama(), b=llama())
        out = by_name(made)["bias"]
        assert (method_of(out), len(out.inputs), out.spec.out_dtype.name) == ("passthrough", 1, "float32")
        made = make(TIES, base=llama(extra=extra), a=llama(), b=llama(extra=extra))
        out = by_name(made)["bias"]
        assert models_of(out) == (0, 2)
        assert out.spec.models == (1,)

    def test_pairs_pass_a_survivor_through(self):
        for a, b in ((llama(extra={"bias": (8,)}), llama()), (llama(), llama(extra={"bias": (8,)}))):
            made = make(SLERP, a=a, b=b)
            assert method_of(by_name(made)["bias"]) is None

    def test_model_stock_takes_the_base_where_too_few_have_it(self):
        extra = {"bias": (8,)}
        for a in (llama(extra=extra), llama()):
            made = make(STOCK, base=llama(extra=extra), a=a, b=llama())
            assert (method_of(by_name(made)["bias"]), models_of(by_name(made)["bias"])) == (None, (0,))
        made = make(STOCK, base=llama(), a=llama(extra=extra), b=llama(extra=extra))
        assert "bias" not in names(made)
        assert "too few models have it; it is not in the output" in made.warnings[0]

    def test_many_missing_tensors_are_one_warning(self):
        made = make(LINEAR, a=llama(9), b=without(llama(9), "q_proj"))
        (only,) = made.warnings
        assert "model.layers.*.self_attn.q_proj.weight (9 tensors)" in only

    def test_strangers_are_refused(self):
        b = checkpoint({"lm_head.weight": (32, 8), "x": (1,)})
        assert "'b' shares 1 of 2 tensors with 'a': it does not look like the same" in lacking(LINEAR, a=llama(), b=b)


def test_different_depths_are_refused():
    with pytest.raises(
        CheckpointError, match=r"model\.layers: the models have different numbers of layers: 'a' 4, 'b' 5"
    ):
        make(LINEAR, a=llama(4), b=llama(5))


def test_heads_that_one_model_ties():
    made = make(TIES, base=llama(head=False, config={"tie_word_embeddings": True}), a=llama(), b=llama())
    out = by_name(made)["lm_head.weight"]
    assert tensors_of(out) == ["model.embed_tokens.weight", "lm_head.weight", "lm_head.weight"]
    assert made.config["tie_word_embeddings"] is False
    assert "missing from 'base': lm_head.weight: the tied embedding takes its place" in made.warnings
    assert "lm_head.weight" not in names(make(TIES, **{n: llama(head=False) for n in ("base", "a", "b")}))


def test_filters_and_gradients_reach_the_groups():
    text = """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {filter: layers, value: [0.5, 0.7]}
    - {filter: self_atn, value: 1}
    - {value: [0.125, 1]}
"""
    made = make(text, a=llama(3), b=llama(3))
    t = {n: o.spec.method.t for n, o in by_name(made).items()}
    assert [t[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)] == [0, 0.5, 1]
    assert [t[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)] == [0.5, 0.6, 0.7]
    assert t["lm_head.weight"] == t["model.norm.weight"] == 0.125
    assert made.warnings == (
        "recipe:9: parameters.t[2]: the filter 'self_atn' matches no tensor name (did you mean 'self_attn'?)",
    )


def test_a_gradient_needs_layers():
    text = LINEAR.replace("weight: 1", "weight: [0, 1]")
    flat = checkpoint({"x": (3,), "y": (3,)})
    with pytest.raises(RecipeError, match="a gradient needs layers, and the tensor names of 'a' show none"):
        make(text, a=flat, b=flat)
    assert make(LINEAR, a=flat, b=flat)


def test_one_layer_is_the_end_of_a_gradient():
    made = make(SLERP.replace("t: 0.5", "t: [0, 1]"), a=llama(1), b=llama(1))
    assert by_name(made)["model.layers.0.mlp.down_proj.weight"].spec.method.t == 1.0


def test_every_missing_parameter_and_method_problem_is_said_with_its_tensor():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: {filter: mlp, value: 1}}\n"
    with pytest.raises(
        RecipeError,
        match=r"lm_head\.weight: models: linear needs the parameter 'weight' of 'a': no filter gives it a value",
    ):
        make(text, a=llama(), b=llama())
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\n"
    with pytest.raises(RecipeError, match=r"lm_head\.weight: linear: weights .* sum to zero"):
        make(text, a=llama(), b=llama())


def test_warnings_of_methods_come_once():
    made = make(SLERP.replace("t: 0.5", "t: 1.5"), a=llama(), b=llama())
    assert made.warnings == ("slerp: t = 1.5 is outside 0 .. 1 and extrapolates",)


def test_equal_outcomes_share_their_parameters():
    made = make(TIES, base=llama(), a=llama(), b=llama())
    assert len({id(op.spec.method) for op in made.ops}) == 1
    assert len({op.spec for op in made.ops}) == len({op.spec.shape for op in made.ops}), "one spec per kind of tensor"
