"""The examples of the DNA transfer guide, with another import, and models and sizes that a test can have."""

import pytest
import torch

from tests.dna import zoo


@pytest.fixture
def dense_model():
    return zoo.model("llama")


@pytest.fixture
def large_model():
    return zoo.model("llama", num_hidden_layers=6)


def training_tokens():
    return zoo.tokens(2, 12)


def test_upcycling(dense_model):
    from fastmerge.dna import UpcyclingConfig, upcycle_dense_to_moe

    config = UpcyclingConfig(
        num_experts=8,
        num_experts_per_token=2,
        expert_init_noise=0.01,
        auxiliary_loss_weight=0.01,
    )
    moe_model = upcycle_dense_to_moe(dense_model, config)
    input_ids = training_tokens()
    labels = input_ids
    outputs = moe_model(input_ids, labels=labels)
    total_loss = outputs.loss + moe_model.get_moe_aux_loss()
    total_loss.backward()
    assert moe_model.config.num_local_experts == 8
    assert 0 < zoo.difference(dense_model, moe_model) < 0.2


def test_depth_up_scaling(dense_model):
    from fastmerge.dna import DepthUpscaleConfig, depth_upscale

    model = dense_model
    config = DepthUpscaleConfig(
        scale_factor=2,
        insertion_method="interleave",
        init_noise=0.001,
    )
    scaled_model = depth_upscale(model, config)
    assert scaled_model.config.num_hidden_layers == 2 * model.config.num_hidden_layers
    assert torch.isfinite(zoo.logits(scaled_model)).all()


def test_net2wider(dense_model):
    from fastmerge.dna import GrowthMethod, ModelGrowthConfig, grow_model_width

    model = dense_model
    config = ModelGrowthConfig(
        method=GrowthMethod.NET2WIDER,
        width_multiplier=2.0,
        preserve_output=True,
        noise_std=0.01,
    )
    wider_model = grow_model_width(model, config)
    assert wider_model.config.hidden_size == 2 * model.config.hidden_size
    assert zoo.difference(model, wider_model) < 1e-5


def test_net2deeper(dense_model):
    from fastmerge.dna import GrowthMethod, ModelGrowthConfig, grow_model_depth

    model = dense_model
    config = ModelGrowthConfig(
        method=GrowthMethod.NET2DEEPER,
        num_new_layers=8,
        preserve_output=True,
    )
    deeper_model = grow_model_depth(model, config)
    assert deeper_model.config.num_hidden_layers == model.config.num_hidden_layers + 8
    assert zoo.difference(model, deeper_model) == 0


def test_slicing(large_model):
    from fastmerge.dna import ModelSlicingConfig, slice_model

    config = ModelSlicingConfig(
        target_layers=3,
        target_hidden_size=16,
        layer_selection="importance",
        importance_metric="weight_norm",
        preserve_first_last=True,
    )
    small_model = slice_model(large_model, config)
    assert small_model.config.num_hidden_layers == 3
    assert small_model.config.hidden_size == 16
    assert torch.isfinite(zoo.logits(small_model)).all()


def test_a_family(large_model):
    from fastmerge.dna import create_model_family

    base_12b_model = large_model
    family = create_model_family(
        base_12b_model,
        sizes=[
            (6, 32),
            (4, 24),
            (3, 16),
            (2, 8),
        ],
    )
    model_9b = family["4L_24D"]
    model_6b = family["3L_16D"]
    assert zoo.difference(large_model, family["6L_32D"]) == 0
    assert (model_9b.config.num_hidden_layers, model_9b.config.hidden_size) == (4, 24)
    assert (model_6b.config.num_hidden_layers, model_6b.config.hidden_size) == (3, 16)


@pytest.fixture
def specialists():
    return [zoo.model("llama", seed=seed) for seed in range(3)]


def test_evolutionary_merge(specialists):
    from fastmerge.dna import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

    math_model, code_model, _ = specialists
    config = EvolutionaryMergeConfig(
        strategy=MergeStrategy.EVOLUTIONARY,
        population_size=20,
        num_generations=50,
        mutation_rate=0.1,
        crossover_rate=0.7,
        elite_ratio=0.1,
    )
    merged_model = evolutionary_merge(
        [math_model, code_model],
        config,
    )
    assert torch.isfinite(zoo.logits(merged_model)).all()


