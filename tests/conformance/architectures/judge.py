"""Merges of tiny models, and what they should be: computed by hand in fp64, and loaded by transformers.

A cell of the table is one model and one merge. It is right where transformers loads the output without a missing, an
unexpected or a mismatched tensor, every tensor and all logits are those of the model merged by hand, and ``generate``
runs.
"""

import copy
import json
import shutil

import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.errors import FastMergeError
from tests.conformance.architectures.models import IDS

MERGES = ("linear", "ties", "depth", "other fine-tune", "other base")
CLOSE = 1e-5
"""Share of the largest value: what the merge rounds to float32, the one by hand does not."""

DENSITY = 0.5


class Family:
    """A base and two fine-tunes of it in a directory each, and the same in the other layout.

    Attributes:
        model: of the table.
        home: directory of all directories.
        states: of the models in memory: base first.
    """

    def __init__(self, model, home):
        self.model, self.home = model, home
        self.made = model.build()
        base = {n: t.clone() for n, t in self.made.state_dict().items()}
        self.states = [base, tuned(base, 1), tuned(base, 2)]
        for name, state in zip(("base", "a", "b"), self.states, strict=True):
            self.save(name, state)

    def save(self, name, state, **how):
        self.made.load_state_dict(state)
        self.made.save_pretrained(self.home / name, **how)

    def other(self, name, state):
        """The model with the names that it has in memory; where those are the same, those of a compiled model."""
        path = self.home / f"{name}-other"
        if not path.exists():
            self.save(path.name, state, save_original_format=False)
            file = path / "model.safetensors"
            tensors = load_file(file)
            if tensors.keys() == load_file(self.home / name / file.name).keys():
                save_file({f"_orig_mod.{n}": t for n, t in tensors.items()}, file, metadata={"format": "pt"})
        return path

    def loaded(self, path):
        """The model of a directory in fp64, and what transformers says of its tensors."""
        model, said = type(self.made).from_pretrained(path, dtype=torch.float64, output_loading_info=True)
        wrong = [f"{key.partition('_')[0]}: {sorted(map(str, said[key]))[:2]}" for key in said if said[key]]
        model.set_experts_implementation("eager")
        return model.eval(), wrong


def tuned(state, seed):
    """A fine-tune: noise that no two models share."""
    g = torch.Generator().manual_seed(seed)
    noise = {n: 0.02 * torch.randn(t.shape, generator=g) for n, t in state.items() if t.is_floating_point()}
    twins = {t.data_ptr(): n for n, t in state.items()}  # tied tensors stay so
    return {n: t + noise[twins[t.data_ptr()]] if n in noise else t.clone() for n, t in state.items()}


def judge(family, merge):
    """Runs one merge of a family.

    Returns:
        None where it is right, else what is wrong.
    """
    out = family.home / f"out-{merge}"
    text = recipe(family, merge)
    try:
        fastmerge.merge(text, out, device="cpu", memory="600MB")
    except FastMergeError as e:
        return f"refused: {e}"
    try:
        got, wrong = family.loaded(out)
    except Exception as e:
        return f"does not load: {type(e).__name__}: {str(e).splitlines()[0]}"
    return "; ".join(wrong) or compare(got, expected(family, merge))


def recipe(family, merge):
    """The recipe of one cell."""
    names = {n: family.home / n for n in ("base", "a", "b")}
    if merge == "depth":
        first, second = family.model.changes
        ranges = [[{"model": str(names["a"]), "layer_range": list(r)}] for r in (first, second)]
        return {"merge_method": "passthrough", "slices": [{"sources": s} for s in ranges]}
    if merge == "other fine-tune":
        names["a"] = family.other("a", family.states[1])
    if merge == "other base":
        names["base"] = family.other("base", family.states[0])
    text = {"merge_method": "ties" if merge == "ties" else "task_arithmetic", "base_model": str(names["base"])}
    text |= {"models": [{"model": str(names[n]), "parameters": {"weight": 0.5}} for n in "ab"], "dtype": "float32"}
    if merge == "linear":
        text = {"merge_method": "linear", "models": text["models"], "dtype": "float32"}
    return text | ({"parameters": {"density": DENSITY}} if merge == "ties" else {})


