"""mergekit-extract-lora: the difference of two models as a LoRA adapter that peft loads.

Differences are fp32 from the models' own types; factors are rounded once, to the type of the models. What did not
change is left out (mergekit keeps it whole), so the adapter of a fine-tune that froze its embeddings has none.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import Checkpoint, Files, staging
from fastmerge.checkpoint.adapter import CONFIG, WEIGHTS, stored_transposed
from fastmerge.checkpoint.header import listing
from fastmerge.commands import display
from fastmerge.commands.mergekit import modules as sorting
from fastmerge.commands.mergekit.single import SingleFile, bytes_of, room
from fastmerge.dtypes import promote
from fastmerge.errors import BackendUnavailable, CheckpointError, OutputError
from fastmerge.planning import tied
from fastmerge.sizes import show_bytes

if TYPE_CHECKING:
    import torch

    from fastmerge.checkpoint import TensorInfo
    from fastmerge.commands.mergekit.flags import Settings
    from fastmerge.commands.mergekit.modules import Module

_PREFIX = "base_model.model."


class Options(NamedTuple):
    """mergekit-extract-lora's own flags, and ``exact``."""

    model: str
    base_model: str
    out_path: str
    max_rank: int = 128
    distribute_scale: bool = True
    embed_lora: bool = False
    modules_to_save: tuple[str, ...] = ()
    exclude_regex: tuple[str, ...] = ()
    include_regex: tuple[str, ...] = ()
    sv_epsilon: float = 0.0
    skip_undecomposable: bool = False
    exact: bool = False


class Extracted(NamedTuple):
    """What an adapter holds.

    Attributes:
        ranks: by module.
        whole: names of modules that are kept whole, as ``modules_to_save`` lists them.
        biases: how many biases of modules in ``ranks`` are kept.
        unchanged: tensors that are as the base has them.
        kept: share of the squared change of the decomposed matrices that their factors keep.
        nbytes: of the weights.
    """

    ranks: dict[str, int]
    whole: tuple[str, ...]
    biases: int
    unchanged: int
    kept: float
    nbytes: int

    def __str__(self) -> str:
        low, high = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        whole = f" ({', '.join(self.whole)})" if self.whole else ""
        return (
            f"{len(self.ranks)} modules of rank {low if low == high else f'{low} to {high}'}, which keep "
            f"{100 * self.kept:.1f} % of their squared change; {len(self.whole)} names of modules whole{whole}; "
            f"{self.unchanged} tensors unchanged and left out; {show_bytes(self.nbytes)}"
        )


def command(options: Options, settings: Settings) -> None:
    """Extracts, and says what came of it."""
    found = extract(
        options, device=settings.device, seed=settings.seed or 0, overwrite=settings.overwrite, card=settings.card
    )
    if not settings.quiet:
        display.say(f"{options.out_path}: {found}")


def extract(
    options: Options, *, device: str = "cpu", seed: int = 0, overwrite: bool = False, card: bool = True
) -> Extracted:
    """Writes the adapter; its directory appears complete or not at all.

    Memory: the two tensors of one module, their difference in fp32 and its decomposition.

    Args:
        options: models and what to do with which module.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU where there is one.
        seed: of the randomised decomposition.
        overwrite: replace an adapter that is there.
        card: write a README.md.

    Raises:
        FastMergeError: a subclass that says what is wrong.
    """
    target = staging.target_of(options.out_path)
    base, model = Checkpoint.open(options.base_model), Checkpoint.open(options.model)
    staging.check(target, [base.path, model.path], overwrite=overwrite)
    if target.exists() and not overwrite and any(target.iterdir()):
        raise OutputError(f"{target}: exists; --overwrite replaces it")
    chosen = sorting.sort(base, model, options)
    place = _device(device)
    staged = staging.Staging(target, {})
    try:
        staged.check_own()
        staged.clear()
        staged.data.mkdir()
        found = _Extraction(base, model, options, place, seed).run(chosen, staged.data / WEIGHTS)
        for checkpoint in (base, model):
            checkpoint.recheck()
        text = json.dumps(_config(options, found, model), indent=2) + "\n"
        (staged.data / CONFIG).write_text(text)
        if card:
            (staged.data / "README.md").write_text(_card(options, found), "utf-8")
        if target.exists() and not overwrite and any(target.iterdir()):
            raise OutputError(f"{target}: appeared meanwhile")
        staged.publish()
    finally:
        staged.release(remove=True)
    return found


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise BackendUnavailable(f"--device {name}: {first}; expected auto, cpu, cuda or cuda:N") from None
    return device


