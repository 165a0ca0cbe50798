"""Wider models: more channels, units and heads, which compute what the model computed (Net2Wider)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

from fastmerge.choices import chosen
from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.axes import Growth, channels, heads, units
from fastmerge.dna.draft import MOST_UNITS, Draft, Request
from fastmerge.dna.growth import FIELDS, FIELDS_OF, GrowthMethod, Initialization, ModelGrowthConfig, NewUnits, WidthMode
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import deliver
from fastmerge.dna.widening import Widening
from fastmerge.dtypes import FLOATS
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.ops.replicate import MOST_SIGMA

MAP = "growth_map.json"
"""The file that says of which old entry each new one is, so that a trainer can do the same to its own state."""

DIVIDES = ("llama", "gemma2", "gemma3_text")
"""Types of models whose hidden size transformers wants to be a multiple of the number of heads."""

NO_HEAD_DIM = ("olmoe",)
"""Types of models whose heads are hidden_size / num_attention_heads large, whatever their head_dim says."""


def plan_width(parent: Parent, config: ModelGrowthConfig, *, rms: Mapping[str, float] | None = None) -> Draft:
    """The model that :func:`grow_model_width` makes. Reads headers only.

    Args:
        parent: the model.
        config: how it grows.
        rms: root mean square of each tensor that gets fresh weights: :func:`fresh_rms`; needed where there is one, and
            noise is relative and not 0.

    Raises:
        RecipeError: with every option that does not fit the model, and everything that would change what it computes.
        CheckpointError: as of :func:`~fastmerge.dna.anatomy.anatomy`; weights that are to change are no
            floating-point numbers.
    """
    wide, warnings = _widening(anatomy(parent), config, rms)
    model = wide.model
    absent = [name for name in wide.fresh if wide.rms is not None and name not in wide.rms]
    if absent:
        raise RecipeError(f"noise_mode relative: expected the root mean square of {absent[0]} (fresh_rms), got none")
    draft = Draft(_request(parent, config), (parent,), _config(wide), seed=config.seed, warnings=warnings)
    matched: dict[str, int] = {}
    wrong = []
    for name, place in model.places.items():
        if wide.add(draft, name, place):
            matched[place.part.role] = matched.get(place.part.role, 0) + 1
            if parent.tensors[name].dtype not in FLOATS:
                wrong.append(f"{name}: expected floating-point numbers, got {parent.tensors[name].dtype.name}")
    if wrong:
        raise CheckpointError(wrong)
    about = {"head_dim": model.sizes["head_dim"], "mode": wide.mode, "seed": config.seed}
    axes = {axis: growth.facts() for axis, growth in wide.growths.items()}
    draft.files[MAP] = (json.dumps({**about, "axes": axes}) + "\n").encode()
    draft.facts |= {
        "mode": wide.mode,
        "exact": not warnings,
        "axes": {axis: {"old": g.old, "new": g.new} for axis, g in wide.growths.items()},
        "matched": matched,
        "fresh": len(wide.fresh),
        "map": MAP,
    }
    return draft


def grow_model_width(
    model: Any,
    config: ModelGrowthConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Makes a model wider that computes what it computed.

    Channels of the residual stream, units of MLPs, heads and heads of keys and values become more. What writes a
    replica is a copy, and what reads replicas is split between them, exactly in any type::

        W x = W'_1 x + W'_2 x + ...        W'_1 + W'_2 + ... = W without any rounding

    Shares are random, of each element by itself, so that replicas learn different things (equal ones with
    ``noise_std`` 0). How the stream grows to a size that is no multiple says :class:`~fastmerge.dna.growth.WidthMode`.
    Logits are the same but for the rounding of sums in another order: within 2e-6 of the largest in fp32, and in bf16,
    for whole multiples, bit for bit but for a last place now and then. Gemma multiplies its embedding by sqrt(D), in
    the weights' type: there the stream of a bf16 model grows exactly by four alone, else within bf16's accuracy.

    Args:
        model: a transformers module, a state dictionary, or where a model is on disk; it is not changed.
        config: how it grows.
        out: directory to write, for a model on disk. It has ``growth_map.json`` as well, which says of each new entry
            of an axis which old one it is of.
        model_config: of a state dictionary: its ``config.json``.
        options: of :func:`~fastmerge.dna.results.deliver`.

    Returns:
        What :func:`~fastmerge.dna.results.deliver` gives for such a model.

    Raises:
        RecipeError: as of :func:`plan_width`.
        CheckpointError: as of :func:`plan_width`, or what ``out`` says does not fit the model.
    """
    parent = Parent.open(model, config=model_config)
    return deliver(plan_width(parent, config, rms=fresh_rms(parent, config)), model, out, **options)


