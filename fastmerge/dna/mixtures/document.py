"""What a mixture of dense models is made of: mergekit-moe's YAML, and the same as values."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from fastmerge.dtypes import BY_NAME, FLOATS
from fastmerge.errors import RecipeError, hint

if TYPE_CHECKING:
    from fastmerge.recipe.problems import Problems
    from fastmerge.recipe.tree import Loc

GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
RANDOM = GATE_MODES[4:]
ROUTERS = ("centred", "mergekit")


@dataclass(frozen=True)
class Expert:
    """One expert of every layer: the MLPs of a dense model.

    Attributes:
        source_model: a path or hub id; in Python also a module or a state dictionary.
        positive_prompts: texts that should be sent to it.
        negative_prompts: texts that should not.
        noise_scale: standard deviation of normal noise on its weights.
        residual_scale: factor of its output.
    """

    source_model: Any
    positive_prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        """Takes lists for tuples, and nothing for what mergekit has there."""
        for key, nothing in (("noise_scale", 0.0), ("residual_scale", 1.0)):
            if getattr(self, key) is None:
                object.__setattr__(self, key, nothing)
        for key in ("positive_prompts", "negative_prompts"):
            given = getattr(self, key)
            object.__setattr__(self, key, () if given is None else tuple(given) if isinstance(given, list) else given)


@dataclass(frozen=True)
class TrunkConfig:
    """What everything but the MLPs is, where it is not the base model's.

    Attributes:
        merge_method: of the experts' models, in their order and each once; one that works on task vectors takes
            ``base_model`` for its base.
        parameters: of that method, as of :func:`fastmerge.merge_tensors`; ``linear`` without any is the mean (BTX).
        preset: a published variant of it.
    """

    merge_method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None


@dataclass(frozen=True)
class MoEMergeConfig:
    """Dense models of one architecture as one mixture of experts. Names and defaults are mergekit-moe's.

    Attributes:
        base_model: gives everything but the experts, the configuration, and the hidden states of prompts.
        experts: in the order of the router's rows.
        gate_mode: where the router's rows come from: ``hidden`` and ``hidden_last`` (the state of a prompt's last
            token), ``hidden_avg`` (the mean over its tokens), ``cheap_embed`` (the mean of its tokens' embeddings: no
            run of the model), ``random`` (normal), ``uniform_random`` (as ``torch.nn.Linear``).
        dtype: of the result; the base model's where absent.
        experts_per_token: how many experts a token passes.
        shared_experts: one at most, which every token passes, where the architecture has such a one.
        architecture: of the result: ``mixtral``, ``qwen``, ``qwen3`` or a ``model_type``; the first that fits.
        router: ``centred``: the states are those that the router will see, and a row of length ``router_scale`` is an
            expert's mean state without what all of them have in common; ``mergekit``: its 0.1.5's rows, of the input of
            the layer, in bf16, of length 1 (random ones: of standard deviation 1).
        router_scale: length of a row: how decided the router is.
        trunk: a method that merges everything but the experts; the base model's where absent.
        allow_same: take prompts or models that are the same for all experts: such a mixture wants training.
        seed: of noise and random rows.
    """

    base_model: Any
    experts: Sequence[Expert]
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int = 2
    shared_experts: Sequence[Expert] = ()
    architecture: str | None = None
    router: str = "centred"
    router_scale: float = 1.0
    trunk: TrunkConfig | None = None
    allow_same: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Takes an Enum's member for its value.

        Raises:
            RecipeError: with everything that is wrong.
        """
        for key in ("gate_mode", "router"):
            given = getattr(self, key)
            if isinstance(given, Enum):
                object.__setattr__(self, key, given.value)
        for key in ("experts", "shared_experts"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if problems := self._problems():
            raise RecipeError(problems)

    @property
    def prompted(self) -> bool:
        """Whether the router's rows come from prompts."""
        return self.gate_mode not in RANDOM

    def _problems(self) -> list[str]:
        found = []
        for key, words in (("gate_mode", GATE_MODES), ("router", ROUTERS)):
            given = getattr(self, key)
            if given not in words:
                found.append(f"{key}: expected one of {', '.join(words)}, got {given!r:.80}{hint(str(given), words)}")
        if self.dtype is not None and BY_NAME.get(str(self.dtype).removeprefix("torch.")) not in FLOATS:
            known = ", ".join(d.name for d in FLOATS)
            found.append(f"dtype: expected one of {known}, got {self.dtype!r:.80}")
        k, e = self.experts_per_token, len(self.experts)
        if not self.experts:
            found.append("experts: expected at least one")
        elif type(k) is not int or not 1 <= k <= e:
            found.append(
                f"experts_per_token: expected a whole number in 1 .. {e}, the number of experts, got {k!r:.80}"
            )
        if not _number(self.router_scale) or self.router_scale <= 0:
            found.append(f"router_scale: expected a number above 0, got {self.router_scale!r:.80}")
        if len(self.shared_experts) > 1:
            found.append(f"shared_experts: expected one at most, got {len(self.shared_experts)}")
        for where, experts in (("experts", self.experts), ("shared_experts", self.shared_experts)):
            found += [f"{where}[{i}]: {p}" for i, one in enumerate(experts) for p in _problems_of(one)]
        trunk: object = self.trunk
        if trunk is not None and not isinstance(trunk, TrunkConfig):
            found.append(f"trunk: expected a TrunkConfig, got {type(trunk).__name__}")
        return found or self._same()

    def _same(self) -> list[str]:
        """What makes all experts one."""
        found = []
        if self.prompted:
            found += [f"experts[{i}]: positive_prompts: expected some, as gate_mode is {self.gate_mode}"
                      for i, one in enumerate(self.experts) if not one.positive_prompts]  # fmt: skip
        if found or self.allow_same or len(self.experts) == 1:
            return found
        prompts = {(tuple(e.positive_prompts), tuple(e.negative_prompts)) for e in self.experts}
        if self.prompted and len(prompts) == 1:
            found.append("experts: all have the same prompts, so that no router could tell them apart")
        first = self.experts[0]
        noisy = any(e.noise_scale for e in self.experts)
        if self.prompted and not noisy and all(_alike(e.source_model, first.source_model) for e in self.experts):
            found.append(
                "experts: all are the same model, so that the mixture computes what that does; allow_same "
                "(--i-understand-this-is-not-useful-without-training) takes it as a start of training"
            )
        return found

    def options(self) -> dict[str, Any]:
        """As values that YAML can hold; models are numbered as :func:`models` has them."""
        numbers = {id(m): i for i, m in enumerate(models(self))}
        every = [*self.experts, *self.shared_experts]
        plain = [{**_plain(e), "source_model": numbers[id(canonical(e.source_model, self))]} for e in every]
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _APART}
        out["experts"], out["shared_experts"] = plain[: len(self.experts)], plain[len(self.experts) :]
        if self.trunk is not None:
            out["trunk"] = dataclasses.asdict(self.trunk)
        return out


