"""The examples of the README run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    paths = tiny.family(tmp_path / "family", models=2)
    (tmp_path / "models").mkdir()
    for name, source in (("base", "base"), ("math", "a"), ("code", "b")):
        shutil.copytree(paths[source], tmp_path / "models" / name)
    (tmp_path / "recipe.yml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(place, code):
    exec(compile(code, "README.md", "exec"), {})


def test_shell_examples_run(place):
    lines = [
        line.split("#")[0].split()
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("fastmerge")
    ]
    assert len(lines) >= 3
    for words in lines:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False, env=env())
        assert done.returncode == 0, done.stderr


def env():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_method_table_is_complete():
    from fastmerge.methods import METHODS

    for name, method in METHODS.items():
        assert f"`{name}`" in TEXT
        listed = (
            TEXT
            + subprocess.run(
                [sys.executable, "-m", "fastmerge", "methods", name],
                capture_output=True,
                text=True,
                check=True,
                env=env(),
            ).stdout
        )
        assert all(p in listed for p in method.presets)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
