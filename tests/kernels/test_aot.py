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


def test_names_of_kernels(aot):
    constants = {"M": 3, "CODES": 0x133, "OUT": 3, "DELTA": True, "UNMASKED": True, "ELECT": 0, "BLOCK": 2048}
    assert aot.describe("combine_kernel", constants) == "combine bf16+bf16+fp32 to bf16 delta unmasked"
