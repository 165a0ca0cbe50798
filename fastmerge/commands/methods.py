"""``fastmerge methods``: every method from its declaration."""

from __future__ import annotations

import textwrap

from fastmerge.methods import METHODS, get
from fastmerge.methods.base import REQUIRED, Method, Param


def overview() -> str:
    """One line per method."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {m.summary}" for name, m in METHODS.items())


def describe(name: str) -> str:
    """Formula, parameters, presets and paper of one method.

    Raises:
        RecipeError: for an unknown name, with the nearest known one.
    """
    method = get(name)
    rule = method.contract
    models = f"{rule.least}" if rule.most == rule.least else f"{rule.least} to {rule.most or 'any number'}"
    doc = textwrap.dedent("    " + (method.__doc__ or "")).strip()
    lines = [f"{name}: {method.summary}", "", doc, "", f"formula   {method.formula}", f"paper     {method.paper}"]
    lines += [f"inputs    {models} models, base {rule.base}", f"backends  {_backends(method)}", "", "parameters"]
    lines += [f"  {p.name:<16} {_kind(p):<28} {p.doc}" for p in method.params] or ["  none"]
    if method.presets:
        lines += ["", "presets"]
        for preset, values in method.presets.items():
            text = ", ".join(f"{k}={_word(v)}" for k, v in values.items())
            lines.append(f"  {preset:<16} {text or 'the defaults'}")
    return "\n".join(lines)


def _backends(method: type[Method]) -> str:
    """Which backends have kernels for it; the others run its definition."""
    if not method.programmed():
        return "its definition (plain torch, whole tensors) on every device; it has no kernels yet"
    if method.needs:
        return "native (on host memory); its definition on other devices"
    also = f" and with {method.only_defined}" if method.only_defined else ""
    return f"native, triton; its definition (plain torch) by name{also}"


def _word(value: object) -> str:
    if value is REQUIRED:
        return "[required]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(p: Param) -> str:
    kind = "|".join(p.type) if isinstance(p.type, tuple) else p.type.__name__
    default = "required" if p.default is REQUIRED else _word(p.default)
    per = {"shared": "", "model": " per model", "input": " per input"}[p.scope]
    return f"{kind}{per} [{default}]"
