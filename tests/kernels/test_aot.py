"""The gates on compiled kernels: a few for real (``python tests/kernels/aot.py`` runs all), and how they count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
pytest.importorskip("torch", reason="the launchers need torch")

from tests.kernels import sass

SCRIPT = Path(__file__).with_name("aot.py")


def test_one_family_passes_the_gates():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--arch", "90", "--only", "votes"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 kernels for sm_90, 0 bad" in done.stdout


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
        /*0010*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/                   ISETP.GT.AND P0, PT, R4, 0x2, PT ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   MOV R9, R8 ;
        /*0050*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/              @!P0 BRA 0x50 ;
        /*0090*/               @P1 BRA 0xc0 ;
        /*00a0*/                   MOV R2, 0xc0 ;
        /*00b0*/                   CALL.REL.NOINC 0x130 ;
        /*00c0*/                   STG.E [R2.64], R4 ;
        /*00d0*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00e0*/              @!P3 BRA 0xd0 ;
        /*00f0*/               @P2 BRA 0x40 ;
        /*0100*/               @P4 BRA 0x120 ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x110;
        /*0130*/                   FMUL R1, R1, R1 ;
        /*0140*/                   RET.REL.NODEC R2 0x0 ;
        /*0150*/                   NOP;
"""


def test_issued_instructions():
    """The main loop, the search and what is around count by their trips; a division's slow path does not.

    A jump backwards to what does not lead to it is no loop.
    """
    code = sass.parse(SASS)
    assert [a for a, _ in code][-1] == 0x140
    graph = sass.Graph(code)
    main, search, lists = 4, 3, 2
    around = 4 + lists  # MOV, BRA 0xc0, STG, BRA 0x40
    rest = 4  # LDC, BRA 0x120, EXIT, BRA 0x110
    assert graph.main is not None
    assert (graph.main.wide, graph.main.nbytes) == (1, 20)
    assert len(graph.loops) == 4
    assert graph.issued(8, around=2) == main * 8 + search * sass.SEARCH + around * 2 + rest
    flat = sass.Graph(code[:1] + [(0x10, "EXIT")])
    assert flat.main is None
    assert flat.issued(8) == 2


def test_bytes_of_loads():
    texts = ["LDG.E.EF.128 R4, x", "LDG.E.64 R4, x", "@P0 LDG.E R4, x", "LDG.E.U16 R4, x", "LDS.128 R4, x"]
    assert [sass.load_bytes(t) for t in texts] == [16, 8, 4, 2, 0]


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
        ("mul.rn.f32x2 %rd7, %rd5, %rd6;", "", "packed fp32"),
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