def fresh_rms(parent: Parent, config: ModelGrowthConfig) -> dict[str, float]:
    """Root mean squares, in fp64, of the tensors that get fresh weights in units of them. Reads those, in panels.

    Raises:
        RecipeError: as of :func:`plan_width`.
        CheckpointError: as of :func:`plan_width`; a tensor holds NaN or Inf.
    """
    wide, _ = _widening(anatomy(parent), config, {})
    if wide.rms is None or not wide.fresh:
        return {}
    from fastmerge.dna.measure import root_mean_squares

    return root_mean_squares(parent, wide.fresh)


def _widening(model: Anatomy, config: ModelGrowthConfig, rms: Mapping[str, float] | None) -> tuple[Widening, list[str]]:
    """What is asked for, and what of it will not be exact.

    Raises:
        RecipeError: with every problem.
    """
    words = _words(config)
    problems: list[str] = []
    if words["method"] == "net2deeper":
        problems.append("method: expected net2wider or bert2bert, got net2deeper, which adds layers (grow_model_depth)")
    if words["initialization"] == "aki" and words["method"] != "bert2bert":
        problems.append(f"initialization: aki is of method bert2bert, got {words['method']}")
    sizes, explicit = _sizes(model, config, problems)
    if problems:
        raise RecipeError(problems)
    growths = {a: units(a, model.sizes[a], n, copies=words["units"] == "copy") for a, n in sizes.items() if a in _INNER}
    mode = words["mode"]
    inexact = _heads(model, sizes, explicit, growths, problems, copies=words["units"] == "copy")
    if "hidden" in sizes:
        old, new = model.sizes["hidden"], sizes["hidden"]
        if mode == "auto":
            mode = "duplicate" if new % old == 0 else "scaled" if model.arch.post_norm else "zero"
        if mode == "duplicate" and new % old:
            inexact.append(f"mode duplicate: expected a multiple of hidden_size {old}, got {new}; zero and scaled fit")
        growths["hidden"] = channels(old, new, mode)
        eps = model.config.get("rms_norm_eps")
        if mode == "zero" and (not isinstance(eps, int | float) or isinstance(eps, bool)):
            problems.append(f"config.json: rms_norm_eps: expected a number, which mode zero scales, got {eps!r:.80}")
    hidden, total = (growths[a].new if a in growths else model.sizes[a] for a in ("hidden", "heads"))
    if model.arch.model_type in DIVIDES and hidden % total:
        wants = f"transformers wants that of {model.arch.model_type}"
        problems.append(f"hidden_size: expected a multiple of num_attention_heads {total} ({wants}), got {hidden}")
    if model.arch.model_type in NO_HEAD_DIM and hidden != total * model.sizes["head_dim"]:
        problems.append(
            f"hidden_size: expected num_attention_heads {total} x {model.sizes['head_dim']} "
            f"({model.arch.model_type} knows no head_dim), got {hidden}"
        )
    if words["initialization"] == "aki":
        inexact.append("initialization aki: new units are from the next layer, so the model computes something else")
    growths = {axis: growth for axis, growth in growths.items() if not growth.identity}
    if not growths and not problems:
        problems.append("nothing would grow: every size is as it was")
    if config.preserve_output:
        problems += [f"{text} (preserve_output=False does it all the same)" for text in inexact]
    if problems:
        raise RecipeError(problems)
    wide = Widening(
        model,
        growths,
        mode=mode if "hidden" in growths else "duplicate",
        sigma=float(config.noise_std),
        rms=(rms or {}) if words["noise_mode"] == "relative" else None,
        knowledge=words["initialization"] == "aki",
        seed=config.seed,
    )
    return wide, [f"not exact: {text}" for text in inexact]


_INNER = ("ffn", "expert_ffn", "shared_ffn")


def _words(config: ModelGrowthConfig) -> dict[str, str]:
    """The options that are words."""
    kinds = {"method": GrowthMethod, "mode": WidthMode, "units": NewUnits, "initialization": Initialization}
    words, problems = {}, []
    for key, kind in kinds.items():
        try:
            words[key] = str(chosen(key, kind, getattr(config, key)).value)
        except RecipeError as error:
            problems += error.problems
    given = config.noise_mode
    words["noise_mode"] = str(given.value if isinstance(given, Enum) else given)
    if words["noise_mode"] not in ("relative", "absolute"):
        problems.append(f"noise_mode: expected relative or absolute, got {given!r:.80}")
    if not isinstance(config.seed, int) or isinstance(config.seed, bool):
        problems.append(f"seed: expected a whole number, got {config.seed!r:.80}")
    if not _number(config.noise_std) or not 0 <= config.noise_std <= MOST_SIGMA:
        problems.append(f"noise_std: expected a number from 0 to 2**100, got {config.noise_std!r:.80}")
    if problems:
        raise RecipeError(problems)
    return words


