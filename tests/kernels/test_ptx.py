"""Packed fp32 operations are taken apart, and nothing else of a program is touched."""

import pytest

pytest.importorskip("triton", reason="the module looks at triton's knobs")

from fastmerge.kernels._ptx import scalar, unpacked


def test_packed_operations_become_two():
    got = scalar("\tmul.rn.f32x2 \t%rd7, %rd5, %rd6;\n\tadd.rn.f32 %f3, %f1, %f2;\n")
    assert got == (
        "\t{ .reg .f32 %fm0a, %fm0b, %fm1a, %fm1b, %fm2a, %fm2b; "
        "mov.b64 {%fm1a, %fm1b}, %rd5; mov.b64 {%fm2a, %fm2b}, %rd6; "
        "mul.rn.f32 %fm0a, %fm1a, %fm2a; mul.rn.f32 %fm0b, %fm1b, %fm2b; "
        "mov.b64 %rd7, {%fm0a, %fm0b}; }\n\tadd.rn.f32 %f3, %f1, %f2;\n"
    )
    assert scalar("fma.rn.f32x2 %rd4, %rd1, %rd2, %rd3;").count("fma.rn.f32 ") == 2
    assert "f32x2" not in scalar("add.f32x2 %rd4, %rd1, %rd2; sub.rn.f32x2 %rd4, %rd4, %rd2;")


def test_another_hook_still_runs(monkeypatch):
    import triton

    seen = []
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *args: seen.append(args))
    stages = {"ptx": lambda source, metadata: f"{source} sub.rn.f32x2 %rd1, %rd2, %rd3;"}
    with unpacked():
        triton.knobs.runtime.add_stages_inspection_hook("backend", stages, 1, 2, 3)
    assert len(seen) == 1
    assert "f32x2" not in stages["ptx"]("x", {})