_APART = ("base_model", "experts", "shared_experts", "trunk", "seed", "allow_same")


def models(config: MoEMergeConfig) -> list[Any]:
    """Every model once, the base first."""
    found = [config.base_model]
    for one in [*config.experts, *config.shared_experts]:
        if not any(_alike(one.source_model, m) for m in found):
            found.append(one.source_model)
    return found


def canonical(model: Any, config: MoEMergeConfig) -> Any:
    """The one of :func:`models` that a model is."""
    return next(m for m in models(config) if _alike(m, model))


def _alike(a: Any, b: Any) -> bool:
    """Whether two say the same model."""
    if a is b:
        return True
    paths = isinstance(a, str | os.PathLike) and isinstance(b, str | os.PathLike)
    return paths and (str(a) == str(b) or (os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)))  # noqa: PTH110


def _plain(expert: Expert) -> dict[str, Any]:
    found = {f.name: getattr(expert, f.name) for f in dataclasses.fields(expert) if f.name != "source_model"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def _problems_of(expert: object) -> list[str]:
    if not isinstance(expert, Expert):
        return [f"expected an Expert, got {type(expert).__name__}"]
    found = []
    for key in ("positive_prompts", "negative_prompts"):
        given = getattr(expert, key)
        if not isinstance(given, tuple) or not all(isinstance(p, str) and p.strip() for p in given):
            found.append(f"{key}: expected a list of texts, got {given!r:.80}")
    if not _number(expert.noise_scale) or expert.noise_scale < 0:
        found.append(f"noise_scale: expected a number of 0 or more, got {expert.noise_scale!r:.80}")
    if not _number(expert.residual_scale):
        found.append(f"residual_scale: expected a number, got {expert.residual_scale!r:.80}")
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TOKENIZER = ("tokenizer_source", "tokenizer")
"""Keys of mergekit-yaml's files that people leave in; the tokenizer is the base's, whose embeddings the result has."""


def read(
    source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False, **fields: Any
) -> tuple[MoEMergeConfig, list[str]]:
    """A file for mergekit-moe, or its text.

    Args:
        source: a path, YAML, or a mapping.
        strict: whether keys that nothing reads are errors.
        fields: of the configuration, in place of what the file says.

    Returns:
        The configuration, and warnings.

    Raises:
        RecipeError: with everything that is wrong, and where.
    """
    from fastmerge.recipe.load import text_of
    from fastmerge.recipe.problems import Problems
    from fastmerge.recipe.tree import Map, Seq

    trees, name = text_of(source)
    tree = trees[0]
    problems = Problems(name, tree, strict=strict)
    if len(trees) > 1:
        problems.add((), f"expected one document, got {len(trees)}")
    if "merge_method" in tree:
        problems.add(("merge_method",), "this is a recipe: 'fastmerge merge' merges it")
    known = {f.name for f in dataclasses.fields(MoEMergeConfig)}
    _stray(problems, tree, (), {*known, "merge_method", *_TOKENIZER})
    for key in _TOKENIZER:
        given = tree.get(key)
        given = given.get("source") if isinstance(given, Map) else given
        if given not in (None, "base", tree.get("base_model")):
            problems.add((key,), "the embeddings are the base model's, and so is the tokenizer: expected base")
    found: dict[str, Any] = {k: v for k, v in tree.items() if k in known and v is not None}
    if "base_model" in found:
        found["base_model"] = _model(problems, found["base_model"], ("base_model",))
    for key in ("experts", "shared_experts"):
        if key in found and not isinstance(found[key], Seq):
            problems.add((key,), "expected a list")
            del found[key]
        elif key in found:
            found[key] = [_expert(problems, one, (key, i)) for i, one in enumerate(found[key])]
    if "trunk" in found:
        found["trunk"] = _trunk(problems, found["trunk"])
    problems.check()
    missing = [key for key in ("base_model", "experts") if key not in found]
    if missing:
        raise RecipeError([f"{name}: {key}: this key is required" for key in missing])
    return MoEMergeConfig(**{**found, **fields}), list(problems.origin.warnings)


def _expert(problems: Problems, given: Any, loc: Loc) -> Expert:
    from fastmerge.recipe.tree import Map

    known = [f.name for f in dataclasses.fields(Expert)]
    if not isinstance(given, Map) or "source_model" not in given:
        problems.add(loc, "expected a mapping with 'source_model'")
        return Expert("")
    _stray(problems, given, loc, set(known))
    found = {k: v for k, v in given.items() if k in known and v is not None}
    found["source_model"] = _model(problems, found.get("source_model"), (*loc, "source_model"))
    return Expert(**found)


def _trunk(problems: Problems, given: Any) -> TrunkConfig | None:
    from fastmerge.recipe.tree import Map

    known = [f.name for f in dataclasses.fields(TrunkConfig)]
    if not isinstance(given, Map) or not isinstance(given.get("merge_method"), str):
        problems.add(("trunk",), "expected a mapping with 'merge_method'")
        return None
    _stray(problems, given, ("trunk",), set(known))
    return TrunkConfig(**{k: v for k, v in given.items() if k in known and v is not None})


def _model(problems: Problems, given: Any, loc: Loc) -> str:
    from fastmerge.recipe.refs import model_ref

    try:
        ref = model_ref(given)
    except ValueError as error:
        problems.add(loc, str(error))
        return ""
    if ref.lora is not None:
        problems.add(loc, f"{ref}: an adapter: 'fastmerge lora bake' makes a model of both first")
    return str(ref)


def _stray(problems: Problems, given: Mapping[str, Any], loc: Loc, known: set[str]) -> None:
    """Keys that nothing reads; mergekit ignores them without a word."""
    from fastmerge.recipe.problems import misspelt

    for key in given:
        if key in known:
            continue
        meant = None if key.startswith(("x-", "_", ".")) else misspelt(key, sorted(known), set(given))
        listed = f"known here: {', '.join(sorted(known))}"
        if meant:
            problems.add((*loc, key), f"unknown key (did you mean {meant!r}?); {listed}")
        else:
            problems.warn((*loc, key), f"unknown key, ignored; {listed}")