def expected(family, merge):
    """The model merged by hand, in fp64."""
    base, a, b = [{n: t.double() if t.is_floating_point() else t for n, t in s.items()} for s in family.states]
    if merge == "depth":
        return rearranged(family)
    if merge == "ties":
        by_hand = family.home / "by-hand"
        shutil.copytree(family.home / "base", by_hand)
        states = [load_file(family.home / n / "model.safetensors") for n in ("base", "a", "b")]
        merged = {n: ties(*(s[n].double() for s in states)) for n in states[0]}
        save_file(merged, by_hand / "model.safetensors", metadata={"format": "pt"})
        return family.loaded(by_hand)[0]
    model = copy.deepcopy(family.made).double()
    mean = {n: (a[n] + b[n]) / 2 if t.is_floating_point() else t for n, t in base.items()}
    model.load_state_dict(mean)
    return model


def ties(base, *models):
    """TIES of deltas of equal weight (Yadav et al. 2023), each trimmed to its largest half."""
    kept = []
    for model in models:
        delta = (model - base).reshape(-1)
        top = torch.zeros_like(delta)
        index = delta.abs().topk(max(1, int(DENSITY * delta.numel()))).indices
        kept.append(top.scatter(0, index, delta[index]))
    deltas = torch.stack(kept)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas.sign() == sign) & (deltas != 0)
    mean = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return base + mean.reshape(base.shape)


def rearranged(family):
    """The first fine-tune with its layer objects put in another order."""
    model = family.loaded(family.home / "a")[0]
    order = [i for first, last in family.model.changes for i in range(first, last)]
    count = len({*order})
    config = model.config.get_text_config()
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.ModuleList) and len(child) == count and name in ("layers", "h", "layer"):
                layers = [copy.deepcopy(child[i]) for i in order]
                for i, layer in enumerate(layers):
                    for part in layer.modules():
                        if hasattr(part, "layer_idx"):
                            part.layer_idx = i
                setattr(module, name, torch.nn.ModuleList(layers))
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            object.__setattr__(config, key, [value[i] for i in order])
    for part in model.modules():
        for block in (config, getattr(part, "config", None)):
            if block is not None and getattr(block, "num_hidden_layers", None) == count:
                block.__dict__["num_hidden_layers"] = len(order)
    return model


def inputs(model):
    """What a model is called with: text, and a sound where it listens."""
    if hasattr(model.config, "num_mel_bins"):
        g = torch.Generator().manual_seed(9)
        return {"input_features": torch.randn((1, 8, 32), generator=g).double(), "decoder_input_ids": IDS}
    if model.config.is_encoder_decoder:
        return {"input_ids": IDS, "decoder_input_ids": IDS}
    return {"input_ids": IDS, **({"use_cache": False} if model.can_generate() else {})}


def compare(got, want):
    """What is wrong in a model, next to one merged by hand; None where nothing is."""
    mine, theirs = got.state_dict(), want.state_dict()
    if mine.keys() != theirs.keys():
        return f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:2]}"
    far = [n for n, t in theirs.items() if not near(mine[n], t)]
    if far:
        return f"wrong values: {far[:2]}"
    with torch.no_grad():
        logits = [m(**inputs(m)).logits for m in (got, want)]
    if not near(*logits):
        return f"logits differ by {(logits[0] - logits[1]).abs().max():.1e}"
    if got.can_generate():
        more = {"max_new_tokens": 3, "do_sample": False}
        first = next(iter(inputs(got).items()))
        got.generate(**dict([first]), **more)
    return None


def near(got, want):
    if not want.is_floating_point():
        return torch.equal(got, want)
    scale = want.abs().max() if want.numel() else 1.0
    return got.shape == want.shape and bool(((got - want).abs() <= CLOSE * scale + 1e-12).all())


def config_of(path):
    return json.loads((path / "config.json").read_text())