def _sizes(model: Anatomy, config: ModelGrowthConfig, problems: list[str]) -> tuple[dict[str, int], bool]:
    """New sizes by axis, and whether they were given one by one."""
    parts = {a for place in model.places.values() for axis in place.part.axes for a in _names(axis)}
    here = {"hidden", "heads", "kv_heads"} | {a for a in _INNER if a in parts}
    given = {axis: getattr(config, key) for key, axis in FIELDS.items() if getattr(config, key) is not None}
    sizes = {}
    for axis, size in given.items():
        old = model.sizes.get(axis) if axis in here else None
        if old is None:
            problems.append(f"{FIELDS_OF[axis]}: a {model.arch.model_type} of this kind has no such size to grow")
        elif not isinstance(size, int) or isinstance(size, bool) or not old <= size <= MOST_UNITS:
            problems.append(
                f"{FIELDS_OF[axis]}: expected a whole number from {old}, which it is now, to {MOST_UNITS}, "
                f"got {size!r:.80}"
            )
        else:
            sizes[axis] = size
    factor = config.width_multiplier
    if not given:
        if not _number(factor) or not 1 <= factor <= 2**20:
            problems.append(f"width_multiplier: expected a number above 1, got {factor!r:.80}")
            return {}, False
        exact = {axis: model.sizes[axis] * factor for axis in sorted(here)}
        sizes = {axis: round(size) for axis, size in exact.items()}
        if max(sizes.values()) > MOST_UNITS:
            problems.append(f"width_multiplier: expected sizes up to {MOST_UNITS}, got {max(sizes.values())}")
        broken = {axis for axis, size in exact.items() if abs(size - sizes[axis]) > 1e-6}
        if "hidden" in broken:
            problems.append(
                f"width_multiplier: expected a whole hidden_size, got {factor} x {model.sizes['hidden']} = "
                f"{exact['hidden']:g}; hidden_size={sizes['hidden']} is near"
            )
        if broken & {"heads", "kv_heads"}:
            del sizes["heads"], sizes["kv_heads"]
    if _counted(model) and "shared_ffn" in here:
        if "shared_ffn" in given:
            problems.append("shared_expert_intermediate_size: moe_intermediate_size times n_shared_experts decides it")
        number = model.sizes["shared_ffn"] // model.sizes["expert_ffn"]
        sizes["shared_ffn"] = number * sizes.get("expert_ffn", model.sizes["expert_ffn"])
    return sizes, bool(given)


def _heads(
    model: Anatomy,
    sizes: Mapping[str, int],
    explicit: bool,
    growths: dict[str, Growth],
    problems: list[str],
    *,
    copies: bool,
) -> list[str]:
    """Adds how heads grow; what of that is not exact. Where a multiplier does not fit them, they stay as they are."""
    old = model.sizes["heads"], model.sizes["kv_heads"]
    new = sizes.get("heads", old[0]), sizes.get("kv_heads", old[1])
    try:
        found = heads(old, new, copies=copies)
    except RecipeError as error:
        problems += error.problems if explicit else []
        return []
    inexact = []
    for growth, role in zip(found, ("q_norm", "k_norm"), strict=True):
        wide = any(p.part.role == role and p.part.axes[0] != "head_dim" for p in model.places.values())
        if wide and not growth.uniform:
            inexact.append(
                f"{FIELDS_OF[growth.axis]}: {role} spans all heads, of which each must have as many replicas: expected "
                f"copies, and a multiple of {growth.old}, got {growth.new}"
            )
    if inexact and not explicit:
        return []
    growths.update({growth.axis: growth for growth in found})
    return inexact


def _names(axis: Any) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)


def _counted(model: Anatomy) -> bool:
    """Whether config.json counts shared experts, each as large as the others."""
    return model.arch.sizes.get("shared_ffn") == "n_shared_experts"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _config(wide: Widening) -> dict[str, Any]:
    """The configuration of the result."""
    model, config = wide.model, copy.deepcopy(dict(wide.model.config))
    keys = {**FIELDS_OF, **{axis: key for axis, key in model.arch.sizes.items() if axis in FIELDS_OF}}
    for axis, growth in wide.growths.items():
        if axis != "shared_ffn" or not _counted(model):
            config[keys[axis]] = growth.new
    new = {a: wide.growths[a].new if a in wide.growths else model.sizes[a] for a in ("hidden", "heads", "kv_heads")}
    if "heads" in wide.growths:
        config["num_key_value_heads"] = new["kv_heads"]
    if config.get("head_dim") is None and (
        "head_dim" in config or new["hidden"] // new["heads"] != model.sizes["head_dim"]
    ):
        config["head_dim"] = model.sizes["head_dim"]
    if wide.mode == "zero":
        config["rms_norm_eps"] = config["rms_norm_eps"] / wide.ratio
    return config


def _request(parent: Parent, config: ModelGrowthConfig) -> Request:
    options = {}
    for key, value in asdict(config).items():
        plain = value.value if isinstance(value, Enum) else value
        options[key] = plain if plain is None or isinstance(plain, bool | int | float | str) else list(plain)
    return Request("grow-width", (parent.ref,), options)
