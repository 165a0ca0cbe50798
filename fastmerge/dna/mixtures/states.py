"""States of prompts inside a dense model: what the router that takes its MLP's place will see. Needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.mixtures.gates import tokenizer_of
from fastmerge.dna.parent import Parent
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import numpy.typing as npt

F64: TypeAlias = "npt.NDArray[np.float64]"


class States:
    """Mean states of prompts, by layer.

    A state is the input of a layer's MLP, of the last token of a prompt or the mean over its tokens; prompts count
    alike, whatever their length. As mergekit 0.1.5 has them (``theirs``): the input of the layer, in bf16, of all
    prompts side by side, padded on the left; the mean counts the padding.

    Args:
        base: the model, for its tokenizer and its path.
        model: its anatomy.
        given: a transformers module, or None to load one.
        tokenizer: of transformers, or None for the model's.
        device: on which a loaded one runs.
        mode: ``hidden``, ``hidden_last`` or ``hidden_avg``.
        theirs: mergekit's.
    """

    def __init__(
        self, base: Parent, model: Anatomy, given: Any, tokenizer: Any, device: str, *, mode: str, theirs: bool
    ) -> None:
        self._tokenizer = tokenizer_of(base) if tokenizer is None else tokenizer
        self._average, self._theirs = mode == "hidden_avg", theirs
        if isinstance(given, torch.nn.Module):
            self._model = given
        elif base.checkpoint is not None:
            from transformers import AutoModelForCausalLM

            dtype = torch.bfloat16 if theirs else "auto"
            with _quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(str(base.checkpoint.path), dtype=dtype)
            best = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = loaded.to(best if device == "auto" else device.partition(",")[0])
        else:
            raise RecipeError(f"{base.ref}: expected a module or a model on disk, for states of prompts")
        some = [model.find("gate", i) or model.find("gate_up", i) for i in range(model.layers)]
        self._blocks = [str(name).rpartition(".")[0].rpartition(".")[0] for name in some]

    def __call__(self, prompts: Sequence[str]) -> F64:
        """``[layers, hidden]``."""
        was = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                return self._as_theirs(prompts) if self._theirs else self._seen(prompts)
        finally:
            self._model.train(was)

    def _seen(self, prompts: Sequence[str]) -> F64:
        """One prompt after the other: nothing is padded."""
        device = next(self._model.parameters()).device
        states: list[torch.Tensor] = []

        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][0].double()
            states.append((x.mean(dim=0) if self._average else x[-1]).cpu())

        handles = [self._model.get_submodule(b).register_forward_pre_hook(keep) for b in self._blocks]
        try:
            for prompt in prompts:
                text = (self._tokenizer.bos_token or "") + prompt
                ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                self._model(input_ids=ids.to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found: F64 = torch.stack(states).reshape(len(prompts), len(self._blocks), -1).mean(dim=0).numpy()
        return found

    def _as_theirs(self, prompts: Sequence[str]) -> F64:
        words = self._tokenizer
        sides = words.padding_side, words.pad_token
        words.padding_side, words.pad_token = "left", words.bos_token or words.eos_token
        try:
            texts = [(words.bos_token or "") + p for p in prompts]
            batch = words(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        finally:
            words.padding_side, words.pad_token = sides
        batch = batch.to(next(self._model.parameters()).device)
        said = self._model(**batch, output_hidden_states=True, return_dict=True).hidden_states[:-1]
        states = torch.stack(said)
        states = states.sum(dim=2) / states.shape[2] if self._average else states[:, :, -1]
        found: F64 = (states.sum(dim=1) / states.shape[1]).double().cpu().numpy()
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers shows."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
