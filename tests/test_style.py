"""What keeps the house in order: file sizes, import directions, light imports, documented names."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastmerge"

ROOMS = [
    {"errors", "dtypes", "version", "start"},
    {"tensors", "keys", "philox", "choices"},
    {"sizes"},
    {"ops", "checkpoint"},
    {"methods"},
    {"recipe"},
    {"planning", "report"},
    {"backends"},
    {"runtime"},
    {"api"},
    {"session"},
    {"adamerging"},
    {"search"},
    {"dna"},
    {"farm"},
    {"commands"},
    {"pages"},
    {"adapters"},
    {"cli"},
    {"__main__"},
]
"""From the ground up: a module loads modules of its own room and of rooms below, never of one beside it or above."""

RANK = {name: i for i, room in enumerate(ROOMS) for name in room}


def sources():
    return [
        p
        for d in ("fastmerge", "kernels", "csrc")
        for p in (ROOT / d).rglob("*")
        if p.suffix in {".py", ".pyi", ".cpp", ".h", ".cu"} and "fastmerge/kernels" not in str(p)
    ]


def test_files_are_one_room():
    long = [str(p.relative_to(ROOT)) for p in sources() if len(p.read_text().splitlines()) > 420]
    assert long == []


def modules():
    """Every Python file of the package, by the name that imports use."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "kernels":
            found[".".join(parts[: -1 if parts[-1] == "__init__" else None])] = path
    return found


MODULES = modules()


def statements(nodes, *, types=False):
    """Import statements that run when a module is loaded; with ``types`` those for type checkers as well."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.body if types else node.orelse, types=types)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(ast.iter_child_nodes(node), types=types)


def imported(nodes):
    """Modules of the package that import statements name, ``fastmerge.`` left out."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {n.removeprefix("fastmerge.") for n in names if n.startswith("fastmerge.")}


@functools.cache
def loads(name):
    """Modules that loading one loads itself: those that it names, and the packages around them but not around it."""
    found, nodes = set(), list(statements(ast.parse(MODULES[name].read_text()).body))
    assert not [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level], "imports are absolute"
    for target in imported(nodes):
        full = f"fastmerge.{target}"
        while full not in MODULES:
            full = full.rpartition(".")[0]
        around = [full.rsplit(".", n)[0] for n in range(full.count("."))]
        found |= {m for m in around if not f"{name}.".startswith(f"{m}.")}
    return frozenset(found)


def room(name):
    return name.split(".")[1]


def test_kernels_import_nothing_of_fastmerge_but_each_other():
    paths = sorted((ROOT / "kernels").glob("*.py"))
    named = {p.name: {n.split(".")[0] for n in imported(ast.walk(ast.parse(p.read_text())))} for p in paths}
    assert {name: found for name, found in named.items() if not found <= {"kernels"}} == {}
    assert len(paths) > 20


def test_no_module_loads_itself_again():
    """The modules in an order in which each loads only what is there already."""
    left = {name: loads(name) for name in MODULES}
    while ready := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in ready}
    assert left == {}, "these load each other"


def test_rooms_stand_on_each_other():
    names = [n for n in MODULES if n != "fastmerge"]
    assert {room(name) for name in names} - RANK.keys() == set(), "give these a place among the rooms"
    others = {(n, m) for n in names for m in loads(n) if m != "fastmerge" and room(m) != room(n)}
    assert {(n, m) for n, m in others if RANK[room(m)] >= RANK[room(n)]} == set()


def test_the_package_itself_loads_only_the_ground():
    """The rest comes when it is asked for, so that ``--help`` answers at once."""
    assert {room(m) for m in loads("fastmerge")} <= {"errors", "version"}


def test_kernels_cannot_be_imported_twice():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels; from kernels import backend"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode
    assert "ImportError" in done.stderr


HEAVY = {"torch", "transformers", "huggingface_hub", "rich", "asyncio", "email", "importlib.metadata"}
"""What no command loads that merges files on the CPU to no terminal."""

NUMBERS = HEAVY | {"numpy", "concurrent.futures", "fastmerge.runtime.stream", "fastmerge.checkpoint.writer"}
"""And what it takes to merge, which looking at a recipe does not."""

QUANTISED = {f"fastmerge.ops.{room}" for room in ("coded", "joined", "made", "packing", "quantised")}
"""What only inputs need that are made, and results that are written as codes."""

