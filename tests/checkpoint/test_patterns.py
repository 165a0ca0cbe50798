"""Patterns of adapters: peft's matching, in bounded time."""

import re

import pytest

from fastmerge.checkpoint.patterns import Patterns

MODULES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "proj",
        "_proj",
        ".*_proj",
        "[qv]_proj",
        "[^q]_proj",
        "q_proj|v_proj",
        "layers.0.self_attn.q_proj",
        "model.layers.0",
        "^model.layers.1.mlp.up",
        r"layers\.(1|3|11)\..*proj",
        r"layers\.\d+\.mlp\.up$",
        "(?:self_attn|mlp).(up|q_proj)",
        "layers.1?[0-2].mlp.up",
        "layers.[0-9]{2}.+up",
        "layers..*?up",
        "q-proj",
        "Q_proj",
    ],
)
def test_the_end_of_a_name_from_a_dot_on(pattern):
    found = Patterns({pattern: True}, MODULES)
    want = {m for m in MODULES if re.match(rf"(.*\.)?({pattern})$", m)}
    assert {m for m in MODULES if found.find(m, default=False)} == want


def test_the_first_in_the_order_of_the_file():
    found = Patterns({"q_proj": 1, "layers.0.self_attn.q_proj": 2, ".*proj": 3}, MODULES)
    assert found.find("model.layers.0.self_attn.q_proj", 0) == 1
    assert found.find("model.layers.0.self_attn.v_proj", 0) == 3
    assert found.find("model.layers.0.mlp.up", 0) == 0


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a+)+", "only letters"),
        ("(a|b)*", "only letters"),
        ("(?!vision).*", "only letters"),
        (r"(a)\1", "only letters"),
        ("a*+", "only letters"),
        ("a)(b", "only letters"),
        ("(?i)a", "only letters"),
        ("[z-a]", "is not a regular expression"),
        ("(a", "is not a regular expression"),
        (".*" * 4, "too long"),
        ("a?" * 30 + "a" * 30, "too long"),
        ("(a|a)" * 40, "too long"),
        ("(a|a)" * 4000, "too long"),
        ("a" * 100 + ".*" * 5, "too long"),
    ],
)
def test_what_may_take_too_long_is_refused_at_once(pattern, said):
    with pytest.raises(ValueError, match=said):
        Patterns({pattern: 1}, [*MODULES, "a" * 500])


def test_so_are_too_many_patterns():
    with pytest.raises(ValueError, match="too long"):
        Patterns({f"layers.*{i}.q": 1 for i in range(20000)}, MODULES)
