"""One recipe through both tools on the stand-ins, and everything in which fastmerge's output is not mergekit's."""

import json
import logging
import re
import string
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

import fastmerge as fm

RECIPES = sorted(Path(__file__).with_name("recipes").glob("*.yml"))
FACTOR = 1.001
"""How many times mergekit's RMS error per tensor fastmerge's may be."""

WIDE = ("arcee_fusion", "ramplus_tl")
"""Methods whose results mergekit leaves in fp32 (README.md lists it): types are not compared."""

ROUNDED = ("ties", "dare_ties", "breadcrumbs_ties", "della", "sce", "arcee_fusion")
"""Methods that compare sums: where those are equal but for rounding (0.4 x 3 and 0.3 x 4), an element falls to either
side. The four largest errors of each tensor are left out, of both tools."""

CHAT = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]

PRIVATE = ("_name_or_path", "transformers_version", "dtype")
"""Keys of a config that say where and when."""


def filled(text, family):
    """A recipe with directories for its placeholders; B has two more tokens where a recipe speaks of tokenizers."""
    more = bool(re.search(r"^tokenizer", text, re.MULTILINE))
    names = set(re.findall(r"\$\{(\w+)\}", text))
    return string.Template(text).substitute({n: str(family.path(n, more=more)) for n in names})


def weights(directory):
    return {k: t for f in sorted(directory.glob("*.safetensors")) for k, t in load_file(f).items()}


def judge(text, work):
    """What is wrong with fastmerge's output of a filled recipe, line by line; nothing where it conforms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _judge(text, work)


def _judge(text, work):
    from tests.conformance import peer  # loads mergekit's planner and transformers, which takes seconds

    work.mkdir(parents=True, exist_ok=True)
    ours, theirs, exact = work / "fastmerge", work / "mergekit", work / "exact"
    peer.merge(text, theirs)
    peer.merge(text, exact, exact=True)
    logging.getLogger("fastmerge").setLevel(logging.ERROR)
    recipe = work / "recipe.yml"
    recipe.write_text(text)
    try:
        fm.merge(recipe, ours, device="cpu", memory="200MB")
    except fm.FastMergeError as error:
        return [f"refused: {error}"]
    methods = set(re.findall(r"^merge_method:\s*(\w+)", text, re.MULTILINE))
    found = values(
        weights(ours),
        weights(theirs),
        weights(exact),
        types=not methods & set(WIDE),
        flips=4 * bool(methods & set(ROUNDED)),
    )
    return [*found, *configs(ours, theirs), *tokenizers(ours, theirs), *loads(ours)]


def rms(error, leave=0):
    """Of all elements but those with the ``leave`` largest errors."""
    error = error.abs().flatten()
    kept = error.topk(max(error.numel() - leave, 0), largest=False).values if leave else error
    return kept.square().mean().sqrt().item() if kept.numel() else 0.0


def values(ours, theirs, exact, *, types, flips=0):
    """Names, shapes and types; then, tensor by tensor, who is nearer to the fp64 evaluation."""
    if ours.keys() != theirs.keys():
        only, lost = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        return [f"names: only here {only[:3]}, not here {lost[:3]}"]
    found = []
    for name in sorted(ours):
        a, b, truth = ours[name], theirs[name], exact[name]
        if a.shape != b.shape or (types and a.dtype != b.dtype):
            found.append(f"{name}: {a.dtype} {list(a.shape)}, mergekit {b.dtype} {list(b.shape)}")
        else:
            mine, other = rms(a.double() - truth, flips), rms(b.double() - truth, flips)
            if not mine <= FACTOR * other:
                found.append(f"{name}: RMS error {mine:.3g}, mergekit's {other:.3g} (RMS value {rms(truth):.3g})")
    return found if len(found) < 5 else [*found[:4], f"and {len(found) - 4} tensors more"]


def configs(ours, theirs):
    """Settings of config.json as transformers reads them."""
    from transformers import AutoConfig

    a, b = (
        {k: v for k, v in AutoConfig.from_pretrained(d).to_dict().items() if k not in PRIVATE} for d in (ours, theirs)
    )
    found = [f"config: {k} is {a.get(k)!r}, mergekit's {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]
    (mine,) = {t.dtype for t in weights(ours).values()}
    said = json.loads((ours / "config.json").read_text())
    said = said.get("dtype", said.get("torch_dtype"))
    return found if f"torch.{said}" == str(mine) else [*found, f"config: dtype is {said}, weights are {mine}"]


def tokenizers(ours, theirs):
    """Every token's row, and what the chat template makes of a conversation."""
    from transformers import AutoTokenizer

    a, b = (AutoTokenizer.from_pretrained(d) for d in (ours, theirs))
    mine, other = a.get_vocab(), b.get_vocab()
    differ = sorted(k for k in mine | other if mine.get(k) != other.get(k))
    found = [f"tokenizer: {k!r} is {mine.get(k)}, mergekit's {other.get(k)}" for k in differ[:3]]
    if bool(a.chat_template) != bool(b.chat_template):
        return [*found, f"chat template: {a.chat_template!r}, mergekit's {b.chat_template!r}"]
    for prompt in (False, True) if a.chat_template else ():
        said = [t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt) for t in (a, b)]
        if said[0] != said[1]:
            found.append(f"chat template: makes {said[0]!r}, mergekit's {said[1]!r}")
    return found


def loads(directory):
    """Loaded by transformers with nothing missing, four tokens generated, all logits finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    words = AutoTokenizer.from_pretrained(directory)("tell the question", return_tensors="pt").input_ids
    said = model.generate(words, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    logits = model(said).logits
    found = [f"loading: {k}: {sorted(map(str, v))[:3]}" for k, v in info.items() if v]
    if said.shape[1] != words.shape[1] + 4:
        found.append(f"generated {said.shape[1] - words.shape[1]} tokens")
    return found if bool(torch.isfinite(logits).all()) else [*found, "logits are not finite"]
