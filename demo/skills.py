"""The three skills of the demo: what is asked, what the right answer is, and how often a model gives it.

A line of text is an instruction, six digits, an equals sign and six digits of answer::

    reverse 314159 = 951413
    sort    314159 = 113459
    shift   314159 = 425260

``shift`` adds one to every digit, modulo ten. A model has a skill when, given everything up to the equals
sign, it writes all six digits of the answer; accuracy is the share of such lines, so a model that only
gets digits right now and then scores near zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

DIGITS = 6
"""Length of every question and every answer."""

SKILLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse": lambda x: x.flip(1),
    "sort": lambda x: x.sort(1).values,
    "shift": lambda x: (x + 1) % 10,
}
"""Skill to function: digits ``[n, DIGITS]`` of questions to digits of answers."""

VOCABULARY: tuple[str, ...] = (*"0123456789", "=", *SKILLS, "<pad>", "<eos>")
"""Token number to token; a digit is its own number."""

TOKEN = {word: number for number, word in enumerate(VOCABULARY)}


def lines(skill: str, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random lines of one skill.

    Args:
        skill: a key of :data:`SKILLS`.
        count: how many.
        generator: source of the digits; equal states give equal lines.

    Returns:
        int64 token numbers ``[count, 2 * DIGITS + 3]``: instruction, digits, ``=``, digits, ``<eos>``.
    """
    question = torch.randint(0, 10, (count, DIGITS), generator=generator)

    def column(word: str) -> torch.Tensor:
        return torch.full((count, 1), TOKEN[word])

    return torch.cat([column(skill), question, column("="), SKILLS[skill](question), column("<eos>")], 1)


def score(model: torch.nn.Module, count: int = 2_000, seed: int = 2_026) -> dict[str, float]:
    """Share of unseen lines that a model completes without a single wrong digit, by skill.

    One forward pass judges a whole line: the most probable next token is right at all six places exactly
    when writing the answer token by token, greedily, would be right.
    """
    model.eval()
    result = {}
    for skill in SKILLS:
        text = lines(skill, count, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            predicted = model(input_ids=text, use_cache=False).logits[:, DIGITS + 1 : -2].argmax(-1)
        right = (predicted == text[:, DIGITS + 2 : -1]).all(1)
        result[skill] = float(right.double().mean())
    return result


def accuracy(model_dir: str | Path) -> dict[str, float]:
    """Accuracy by skill of a checkpoint directory, loaded as any user would: by transformers, in fp32.

    Args:
        model_dir: directory with ``config.json`` and safetensors of a causal language model.

    Returns:
        Skill to a share in [0, 1], over 2,000 fixed questions each.
    """
    from transformers import AutoModelForCausalLM

    return score(AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32))


def complete(model_dir: str | Path, prompts: list[str]) -> list[str]:
    """What a checkpoint writes after each prompt (``"sort 314159 ="``), with its own tokenizer, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    asked = tokenizer(prompts, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=DIGITS, do_sample=False)
    return [tokenizer.decode(row[asked["input_ids"].shape[1] :]).replace(" ", "") for row in written]
