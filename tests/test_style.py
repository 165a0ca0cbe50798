"""What keeps the house in order: file sizes, import directions, light imports, documented names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastmerge"

LAYERS = [
    {"errors", "dtypes", "version"},
    {"tensors"},
    {"sizes", "philox", "_native"},
    {"methods", "ops", "checkpoint"},
    {"recipe"},
    {"planning"},
    {"runtime", "backends"},
    {"report"},
    {"api", "commands"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def sources():
    return [
        p
        for d in ("fastmerge", "kernels", "csrc")
        for p in (ROOT / d).rglob("*")
        if p.suffix in {".py", ".pyi", ".cpp", ".h", ".cu"} and "fastmerge/kernels" not in str(p)
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_one_room(path):
    assert len(path.read_text().splitlines()) <= 420


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts)


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(nodes):
    """Modules of the package that the import statements among these nodes name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastmerge":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastmerge.")}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_fastmerge_but_each_other(path):
    assert imported(ast.walk(ast.parse(path.read_text()))) <= {"kernels"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = module_of(path)
    assert here in RANK, f"{here}: give it a layer"
    loaded = imported(ast.parse(path.read_text()).body)  # when the file is, not under TYPE_CHECKING
    up = {n for n in loaded if (n in RANK and RANK[n] > RANK[here]) or n not in RANK}
    assert not up, f"{here} imports from later layers: {up}"


def test_kernels_cannot_be_imported_twice():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels; from kernels import backend"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode
    assert "ImportError" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["methods"], ["methods", "ties"]])
def test_commands_do_not_import_torch(words):
    code = (
        "import sys\nfrom fastmerge.cli import main\n"
        f"try:\n    main({words!r})\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout != ""
    assert {"torch", "transformers", "huggingface_hub"} & set(done.stderr.split()) == set()


def test_public_names_are_sorted_and_exist():
    import fastmerge

    assert fastmerge.__all__ == sorted(fastmerge.__all__)
    for name in fastmerge.__all__:
        assert getattr(fastmerge, name) is not None


def test_plan_is_a_function_whatever_was_imported_first():
    code = "import fastmerge.api.merge, fastmerge; print(callable(fastmerge.plan), callable(fastmerge.merge))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def test_environment_variables_are_documented():
    used = {w for path in sources() for w in re.findall(r"FASTMERGE_[A-Z_]+", path.read_text())}
    text = (ROOT / "README.md").read_text()
    build = {"FASTMERGE_CUDA", "FASTMERGE_HAS_CUDA"}
    assert not {u for u in used - build if u not in text}


def own(node):
    """What stands in a function, but not in functions within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from own(child)


def test_every_test_asserts_in_its_own_body():
    """Helpers say what differs, tests assert that nothing does; none returns before that."""
    found, silent = 0, []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for test in ast.parse(path.read_text()).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                nodes = list(own(test))
                raises = "pytest.raises" in {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
                asserts = raises or any(isinstance(n, ast.Assert) for n in nodes)
                found += 1
                if not asserts or any(isinstance(n, ast.Return) for n in nodes):
                    silent.append(f"{path.relative_to(ROOT)}: {test.name}")
    assert found > 400
    assert silent == []
