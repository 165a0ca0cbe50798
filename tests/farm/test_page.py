"""The examples of docs/farm.md run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastmerge.cli import main
from fastmerge.farm.file import File
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "farm.md").read_text()


@pytest.fixture
def place(tmp_path, monkeypatch):
    paths = tiny.family(tmp_path / "family", models=2)
    (tmp_path / "models").mkdir()
    for name, source in (("math", "a"), ("code", "b")):
        paths[source].rename(tmp_path / "models" / name)
    recipe = {n: f"models/{n}" for n in ("math", "code")}
    text = tiny.recipe(recipe, "linear", names=("math", "code"), base=None, weight=0.5)
    (tmp_path / "recipe.yml").write_text(text)
    (tmp_path / "score.sh").write_text("sed -n 's/ *weight: //p' \"$1/mergekit_config.yml\" | head -n 1\n")
    (tmp_path / "farm.yml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_the_commands_run(place):
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert [line[:3] for line in lines[:2]] == [["fastmerge", "farm", "run"], ["fastmerge", "farm", "status"]]
    for words in lines:
        if words[1:3] == ["farm", "run"]:
            done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            # The recipe of the file is the template's with 0.5 in it: one job.
            assert done.stdout.startswith("3 done")
        else:
            said = CliRunner().invoke(main, words[1:])
            assert said.exit_code == 0, said.output
    assert {"results", "merged", "spread"} <= {p.name for p in place.iterdir()}
    assert len([*(place / "results").glob("*/*/model")]) == 2


def test_the_table_names_every_key():
    rows = PAGE.split("| key | what |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])} == set(File.model_fields)
