"""The command line as people use it: outputs, errors without tracebacks, exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastmerge.cli import main
from fastmerge.commands import bench as benchmark
from fastmerge.methods import METHODS
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=64, vocab=1000)


@pytest.fixture
def recipe(paths, tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(tiny.recipe(paths, "ties", weight=0.5, density=0.4))
    return file


def run(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def test_merge_says_what_it_did(recipe, tmp_path):
    done = run("merge", recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "GB/s" in done.output
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_why_a_gpu_is_not_used_is_said_where_a_driver_is(recipe, tmp_path):
    code = (
        "import ctypes, sys\nsys.modules['triton'] = None\nreal = ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *a, **k: None if name == 'libcuda.so.1' else real(name, *a, **k)\n"
        "from fastmerge.cli import main\nmain(sys.argv[1:])\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    command = [sys.executable, "-c", code, "merge", str(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastmerge: GPUs not used: triton not installed")
    assert " s on cpu (" in done.stdout


def test_quiet_says_nothing(recipe, tmp_path):
    done = run("merge", recipe, tmp_path / "out", "--quiet")
    assert done.exit_code == 0
    assert done.output == ""


def test_json_events(recipe, tmp_path):
    done = run("merge", recipe, tmp_path / "out", "--log-format", "json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "done"
    assert events[-1]["bytes_written"] > 0


def test_dry_run_and_plan_write_nothing(recipe, tmp_path):
    before = sorted(tmp_path.iterdir())
    dry, planned = run("merge", recipe, tmp_path / "out", "--dry-run"), run("plan", recipe, "--json")
    assert dry.exit_code == planned.exit_code == 0
    facts = json.loads(planned.output)
    assert facts["bottleneck"] in {"read", "compute", "write"}
    assert facts["bytes_out"] > 0
    assert facts["seconds_estimated"] > 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_is_for_people(recipe, paths):
    lines = [line.rstrip() for line in run("plan", recipe).output.splitlines()]
    for line in (
        f"models             {paths['base']}",
        f"                   {paths['a']}",
        "tensors            21 merged",
        f"account            {paths['base']}: 21 merged",
        f"                   {paths['a']}: 21 merged",
        "elements           226,624",
        "bytes in           1.81 MB",
        "bytes out          453 kB",
        "bytes copied       0 bytes",
        "dtypes             bfloat16 (453 kB)",
        f"account            {paths['base']}: 21 merged",
        f"                   {paths['a']}: 21 merged",
        "seed               0",
    ):
        assert line in lines, lines
    assert any(line.startswith("time               about ") for line in lines)
    assert not set("[]{}") & set("".join(lines))


def test_an_existing_output_is_refused_and_overwritten_on_request(recipe, tmp_path):
    assert run("merge", recipe, tmp_path / "out").exit_code == 0
    again = run("merge", recipe, tmp_path / "out")
    assert again.exit_code == 4
    assert "--overwrite" in again.output
    assert "Traceback" not in again.output
    assert run("merge", recipe, tmp_path / "out", "--overwrite").exit_code == 0
    assert run("merge", recipe, tmp_path / "out", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("ties", "tise"), 2, ["tise", "ties", ":1:"]),
        (("density: 0.4", "density: -0.4"), 2, ["density", "-0.4"]),
        (("density: 0.4", "densty: 0.4"), 2, ["densty", "density"]),
        (("dtype: bfloat16", "dtype: bf15"), 2, ["bf15"]),
    ],
)
def test_wrong_recipes_are_refused_with_line_and_hint(recipe, tmp_path, change, code, words):
    recipe.write_text(recipe.read_text().replace(*change))
    done = run("merge", recipe, tmp_path / "out")
    assert done.exit_code == code
    assert all(w in done.output for w in words), done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_has_besides_is_warned_of_everywhere_and_refused_by_strict(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "name: x\n")
    line = len(recipe.read_text().splitlines())
    said = f"{recipe}:{line}: name: unknown key, ignored"
    assert f"warning: {said}" in run("plan", recipe).output
    assert json.loads(run("plan", recipe, "--json").stdout)["warnings"][0].startswith(said)
    assert run("merge", recipe, tmp_path / "out").exit_code == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["warnings"][0].startswith(said)
    for command in (["plan", recipe], ["merge", recipe, tmp_path / "strict"], ["merge", recipe, "x", "--dry-run"]):
        strict = run(*command, "--strict")
        assert strict.exit_code == 2
        assert strict.output.startswith(f"fastmerge: {said}")
    assert not (tmp_path / "strict").exists()


def test_allow_missing_is_the_recipe_s_own_key(recipe, tmp_path):
    assert run("merge", recipe, tmp_path / "out", "--allow-missing").exit_code == 0
    written = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert "missing: merge\n" in written
    recipe.write_text(recipe.read_text() + "missing: merge\n")
    plans = [json.loads(run("plan", recipe, "--json", *more).stdout) for more in ([], ["--allow-missing"])]
    assert plans[0]["fingerprint"] == plans[1]["fingerprint"]


def test_a_missing_model_and_a_small_budget_and_a_gpu_that_is_not_there(recipe, paths, tmp_path):
    budget = run("merge", recipe, tmp_path / "out", "--memory", "1KB")
    assert budget.exit_code == 5
    assert ">=" in budget.output
    gpu = run("merge", recipe, tmp_path / "out", "--device", "cuda")
    assert gpu.exit_code == 6
    assert len(gpu.output.splitlines()) == 1
    recipe.write_text(recipe.read_text().replace(str(paths["b"]), "/nowhere/model"))
    missing = run("merge", recipe, tmp_path / "out")
    assert missing.exit_code == 3
    assert "/nowhere/model" in missing.output
    assert not (tmp_path / "out").exists()


def test_methods_describe_themselves():
    overview = run("methods").output
    for name, method in METHODS.items():
        assert name in overview
        text = run("methods", name).output
        assert method.formula in text
        assert all(p.name in text for p in method.params)
        assert "object at 0x" not in text
    assert "density=[required]" in run("methods", "ties").output
    assert run("methods", "tise").exit_code == 2


def test_verify_finds_what_is_wrong(recipe, tmp_path):
    out = tmp_path / "out"
    run("merge", recipe, out)
    good = run("verify", out)
    assert good.exit_code == 0, good.output
    assert "ties" in good.output
    facts = json.loads(run("verify", out, "--json").output)
    assert facts["ok"]
    assert facts["unchecked"] == 0
    assert facts["checked"] == facts["nbytes"] > 0
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    bad = run("verify", out)
    assert bad.exit_code == 3
    assert "model.safetensors" in bad.output


SHARD = "model.safetensors"
DAMAGE = {
    "a missing file": ([["gone.safetensors", 0, 8, "x"]], "'gone.safetensors' is not a file"),
    "a path": ([["../recipe.yml", 0, 1, "x"]], "is not a file"),
    "a directory": ([[".", 0, 1, "x"]], "is not a file"),
    "a name of bytes that no file has": ([["\0\ud800", 0, 1, "x"]], "is not a file"),
    "a negative offset": ([[SHARD, -1, 8, "x"]], "8 bytes at -1 are not inside"),
    "short entries": ([1, [1], {}, None], "expected [file, offset"),
    "wrong types": ([[SHARD, True, 8, "x"], [SHARD, 0, 1.0, "x"], [SHARD, 0, 1, 2]], "expected [file, offset"),
    "more bytes than there are": ([[SHARD, 0, 10**13, "x"]], "not inside the file"),
    "very many bytes": ([[SHARD, 0, 10**400, "x"]], "not inside the file"),
    "a mapping": ({}, "not a merge report"),
    "many": ([1] * 1000, "980 more entries"),
    "wrong checksum": ([[SHARD, 0, 1, "x"]], "differ from"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_survives_damaged_reports(recipe, tmp_path, case):
    entries, words = DAMAGE[case]
    out = tmp_path / "out"
    run("merge", recipe, out)
    (out / "merge_report.json").write_text(json.dumps({"details": {"checksums": entries}}))
    done = run("verify", out)
    assert done.exit_code == 3, done.output
    assert isinstance(done.exception, SystemExit)
    assert "problem " in done.output
    assert words in done.output
    assert json.loads(run("verify", out, "--json").output)["unchecked"] >= 0


@pytest.mark.parametrize("text", ["{}", "[]", "1", "", "[" * 100_000, '{"details": []}', b"\xff\xfe", None])
def test_verify_survives_reports_that_are_none(recipe, tmp_path, text):
    out = tmp_path / "out"
    run("merge", recipe, out)
    report = out / "merge_report.json"
    report.unlink()
    if text is None:
        report.mkdir()
    else:
        report.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("verify", out)
    assert done.exit_code == 3, done.output
    assert isinstance(done.exception, SystemExit)
    assert "merge_report.json: not a" in done.output


@pytest.fixture
def little(monkeypatch):
    """Probes of 16 MiB and tensors of two tiles: what is measured stands in no test."""
    monkeypatch.setattr("fastmerge.commands.doctor.PROBE", 1 << 24)
    monkeypatch.setattr("fastmerge.commands.bench.ELEMENTS", 1 << 17)


@pytest.mark.usefixtures("little")
def test_doctor_says_where_the_disk_cannot_be_probed():
    done = run("doctor", "--directory", "/proc")
    assert done.exit_code == 0, done.output
    assert "cannot be probed in /proc: " in done.output


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("runs", [0, -3])
def test_bench_runs_at_least_once(recipe, runs, monkeypatch):
    monkeypatch.setattr("fastmerge.commands.bench.METHODS", {"linear": METHODS["linear"]})
    assert len(benchmark.bench_kernels(runs=runs)) == 1
    assert len(benchmark.bench_recipe(str(recipe), runs=runs)) == 2
    assert "Traceback" not in run("bench", "--runs", runs).output


@pytest.mark.usefixtures("little")
def test_doctor_and_bench(recipe, tmp_path, monkeypatch):
    facts = json.loads(run("doctor", "--json", "--directory", tmp_path).output)
    assert "backend native" in facts
    assert "not used" in facts["backend triton"]
    assert "the page cache" in facts["disk read, not cached"]
    monkeypatch.setenv("FASTMERGE_DIRECT", "0")
    facts = json.loads(run("doctor", "--json", "--directory", tmp_path).output)
    assert facts["disk read, not cached"] == "through the page cache: FASTMERGE_DIRECT=0"
    rows = json.loads(run("bench", "--json", "--runs", "1").output)
    assert {r["method"] for r in rows} >= {"linear", "ties", "slerp"}
    assert all(r["G elements/s"] > 0 for r in rows)
    rows = json.loads(run("bench", recipe, "--json", "--runs", "1").output)
    assert [r["what"] for r in rows] == ["merge", "floor"]
    assert not [p for p in recipe.parent.iterdir() if p.name.startswith(".fastmerge")]


def test_merging_on_the_cpu_imports_no_torch(recipe, tmp_path):
    code = (
        "import sys\nfrom fastmerge.cli import main\n"
        f"try:\n    main(['merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}, '--device', 'cpu'])\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"torch", "transformers", "huggingface_hub", "rich"} & set(done.stderr.split()) == set()


def test_auto_and_plan_do_not_import_torch_where_no_driver_is(recipe, tmp_path):
    code = (
        "import ctypes, sys\nfrom fastmerge.cli import main\nreal = ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *a, **k: real('nothing' if name == 'libcuda.so.1' else name, *a, **k)\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    for words in (["merge", recipe, tmp_path / "out", "-q"], ["plan", recipe]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert {"torch", "triton"} & set(done.stderr.split()) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_merge_says_how_to_go_on_and_does(paths, recipe, tmp_path, number):
    slow = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastmerge.runtime import placement\n"
        "from tests.runtime.fake_device import FakeDevice\n"
        "placement.UNIT_ELEMENTS = 1 << 16\n"
        "placement.workers = lambda chosen: 1\n"
        "class Slow(FakeDevice):\n"
        "    def upload(self, host):\n"
        "        print('working', flush=True)\n"
        "        return super().upload(host)\n"
        "placement.CpuDevice = lambda: Slow(latency=0.4)\n"
        "from fastmerge.cli import main\nmain(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", slow, "merge", str(recipe), str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert child.stdout.readline() == "working\n", child.stderr.read()
    os.kill(child.pid, number)
    more, err = child.communicate()
    assert more.count("working") <= 2, "units that were not in hand were begun"
    assert child.returncode == 128 + number, err
    assert "--resume" in err
    assert not out.exists()
    assert run("merge", recipe, out, "--resume").exit_code == 0
    assert run("verify", out).exit_code == 0