ANYTHING = NUMBERS | {
    "pydantic",
    "socket",
    "json",
    "logging",
    "pathlib",
    "hashlib",
    "dataclasses",
    "yaml",
    "fastmerge.sizes",
}
"""And what takes a look at anything."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], ANYTHING),
        (["merge", "--help"], NUMBERS | {"pydantic", "pathlib", "yaml"}),
        (["methods", "ties"], NUMBERS),
        (["plan", "ties"], NUMBERS | {"pydantic"}),
        (["plan", "slerp"], NUMBERS | {"pydantic"}),
        (["plan", "linear"], NUMBERS | {"pydantic"}),
        (["merge", "linear", "out", "--device", "cpu"], HEAVY | QUANTISED | {"pydantic"}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_commands_load_no_more_than_they_need(paths, tmp_path, words, unwanted):
    """Beside what the interpreter and click load, which is three quarters of ``--help``."""
    (tmp_path / "ties").write_text(tiny.recipe(paths, "ties", weight=0.5, density=0.4))
    (tmp_path / "slerp").write_text(tiny.recipe(paths, "slerp", names=("a",), extra="parameters: {t: 0.5}"))
    (tmp_path / "linear").write_text(tiny.recipe(paths, "linear", base=None, weight=0.5))
    code = (
        "import sys, click\nbefore = set(sys.modules)\nfrom fastmerge.cli import main\n"
        f"try:\n    main({words!r})\nfinally:\n    print(*set(sys.modules) - before, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout != ""
    assert set(done.stderr.split()) & unwanted == set()


def test_what_stands_in_for_types_of_schemas_becomes_them():
    code = (
        "from fastmerge import start\nstart.quickly()\nimport sys, pydantic_core\n"
        "name = 'pydantic_core.core_schema'\nstand_in = sys.modules[name]\nimport pydantic\n"
        "class A(pydantic.BaseModel):\n    x: int\n"
        "print(A(x=1).x, stand_in.int_schema()['type'], sys.modules[name] is not stand_in)\n"
        "print(hasattr(stand_in, 'nothing'), stand_in.CoreSchema is sys.modules[name].CoreSchema)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 int True\nFalse True\n"


def test_what_stands_in_for_types_of_arrays_becomes_them():
    code = (
        "from fastmerge import start\nstart.quickly()\nimport sys\nimport numpy as np\n"
        "stand_in = sys.modules['numpy._typing']\n"
        "print(type(stand_in).__name__, np.linalg.eigh(np.eye(2)).eigenvalues)\n"
        "import numpy.typing as npt\nfrom numpy._typing import _nbit\n"
        "print(stand_in.NDArray is npt.NDArray, _nbit.__name__, sorted(npt.__all__))\n"
        "import numpy.ma, numpy.random, torch\nprint(np.random.default_rng(0).integers(5), torch.ones(2).numpy())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == [
        "_StandIn [1. 1.]",
        "True numpy._typing._nbit ['ArrayLike', 'DTypeLike', 'NBitBase', 'NDArray']",
    ]


@pytest.mark.parametrize("method", ["linear", "dare_ties", "ties", "model_stock", "passthrough"])
def test_a_merge_asks_for_nothing_that_others_stand_in_for(paths, tmp_path, method):
    given = {"ties": {"weight": 0.5, "density": 0.4}, "dare_ties": {"weight": 0.5, "density": 0.4}}
    given |= {"linear": {"weight": 0.5}}
    names = {"names": ("a",)} if method == "passthrough" else {}
    base = None if method in ("linear", "passthrough") else "base"
    (tmp_path / "recipe").write_text(tiny.recipe(paths, method, base=base, **names, **given.get(method, {})))
    code = (
        "import sys\nfrom fastmerge import start\nfrom fastmerge.cli import main\n"
        "try:\n    main(['merge', 'recipe', 'out', '-q', '--device', 'cpu'])\n"
        "finally:\n    print(*[n for n in start._STAND_INS if type(sys.modules[n]) is not start._StandIn])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "\n"


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


def test_findings_can_be_run():
    found = [*(ROOT / "findings").glob("*.sh")]
    assert found
    assert [path.name for path in found if not os.access(path, os.X_OK)] == []


def test_results_say_nothing_of_the_machine_s_directories():
    kept = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()]
    assert kept
    commands = re.compile(r'"command": "[^"]*?(?:^|[ "])/[^"]*\.py')
    assert [path.name for path in kept if commands.search(path.read_text())] == []


def test_no_test_reads_a_clock():
    """Benchmarks show speed. What may grow too fast is counted, by tests/counted.py; what may hang hangs."""
    clock = re.compile(r"\b(?:time|perf_counter|monotonic|process_time|thread_time)(?:_ns)?\(\)")
    timed = [p.name for p in (ROOT / "tests").rglob("test_*.py") if clock.search(p.read_text())]
    assert timed == []


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
