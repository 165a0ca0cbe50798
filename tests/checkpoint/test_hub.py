"""Hub ids: resolved to a commit, only what is needed, offline, and silent about tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import file_bytes, save, tensor

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub that records what it is asked."""
    fake = types.ModuleType("huggingface_hub")
    constants = types.ModuleType("huggingface_hub.constants")
    constants.HF_HUB_OFFLINE = False
    fake.asked = []
    path = save(tmp_path / "snapshots" / SHA, {"model.safetensors": {"a": tensor("BF16", 2)}})

    class HfApi:
        def model_info(self, repo, revision=None):
            fake.asked.append(("info", repo, revision))
            return types.SimpleNamespace(sha=SHA)

    def snapshot_download(repo, **kwargs):
        fake.asked.append(("download", repo, kwargs))
        if fake.error:
            raise fake.error
        return str(path)

    fake.HfApi, fake.snapshot_download, fake.error, fake.constants = HfApi, snapshot_download, None, constants
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)
    return fake


def test_a_branch_is_resolved_to_a_commit_first(library):
    model = Checkpoint.open("org/name@main")
    assert model.ref == f"org/name@{SHA}"
    assert library.asked[0] == ("info", "org/name", "main")
    _, repo, kwargs = library.asked[1]
    assert (repo, kwargs["revision"]) == ("org/name", SHA)


def test_only_weights_config_and_tokenizer_are_fetched(library):
    names = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json",
        "tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja", "1_Pooling/config.json", "bpe.codes",
        "additional_chat_templates/tool.jinja", "source.spm", "vocab.bpe", "LICENSE", "README.md",
        "pytorch_model.bin", "modeling_x.py", "4bit/model.safetensors", "assets/x.json", "1_Dense/pytorch_model.bin",
        "a/config.json", "tokenizer.py", "onnx/model.onnx", "original/params.json", "m.gguf",
        "consolidated.safetensors",
    ]  # fmt: skip
    Checkpoint.open("org/name")
    allow, ignore = (library.asked[1][2][k] for k in ("allow_patterns", "ignore_patterns"))

    def taken(name):
        return any(fnmatch(name, p) for p in allow) and not any(fnmatch(name, p) for p in ignore)

    assert [n for n in names if taken(n)] == names[:15]


def test_a_commit_needs_no_look_up(library):
    Checkpoint.open("org/name", revision=SHA)
    assert [a[0] for a in library.asked] == ["download"]


def test_offline_asks_the_cache_only(library):
    library.constants.HF_HUB_OFFLINE = True
    assert Checkpoint.open("org/name").ref == f"org/name@{SHA}"
    assert [a[0] for a in library.asked] == ["download"]
    assert library.asked[0][2]["local_files_only"] is True


def test_a_directory_wins_over_a_hub_id(library, tmp_path, monkeypatch):
    save(tmp_path / "org" / "name", {"model.safetensors": {"mine": tensor("BF16", 2)}})
    monkeypatch.chdir(tmp_path)
    assert list(Checkpoint.open("org/name").tensors) == ["mine"]
    assert library.asked == []


@pytest.mark.parametrize("ref", ["name", "a/b/c", "../x", "org/..", "./org", "/abs/x", "org/na me", "org/name@"])
def test_what_is_no_id_is_a_path(library, ref):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(ref)
    assert library.asked == []


def test_contradicting_revisions(library):
    with pytest.raises(CheckpointError, match="contradicts"):
        Checkpoint.open("org/name@a", revision="b")


def test_errors_never_show_a_token(library):
    library.error = RuntimeError("401 for url with Authorization: Bearer hf_SecretSecret and hf_SecretSecret\nmore")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("org/name")
    assert "Secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "revision"),
    ],
)
def test_known_errors_in_words(library, name, said):
    library.error = type(name, (Exception,), {})()
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open("org/name")


def test_a_mistyped_path_is_said_to_be_none(library):
    library.error = ConnectionError("[Errno -2] Name or service not known")
    with pytest.raises(CheckpointError, match="^models/mth: no such path here, and the hub could not be reached: Conn"):
        Checkpoint.open("models/mth")


@pytest.mark.parametrize("kind", ["ConnectionError", "RepositoryNotFoundError"])
def test_a_mistyped_path_gets_the_name_that_is_there(library, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "maths").mkdir(parents=True)
    library.error = type(kind, (Exception,), {})()
    with pytest.raises(CheckpointError, match="^models/math: no such path here \\(did you mean 'maths'\\?\\), and "):
        Checkpoint.open("models/math")
    with pytest.raises(CheckpointError, match="models/math: no such file or directory \\(did you mean 'maths'\\?\\)$"):
        Checkpoint.open(str(tmp_path / "models" / "math"))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="no such path here.*the extra 'hub'"):
        Checkpoint.open("org/name")


def test_the_real_library_offline(tmp_path):
    """The real cache layout, read without a network: a branch, links to blobs, an id that is not there."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / SHA
    for directory in (repo / "blobs", repo / "refs", snapshot):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    (repo / "blobs" / ("f" * 64)).write_bytes(file_bytes({"a": tensor("BF16", 2)}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "f" * 64)
    code = """
from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import CheckpointError
model = Checkpoint.open("org/name@main")
print(model.ref, list(model.tensors))
try:
    Checkpoint.open("org/other")
except CheckpointError as error:
    print(error)
for ref, revision in (("org/name@gone", None), ("org/name", "gone"), ("org/other", "gone")):
    try:
        Checkpoint.open(ref, revision=revision)
    except CheckpointError as error:
        print(error)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert f"org/name@{SHA} ['a']" in run.stdout
    assert "not in the local cache (HF_HUB_OFFLINE is set)" in run.stdout
    unknown = "org/name@gone: the local cache does not hold this revision, and HF_HUB_OFFLINE is set: it holds "
    unknown += f"'main', '{SHA}'"
    assert run.stdout.count(unknown) == 2
    assert "org/other@gone: no such path here, and not in the local cache (HF_HUB_OFFLINE is set)" in run.stdout


@pytest.mark.parametrize("offline", [False, True])
def test_a_revision_that_was_asked_for_is_named_in_every_error(library, offline):
    library.constants.HF_HUB_OFFLINE = offline
    for name in ("RevisionNotFoundError", "LocalEntryNotFoundError", "RepositoryNotFoundError", "GatedRepoError"):
        library.error = type(name, (Exception,), {})()
        with pytest.raises(CheckpointError, match="^org/name@v7: "):
            Checkpoint.open("org/name", revision="v7")
