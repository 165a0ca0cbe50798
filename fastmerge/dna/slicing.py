"""Model slicing: a smaller model out of some of the layers, channels, neurons, heads and experts of a larger one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.choices import chosen
from fastmerge.dna import importance
from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.cutting import Mended, check_rotation, plan_slicing
from fastmerge.dna.draft import Draft, Request
from fastmerge.dna.importance import Scores
from fastmerge.dna.kept import Kept, Sizes, choose, given_experts, sizes
from fastmerge.dna.layers import LayerSelection, choose_layers
from fastmerge.dna.parent import Parent
from fastmerge.dna.reading import Reader
from fastmerge.dna.refit import DAMPING, Rotation, components, refit_down
from fastmerge.errors import RecipeError
from fastmerge.keys import checked_seed

if TYPE_CHECKING:
    from fastmerge.dna.activations import Batch

log = logging.getLogger("fastmerge")


class ImportanceMetric(Enum):
    """What says which layers, channels, neurons, heads and experts count."""

    AUTO = "auto"
    """``activation`` where there is calibration data, else ``weight_norm``."""
    WEIGHT_NORM = "weight_norm"
    """Lengths of weights; no data."""
    ACTIVATION = "activation"
    """Mean magnitudes of activations (Minitron); layers by their block influence."""
    BI = "bi"
    """The same: block influence is how ``activation`` ranks layers (ShortGPT)."""
    GRADIENT = "gradient"
    """Magnitudes of the gradient of the language model's loss."""
    TAYLOR = "taylor"
    """Magnitudes of that gradient times the weight (LLM-Pruner)."""
    RANDOM = "random"
    """Random numbers: what any other has to beat."""


class Refit(Enum):
    """What makes up for neurons that are left out."""

    AUTO = "auto"
    """``lstsq`` where there is calibration data and a dense layer loses neurons, else ``none``."""
    NONE = "none"
    """Nothing."""
    LSTSQ = "lstsq"
    """``down_proj`` is fitted to give what it gave, by least squares over the calibration data."""


@dataclass(frozen=True, kw_only=True)
class ModelSlicingConfig:
    """How to slice a model; a target that is None leaves the axis as it is.

    Attributes:
        target_layers: number of layers.
        target_hidden_size: size of the residual stream.
        layer_selection: which layers: ``importance``, ``uniform``, ``first`` or ``last``.
        importance_metric: an :class:`ImportanceMetric`, or its value.
        preserve_first_last: the first and the last layer stay, and the others are ranked.
        calibration_data: token ids ``[B, T]``, a mapping with ``input_ids`` and perhaps ``attention_mask``, or any
            number of those.
        target_intermediate_size: inner size of MLPs; in proportion to the hidden size where that is sliced.
        target_moe_intermediate_size: the same of experts, where config.json has it apart.
        target_shared_intermediate_size: the same of shared experts.
        target_num_heads: query heads; groups that share keys and values stay whole.
        target_kv_heads: groups; together with ``target_num_heads`` groups may become smaller.
        target_experts: experts of each layer.
        expert_scores: scores of experts by layer, in place of those by the metric: lengths of the router's rows, or
            shares of the tokens.
        refit: a :class:`Refit`, or its value.
        damping: ridge of the refit, in units of the mean energy of a neuron that is kept.
        rotate: keep principal components of the residual stream in place of channels; needs calibration data.
        norm_correction: gains of norms make up for channels that are left out; needs calibration data.
        seed: of the metric ``random``.
    """

    target_layers: int | None = None
    target_hidden_size: int | None = None
    layer_selection: LayerSelection | str = LayerSelection.IMPORTANCE
    importance_metric: ImportanceMetric | str = ImportanceMetric.AUTO
    preserve_first_last: bool = True
    calibration_data: Any = None
    target_intermediate_size: int | None = None
    target_moe_intermediate_size: int | None = None
    target_shared_intermediate_size: int | None = None
    target_num_heads: int | None = None
    target_kv_heads: int | None = None
    target_experts: int | None = None
    expert_scores: Mapping[int, Sequence[float]] | None = None
    refit: Refit | str = Refit.AUTO
    damping: float = DAMPING
    rotate: bool = False
    norm_correction: bool = True
    seed: int = 0

    def sizes(self, of: Anatomy) -> Sizes:
        """The sizes of the result.

        Raises:
            RecipeError: with everything that is wrong with the targets, or where there are none.
        """
        targets = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("target_")}
        if all(t is None for t in targets.values()) and not self.rotate:
            raise RecipeError(f"nothing to slice: expected one of {', '.join(targets)}")
        found = sizes(
            of,
            layers=self.target_layers,
            hidden=self.target_hidden_size,
            heads=self.target_num_heads,
            kv_heads=self.target_kv_heads,
            experts=self.target_experts,
            inner={
                "ffn": self.target_intermediate_size,
                "expert_ffn": self.target_moe_intermediate_size,
                "shared_ffn": self.target_shared_intermediate_size,
            },
        )
        if found.layers < of.layers:  # what is wrong with that is said before anything is scored
            equal = [0.0] * of.layers
            choose_layers(
                of.layers,
                found.layers,
                self.layer_selection,
                scores=equal,
                preserve_first_last=self.preserve_first_last,
            )
        return found


