"""Trains the models of the demo: a base and one specialist per skill, real Hugging Face checkpoints.

The *base* reads lines of all three skills, but the instruction on each is drawn at random: it learns to
reverse, to sort and to shift, and to carry on with whichever it has begun, yet not which word asks for
which. It guesses, and is right about one time in three. A *specialist* continues from the base on lines
whose instruction is true for its own skill, mixed with the base's kind of lines for the other two (the
usual replay against forgetting): it obeys one word and still guesses at the others. No model ever sees
two true instructions; a merge that obeys all three has put the specialists together.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from skills import DIGITS, SKILLS, TOKEN, VOCABULARY, lines

BASE_STEPS, BASE_LEARNING_RATE = 900, 3e-3
SPECIALIST_STEPS, SPECIALIST_LEARNING_RATE = 100, 1e-3
BATCH = 128
"""Lines per step; a specialist reads as many of its own and as many replayed."""

Batch = Callable[[torch.Generator], torch.Tensor]


def fixture(cache_dir: str | Path | None = None) -> dict[str, Path]:
    """The base and the specialists on disk, trained on first use (about a minute on two cores).

    Args:
        cache_dir: where they are kept; default ``$FASTMERGE_DEMO_CACHE``, else ``.cache/demo``.

    Returns:
        ``"base"`` and every skill to its checkpoint directory. What is cached belongs to this version of
        the training code; concurrent callers wait for the first.
    """
    cache = Path(cache_dir or os.environ.get("FASTMERGE_DEMO_CACHE") or ".cache/demo").resolve()
    here = Path(__file__).parent
    version = hashlib.blake2b(b"".join((here / f).read_bytes() for f in ("skills.py", "train.py")), digest_size=6)
    home = cache / f"models-{version.hexdigest()}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            staging = Path(tempfile.mkdtemp(prefix="training-", dir=cache))
            try:
                _train_all(staging)
                staging.replace(home)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return {name: home / name for name in ("base", *SKILLS)}


def _train_all(home: Path) -> None:
    """Trains and saves everything below ``home``, leaving torch's global state as it was."""
    threads = torch.get_num_threads()
    # One: matrices this small gain little from a second thread, lose tenfold on a busy machine, and give the
    # same bits whatever the number of cores.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _model()
            _train(model, _guessing(tuple(SKILLS), BATCH), BASE_STEPS, BASE_LEARNING_RATE, seed=1)
            _save(model, home / "base")
            for seed, skill in enumerate(SKILLS, start=10):
                model = type(model).from_pretrained(home / "base", dtype=torch.float32)
                _train(model, _specialist(skill), SPECIALIST_STEPS, SPECIALIST_LEARNING_RATE, seed=seed)
                _save(model, home / skill)
    finally:
        torch.set_num_threads(threads)


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            # Fifteen positions: a short period lets attention tell neighbours apart early in training.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=False,
            pad_token_id=TOKEN["<pad>"],
            bos_token_id=None,
            eos_token_id=TOKEN["<eos>"],
        )
    )


def _guessing(instructions: tuple[str, ...], count: int) -> Batch:
    """Lines of all skills in equal parts, each under an instruction drawn from ``instructions``."""
    words = torch.tensor([TOKEN[word] for word in instructions])

    def batch(generator: torch.Generator) -> torch.Tensor:
        text = torch.cat([lines(skill, count // len(SKILLS), generator) for skill in SKILLS])
        text[:, 0] = words[torch.randint(0, len(words), (len(text),), generator=generator)]
        return text

    return batch


def _specialist(skill: str) -> Batch:
    """True lines of one skill, and as many guessed ones under the other instructions."""
    replay = _guessing(tuple(word for word in SKILLS if word != skill), BATCH)
    return lambda generator: torch.cat([lines(skill, BATCH, generator), replay(generator)])


def _train(model: Any, batch: Batch, steps: int, learning_rate: float, seed: int) -> None:
    """AdamW with warm-up and linear decay; the loss counts answers only, questions are random digits."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm = steps // 10

    def pace(step: int) -> float:
        return min((step + 1) / warm, max(0.02, (steps - step) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    model.train()
    for _ in range(steps):
        text = batch(generator)
        logits = model(input_ids=text[:, :-1], use_cache=False).logits[:, DIGITS + 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, DIGITS + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _save(model: Any, directory: Path) -> None:
    """Saves a bf16 checkpoint with its tokenizer, laid out as on the Hugging Face hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN, unk_token="<pad>"))  # noqa: S106  a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model.to(torch.bfloat16).save_pretrained(directory)
    wrapped.save_pretrained(directory)
