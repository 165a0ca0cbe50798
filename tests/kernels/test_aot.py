"""The gates on compiled kernels: a few for real (``python tests/kernels/aot.py`` runs all), and how they count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
pytest.importorskip("torch", reason="the launchers need torch")

SCRIPT = Path(__file__).with_name("aot.py")


def test_one_family_passes_the_gates():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--arch", "90", "--only", "votes"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kernels for sm_90, 0 bad" in done.stdout


@pytest.fixture(scope="module")
def aot():
    """The script as a module, without its effect on the environment."""
    before = os.environ.get("TRITON_INTERPRET")
    import importlib

    module = importlib.import_module("tests.kernels.aot")
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    return module


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/               @P1 BRA 0x70 ;
        /*0050*/                   MOV R2, 0x70 ;
        /*0060*/                   CALL.REL.NOINC 0xa0 ;
        /*0070*/                   STG.E [R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   FMUL R1, R1, R1 ;
        /*00b0*/                   RET.REL.NODEC R2 0x0 ;
        /*00c0*/                   NOP;
"""


def test_issued_instructions(aot):
    """A loop of three runs 32 times; the call around which a branch leads, and what it calls, are not counted."""
    code = aot.parse(SASS)
    assert [a for a, _ in code][-1] == 0xB0
    outside = ["LDC", "BRA 0x70", "STG", "EXIT", "BRA 0x90"]
    assert aot.issued(code, 2048, 8) == (len(outside) + 3 * 32) / 256
    assert aot.issued(code[:1], 2048, 8) == 1 / 8


@pytest.mark.parametrize(
    ("ptx", "sass", "what"),
    [
        ("cvt.rn.f16.f64 %h1, %d1;", "", "fp64 to 16 bits"),
        ("cvt.rn.bf16.f64 %h1, %d1;", "", "fp64 to 16 bits"),
        ("add.s16x2 %r1, %r2, %r3;", "", "packed 16-bit addition"),
        ("add.u16x2 %r1, %r2, %r3;", "", "packed 16-bit addition"),
        ("", "VIADD.16x2 R4, R4, 0x0", "packed 16-bit addition"),
        ("min.f32 %f1, %f2, %f3;", "", "min or max"),
        ("max.ftz.f32 %f1, %f2, %f3;", "", "min or max"),
        ("min.f64 %fd1, %fd2, %fd3;", "", "min or max"),
        ("", "FMNMX R4, R4, R5, PT", "min or max"),
    ],
)
def test_hazards_are_seen(aot, ptx, sass, what):
    found = aot.hazards(ptx, [sass] if sass else [], zeros=True)
    assert len(found) == 1
    assert what in found[0]


def test_what_is_harmless_is_no_hazard(aot):
    ptx = "cvt.rn.bf16.f32 %h1, %f1; cvt.rn.f32.f64 %f1, %d1; add.s16 %rs1, %rs2, %rs3; min.s32 %r1, %r2, %r3;"
    assert (
        aot.hazards(
            ptx,
            ["IMNMX R4, R4, R5, PT", "VIMNMX R4, R4, R5, PT", "VIADD R4, R4, 0x80", "IADD3 R4, R4, R5, RZ"],
            zeros=True,
        )
        == []
    )
    assert aot.hazards("max.f32 %f1, %f2, %f3;", ["FMNMX R4, R4, R5, PT"], zeros=False) == []


def test_names_of_kernels(aot):
    constants = {"M": 3, "CODES": 0x133, "OUT": 3, "DELTA": True, "UNMASKED": True, "ELECT": 0, "BLOCK": 2048}
    assert aot.describe("combine_kernel", constants) == "combine bf16+bf16+fp32 to bf16 delta unmasked"