def test_other_strategies(specialists):
    from fastmerge.dna import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

    slerp = EvolutionaryMergeConfig(
        strategy=MergeStrategy.SLERP,
        interpolation_weight=0.5,
    )
    ties = EvolutionaryMergeConfig(
        strategy=MergeStrategy.TIES,
        ties_density=0.5,
    )
    task_arithmetic = EvolutionaryMergeConfig(
        strategy=MergeStrategy.TASK_ARITHMETIC,
    )
    for config in (slerp, ties, task_arithmetic):
        assert torch.isfinite(zoo.logits(evolutionary_merge(specialists[:2], config))).all()


def test_the_pipeline(dense_model, large_model):
    from fastmerge.dna import create_dna_transfer_pipeline

    small_model = dense_model
    moe_model = create_dna_transfer_pipeline(dense_model, {"type": "upcycle", "num_experts": 8})
    wider_model = create_dna_transfer_pipeline(
        small_model, {"type": "grow", "method": "net2wider", "width_multiplier": 1.5}
    )
    deeper_model = create_dna_transfer_pipeline(small_model, {"type": "depth_upscale", "scale_factor": 2})
    smaller_model = create_dna_transfer_pipeline(large_model, {"type": "slice", "target_layers": 3})
    assert moe_model.config.num_local_experts == 8
    assert wider_model.config.hidden_size == 48
    assert zoo.difference(small_model, wider_model) < 1e-5
    assert deeper_model.config.num_hidden_layers == 6
    assert smaller_model.config.num_hidden_layers == 3


def test_the_pipeline_merges_as_well(specialists):
    from fastmerge.dna import create_dna_transfer_pipeline
    from fastmerge.errors import RecipeError

    first, *others = specialists
    made = create_dna_transfer_pipeline(
        first, {"type": "merge", "models": others, "method": "task_arithmetic", "parameters": {"weight": 0.5}}
    )
    assert torch.isfinite(zoo.logits(made)).all()
    with pytest.raises(RecipeError, match=r"type: expected one of .*got 'slices' \(did you mean 'slice'"):
        create_dna_transfer_pipeline(first, {"type": "slices"})
    with pytest.raises(RecipeError, match=r"num_expert: .* has no such field \(did you mean 'num_exp"):
        create_dna_transfer_pipeline(first, {"num_expert": 8})


def test_example_1_a_mixture_of_seven_billion(dense_model, tmp_path):
    from transformers import AutoModelForCausalLM

    dense_model.save_pretrained(tmp_path / "Llama-2-7b")
    base_model = AutoModelForCausalLM.from_pretrained(tmp_path / "Llama-2-7b")

    from fastmerge.dna import UpcyclingConfig, upcycle_dense_to_moe

    config = UpcyclingConfig(
        num_experts=8,
        num_experts_per_token=2,
        expert_init_noise=0.01,
    )
    moe_model = upcycle_dense_to_moe(base_model, config)
    moe_model.save_pretrained(tmp_path / "moe")
    assert zoo.difference(moe_model, zoo.load(tmp_path / "moe")) == 0


def test_example_2_a_family_that_is_tuned_further(large_model):
    from fastmerge.dna import create_model_family

    family = create_model_family(
        large_model,
        sizes=[
            (6, 32),
            (4, 24),
            (3, 16),
        ],
    )

    def finetune(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(5):
            loss = model(training_tokens(), labels=training_tokens()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    for model in family.values():
        losses = finetune(model)
        assert losses[-1] < losses[0]


def test_example_3_specialists(specialists):
    from fastmerge.dna import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

    math_model, code_model, writing_model = specialists

    def evaluate_model(model, data):
        scores = [-model(data[key], labels=data[key]).loss.item() for key in ("math", "code", "writing")]
        return sum(scores) / 3

    data = {key: zoo.tokens(1, 8) + i for i, key in enumerate(("math", "code", "writing"))}
    data = {key: tokens % zoo.SIZES["vocab_size"] for key, tokens in data.items()}
    config = EvolutionaryMergeConfig(
        strategy=MergeStrategy.EVOLUTIONARY,
        population_size=6,
        num_generations=4,
        eval_fn=evaluate_model,
        eval_data=data,
    )
    with torch.no_grad():
        merged_model = evolutionary_merge([math_model, code_model, writing_model], config)
        best = max(evaluate_model(m, data) for m in specialists)
        assert evaluate_model(merged_model, data) >= best
