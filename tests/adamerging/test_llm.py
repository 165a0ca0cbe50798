"""Language models: prompts padded on either side, checkpoints as transformers writes them, merged to the same bytes."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.adamerging import AdaMerging, AdaMergingConfig, Seen, Task
from fastmerge.adamerging.objectives import entropy, entropy_first_token, nll
from fastmerge.errors import RecipeError
from tests.adamerging.near import unlike


def model(seed, base=None, tied=True):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    if base is not None:
        with torch.no_grad():
            for p, q in zip(made.parameters(), base.parameters()):
                p.copy_(q + 0.2 * torch.randn(p.shape))
    return made


def prompts(side, seed=0):
    """Five prompts of 3 to 7 tokens, padded."""
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(5, 7, dtype=torch.int64), torch.zeros(5, 7, dtype=torch.int64)
    for row, n in enumerate((3, 7, 4, 5, 6)):
        where = slice(7 - n, 7) if side == "left" else slice(n)
        ids[row, where] = torch.randint(1, 40, (n,), generator=g)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def seen(batch, logits):
    return Seen(Task("t", []), batch, None, logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_follows_the_last_of_the_prompt(side):
    batch = prompts(side)
    logits = torch.randn(5, 7, 40, dtype=torch.float64)
    ends = [6] * 5 if side == "left" else [2, 6, 3, 4, 5]
    p = torch.stack([logits[row, end].softmax(0) for row, end in enumerate(ends)])
    want = -(p * p.log()).sum(1).mean()
    assert entropy_first_token(seen(batch, logits)) == pytest.approx(float(want))
    last = entropy_first_token(seen(batch["input_ids"], logits))
    assert last == pytest.approx(float(entropy(seen(None, logits[:, -1]))))
    with pytest.raises(RecipeError, match=r"expected logits \[B, T, C\], got \(5, 40\)"):
        entropy_first_token(seen(batch, logits[:, 0]))


def test_masked_positions_do_not_count():
    batch = prompts("right")
    logits = torch.randn(5, 7, 40, dtype=torch.float64)
    p = logits.softmax(-1)
    each = -(p * p.log()).sum(-1)
    assert entropy(seen(batch, logits)) == pytest.approx(float(each[batch["attention_mask"].bool()].mean()))


def test_entropy_where_a_prediction_is_impossible():
    logits = torch.tensor([[0.0, -float("inf"), 1.0]], requires_grad=True)
    value = entropy(seen(None, logits))
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert value.item() == pytest.approx(float(-(p * p.log()).sum()), rel=1e-6)
    value.backward()
    assert logits.grad.isfinite().all()


def test_labels_of_a_text_are_its_next_tokens():
    base = model(0)
    batch = prompts("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = base(**batch, labels=labels)
    got = nll(seen({**batch, "labels": labels}, out.logits))
    assert unlike(got, out.loss) == []
    with pytest.raises(RecipeError, match=r"expected labels of shape \(5, 7\), got \(5, 6\)"):
        nll(seen((None, labels[:, 1:]), out.logits))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_learns_and_its_recipe_merges_on_disk(tmp_path, tied):
    base = model(0, tied=tied)
    experts = [model(seed, base, tied) for seed in (1, 2)]
    tasks = [Task(side, [prompts(side, seed) for seed in range(2)]) for side in ("left", "right")]
    config = AdaMergingConfig(objective="entropy_first_token", granularity="module", steps=4, learning_rate=0.05)
    run = AdaMerging(base, experts, tasks, config)
    result = run.run()
    kinds = {n.replace(".1.", ".0.") for n in result.coefficients}
    assert run.merged.raw.shape == (len(kinds), 2)
    paths = [tmp_path / n for n in ("base", "left", "right")]
    for path, each in zip(paths, (base, *experts)):
        each.save_pretrained(path)
    (tmp_path / "recipe.yml").write_text(result.recipe(paths[0], paths[1:]).to_yaml())
    fm.merge(tmp_path / "recipe.yml", tmp_path / "out")
    got, state = load_file(tmp_path / "out" / "model.safetensors"), run.merged.merged_state_dict()
    assert set(got) == set(load_file(paths[0] / "model.safetensors"))
    assert all(torch.equal(x, state[n]) for n, x in got.items())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert unlike(again(**prompts("left")).logits, run.merged(**prompts("left")).logits) == []