class _Extraction:
    """Reads, decomposes and writes module after module."""

    def __init__(self, base: Checkpoint, model: Checkpoint, options: Options, device: torch.device, seed: int) -> None:
        self._files = Files([base, model])
        self._model = model
        self._ends = set(tied.candidates(model.tensors))
        self._options = options
        self._device = device
        self._seed = seed
        self._ranks: dict[str, int] = {}
        self._biases = self._unchanged = 0
        self._change = self._lost = 0.0

    def run(self, chosen: list[Module], path: Path) -> Extracted:
        """Writes the weights.

        Raises:
            CheckpointError: a tensor changed for which an adapter has no place, or nothing changed.
        """
        with (
            self._files,
            SingleFile(path, room((_PREFIX + m.name + _LONGEST, 2) for m in chosen for _ in "AB2")) as file,
        ):
            self._check([m for m in chosen if m.fate == "equal"])
            whole = self._keep([m for m in chosen if m.fate == "whole"], file)
            for module in chosen:
                if module.fate == "bias":
                    self._bias(module, file)
                elif module.fate == "low rank":
                    self._decompose(module, file)
        if not self._ranks and not whole:
            raise CheckpointError(f"{self._options.model}: nothing to extract: it is as {self._options.base_model} is")
        kept = 1 - self._lost / self._change if self._change else 1.0
        return Extracted(self._ranks, whole, self._biases, self._unchanged, kept, path.stat().st_size)

    def _read(self, model: int, info: TensorInfo) -> torch.Tensor:
        import numpy as np
        import torch

        data = np.empty(max(info.nbytes, 1), np.uint8)
        self._files.read(np.array([[self._files.fd(model, info.file), info.offset, data.ctypes.data, info.nbytes]]))
        return torch.from_numpy(data[: info.nbytes]).view(getattr(torch, info.dtype.name)).reshape(info.shape)

    def _same(self, module: Module) -> bool:
        """Whether a tensor has the values that the base has."""
        import torch

        if module.base is None or module.base.dtype is not module.info.dtype:
            return False
        base, mine = (self._read(i, t).reshape(-1).view(torch.uint8) for i, t in enumerate((module.base, module.info)))
        return bool(torch.equal(base, mine))

    def _check(self, modules: list[Module]) -> None:
        """Tensors for which adapters have no place must not have changed."""
        changed = [m.info.name for m in modules if not self._same(m)]
        self._unchanged += len(modules)
        if changed:
            raise CheckpointError(
                f"{self._options.model}: changed, and no adapter can hold them: {listing(changed)}; "
                "--skip-undecomposable or --exclude-regex leaves them out"
            )

    def _keep(self, modules: list[Module], file: SingleFile) -> tuple[str, ...]:
        """Modules that are kept whole. Of one name, all are, or none: peft takes the copies by the name.

        Returns:
            The names.
        """
        changed = {m.name for m in modules if m.asked or not self._same(m)}
        names = sorting.suffixes(changed)
        for module in modules:
            if module.name.rpartition(".")[2] not in names:
                self._unchanged += 1
                continue
            self._copy(module.info, module.info.name, file)
            if f"{module.name}.weight" in self._ends and (head := sorting.tied_head(self._model, module.name)):
                self._copy(module.info, f"{head}.weight", file)
                names.append(head)
        return tuple(sorted(set(names)))

    def _bias(self, module: Module, file: SingleFile) -> None:
        """A bias that changed takes the place of the base's; peft calls the layer below its own ``base_layer``."""
        if self._same(module):
            self._unchanged += 1
        else:
            self._copy(module.info, f"{module.name}.base_layer.bias", file)
            self._biases += 1

    def _copy(self, info: TensorInfo, name: str, file: SingleFile) -> None:
        file.add(_PREFIX + name, info.dtype, info.shape, bytes_of(self._read(1, info)))

    def _decompose(self, module: Module, file: SingleFile) -> None:
        import torch

        from fastmerge.commands.mergekit.svd import truncated

        if module.base is None:
            raise ValueError(module.name)
        matrix = self._read(1, module.info).to(self._device).float()
        matrix -= self._read(0, module.base).to(self._device).float()
        if not matrix.any():
            self._unchanged += 1
            return
        change = float(matrix.square().sum(dtype=torch.float64))
        if not math.isfinite(change):
            raise CheckpointError(f"{module.info.name}: NaN or Inf in the difference; expected finite values")
        if module.table or module.transposed:
            matrix = matrix.T
        options = self._options
        u, s, vh = truncated(matrix, options.max_rank, name=module.name, seed=self._seed, exact=options.exact)
        rank = int((s > options.sv_epsilon).sum())
        self._change += change
        self._lost += max(change - float(s[:rank].double().square().sum()), 0.0)
        if not rank:
            return
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        root = s.sqrt()
        a, b = (root[:, None] * vh, u * root) if options.distribute_scale else (s[:, None] * vh, u)
        kind, last = ("lora_embedding", "") if module.table else ("lora", ".weight")
        dtype = promote(module.info.dtype, module.base.dtype)
        for side, factor in (("A", a), ("B", b)):
            stored = factor.to(getattr(torch, dtype.name)).cpu()
            file.add(f"{_PREFIX}{module.name}.{kind}_{side}{last}", dtype, stored.shape, bytes_of(stored))
        self._ranks[module.name] = rank


_LONGEST = ".lora_embedding_A.weight"


def _config(options: Options, found: Extracted, model: Checkpoint) -> dict[str, Any]:
    """adapter_config.json: scale 1 for every module, whatever its rank."""
    most = max(found.ranks.values(), default=options.max_rank)
    odd = {name: rank for name, rank in found.ranks.items() if rank != most}
    transposed = any(stored_transposed(f"{n}.weight", model.config.get("model_type")) for n in found.ranks)
    return {
        "base_model_name_or_path": options.base_model,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorting.suffixes(found.ranks),
        "modules_to_save": list(found.whole) or None,
        "bias": "lora_only" if found.biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "inference_mode": True,
    }


def _card(options: Options, found: Extracted) -> str:
    from fastmerge.report.card import adapter_card

    return adapter_card(Path(options.out_path).name, options.base_model, options.model, str(found))