def slice_model(
    model: Any,
    config: ModelSlicingConfig,
    *,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """A smaller model out of a larger one.

    Args:
        model: a transformers module, a state dictionary, or a path or hub id.
        config: what is asked for.
        model_config: of a state dictionary: config.json as a mapping.
        out: directory to write, for a model on disk.
        options: of :func:`fastmerge.dna.results.write`.

    Returns:
        As of :func:`fastmerge.dna.results.deliver`: a module for a module, and so on.

    Raises:
        RecipeError: with what is wrong with the request; nothing is written.
        CheckpointError: the model is not what its configuration says, or of an unknown architecture.
    """
    from fastmerge.dna.results import check_out, deliver

    parent = Parent.open(model, config=model_config)
    check_out(parent, out)
    return deliver(draft_slice(Study(parent, model, config), config), model, out, **options)


class Study:
    """What is known of a model before it is sliced: found once, for any number of slices.

    Attributes:
        anatomy: of the model.
        config: what is asked for.
        metric: that scores are found by.
        refit: what makes up for neurons.
        selection: of layers.
        data: calibration batches; empty for none.
    """

    def __init__(self, parent: Parent, model: Any, config: ModelSlicingConfig) -> None:
        """Reads headers, and checks what does not depend on sizes."""
        self.anatomy = anatomy(parent)
        self.config = config
        self._given = model
        self._module: Any = None
        metric = chosen("importance_metric", ImportanceMetric, config.importance_metric)
        self.refit = chosen("refit", Refit, config.refit)
        self.selection = chosen("layer_selection", LayerSelection, config.layer_selection)
        checked_seed(config.seed)
        self.data: list[Batch] = []
        if config.calibration_data is not None:
            from fastmerge.dna.activations import batches

            self.data = batches(config.calibration_data)
        if metric is ImportanceMetric.AUTO:
            metric = ImportanceMetric.ACTIVATION if self.data else ImportanceMetric.WEIGHT_NORM
        self.metric = ImportanceMetric.ACTIVATION if metric is ImportanceMetric.BI else metric
        wants = {
            "importance_metric": self.metric in _MEASURED and metric.value,
            "refit": self.refit is Refit.LSTSQ and self.refit.value,
            "rotate": config.rotate and "true",
        }
        problems = [
            f"{key}: {value} needs calibration_data: expected token ids, got none"
            for key, value in wants.items()
            if value and not self.data
        ]
        if not isinstance(config.damping, int | float) or not 0 <= config.damping < float("inf"):
            problems.append(f"damping: expected a number from 0, got {config.damping!r:.80}")
        if self.refit is Refit.LSTSQ and not self._dense(range(self.anatomy.layers)):
            problems.append("refit: lstsq is for dense layers, of which there are none: expected none")
        if config.expert_scores is not None and config.target_experts is None:
            problems.append("expert_scores: expected target_experts with them, got none")
        if problems:
            raise RecipeError(problems)
        self._experts = None if config.expert_scores is None else given_experts(self.anatomy, config.expert_scores)
        if config.rotate:
            check_rotation(self.anatomy)

    def _dense(self, layers: Iterable[int]) -> list[int]:
        """Layers that have no experts."""
        return [i for i in layers if not self.anatomy.is_sparse(i)]

    @property
    def module(self) -> Any:
        """The model as a module."""
        if self._module is None and hasattr(self._given, "state_dict"):
            self._module = self._given
        elif self._module is None:
            from fastmerge.dna.modules import opened

            self._module = opened(self.anatomy.parent, self.anatomy.arch.head)
        return self._module

    def scores(self) -> Scores:
        """Scores of everything; what activations do not show has those by weights."""
        of = self.anatomy
        if self.metric is ImportanceMetric.RANDOM:
            scores = importance.random_scores(of, self.config.seed)
        elif self.metric is ImportanceMetric.WEIGHT_NORM:
            scores = importance.weight_scores(of)
        elif self.metric is ImportanceMetric.ACTIVATION:
            from fastmerge.dna.activations import measure

            scores = measure(of, self.module, self.data)
            if of.arch.experts:
                scores.inner = importance.weight_scores(of).inner | scores.inner
        else:
            scores = importance.gradient_scores(of, self.module, self.data, self.metric.value)
        if self._experts is not None:
            scores.experts = self._experts
        scores.check(of.parent.ref)
        if self.data and self.config.norm_correction and not scores.energy:
            from fastmerge.dna.activations import measure

            scores.energy = measure(of, self.module, self.data).energy
        if self.config.rotate:
            scores.hidden = None
        return scores

    def rotation(self) -> Rotation | None:
        """The principal components of the residual stream, if they are asked for."""
        if not self.config.rotate:
            return None
        from fastmerge.dna.activations import covariance, energies

        basis = components(covariance(self.anatomy, self.module, self.data))
        energy = energies(self.anatomy, self.module, self.data, basis) if self.config.norm_correction else {}
        return Rotation(basis, energy)

    def fitted(self, kept: Kept) -> dict[int, Any]:
        """Weights of ``down_proj`` that are fitted to the neurons kept, of dense layers that lose some."""
        fits = self.refit is Refit.LSTSQ or (self.refit is Refit.AUTO and bool(self.data))
        layers = self._dense(kept.layers)
        if not fits or not layers or "ffn" not in kept.sizes.changed(Sizes.of(self.anatomy)):
            return {}
        from fastmerge.dna.activations import grams

        found = {}
        with Reader([self.anatomy.parent]) as reader:
            bring = reader.bring
            for layer, gram in grams(self.anatomy, self.module, self.data, layers):
                name = self.anatomy.find("down", layer)
                assert name is not None
                weight = importance.read(bring, self.anatomy.parent.tensors[name])
                fitted = refit_down(weight, gram, kept.inner["ffn", layer, None], damping=self.config.damping)
                found[layer] = np.ascontiguousarray(fitted, np.float32)
        return found


_MEASURED = frozenset({ImportanceMetric.ACTIVATION, ImportanceMetric.GRADIENT, ImportanceMetric.TAYLOR})


def draft_slice(study: Study, config: ModelSlicingConfig) -> Draft:
    """The draft of one slice: sizes, scores, choice and corrections."""
    of = study.anatomy
    wanted = config.sizes(of)
    changed = wanted.changed(Sizes.of(of))
    chosen_by_score = changed - ({"layers"} if study.selection is not LayerSelection.IMPORTANCE else set())
    scores = study.scores() if chosen_by_score - ({"hidden"} if config.rotate else set()) else Scores("none")
    kept = choose(of, wanted, scores, selection=study.selection, preserve_first_last=config.preserve_first_last)
    energy = scores.energy if config.norm_correction else {}
    mended = Mended(energy, study.fitted(kept), study.rotation())
    draft = plan_slicing(of, kept, request_of(of, config, wanted), mended)
    draft.seed = config.seed
    finish(draft, study, scores, kept)
    return draft


def finish(draft: Draft, study: Study, scores: Scores, kept: Kept) -> None:
    """What the report and the user are told."""
    draft.facts["metric"] = scores.metric
    if scores.layers is not None:
        draft.facts["layer_scores"] = [float(f"{s:.6g}") for s in scores.layers]
    ranked = len(kept.layers) < study.anatomy.layers and study.selection is LayerSelection.IMPORTANCE
    if ranked and scores.metric == importance.WEIGHT_NORM:
        draft.warnings.append(
            "layers were ranked by the lengths of their weights, which say little of what layers do: calibration_data "
            "ranks them by what they change"
        )


def request_of(of: Anatomy, config: ModelSlicingConfig, wanted: Sizes) -> Request:
    """What was asked for, as plain values."""
    options: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in ("calibration_data", "expert_scores") and value != f.default:
            options[f.name] = value.value if isinstance(value, Enum) else value
    options["sizes"] = {"layers": wanted.layers, "hidden": wanted.hidden, "heads": wanted.heads}
    options["sizes"] |= {"kv_heads": wanted.kv_heads, "experts": wanted.experts, **wanted.inner}
    if config.calibration_data is not None:
        options["calibrated"] = True
    return Request("slice", (of.parent.ref,), options)
