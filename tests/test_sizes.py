import numpy as np
import pytest

from fastmerge.errors import RecipeError
from fastmerge.sizes import DEFAULT_MEMORY, default_memory, parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("64MiB", 64 << 20),
        ("5000", 5000),
        (7, 7),
        ("1.5 gb", 1_500_000_000),
        ("2g", 2 * 10**9),
        ("10b", 10),
        (2e9, 2 * 10**9),
        (np.int64(5), 5),
        (np.float32(8.0), 8),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "GB", -1, float("nan"), float("inf"), [8], None, b"8"])
def test_nonsense_is_refused(text):
    with pytest.raises(RecipeError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (12_345_678, "12.3 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1.5e9, "1.5 GB"),
        (4.25e15, "4.25e+03 TB"),
    ],
)
def test_sizes_are_shown_with_three_digits(nbytes, text):
    assert show_bytes(nbytes) == text


def test_default_is_bounded():
    assert 0 < default_memory() <= DEFAULT_MEMORY


GB = 1000**3


def system(root, *, groups, files, free=64 * GB):
    """A fake ``/proc`` and ``/sys``: the lines of ``/proc/self/cgroup`` and the files of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


V1, V2 = "4:memory:/jobs/one\n3:cpu,cpuacct:/\n", "0::/jobs/one\n"


@pytest.mark.parametrize(
    ("groups", "files", "nbytes"),
    [
        (V2, {}, 8 * GB),
        (V2, {"cgroup.controllers": "", "jobs/one/memory.max": "max"}, 8 * GB),
        (V2, {"cgroup.controllers": "", "jobs/one/memory.max": 4 * GB}, 2 * GB),
        (V2, {"cgroup.controllers": "", "jobs/memory.max": 4 * GB, "jobs/one/memory.max": "max"}, 2 * GB),
        (V2, {"cgroup.controllers": "", "memory.max": 4 * GB}, 2 * GB),  # a container: the host's path is not there
        (V2, {"unified/cgroup.controllers": "", "unified/jobs/one/memory.max": 4 * GB}, 2 * GB),
        (
            V2,
            {
                "cgroup.controllers": "",
                "jobs/one/memory.max": 6 * GB,
                "jobs/one/memory.current": 4 * GB,
                "jobs/one/memory.stat": f"anon 1\ninactive_file {2 * GB}\n",
            },
            2 * GB,
        ),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": 4 * GB}, 2 * GB),
        (V1, {"memory/memory.limit_in_bytes": 4 * GB}, 2 * GB),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": 9223372036854771712}, 8 * GB),
        (V1, {"memory/jobs/one/memory.limit_in_bytes": GB // 2}, GB // 5),  # 300 MB are the process's own
        (V1, {"memory/jobs/one/memory.limit_in_bytes": GB // 5}, GB // 40),
        ("nonsense\n:\n0::/../..\n", {"cgroup.controllers": "", "memory.max": "what?"}, 8 * GB),
    ],
)
def test_the_default_stays_below_what_control_groups_allow(tmp_path, groups, files, nbytes):
    assert default_memory(system(tmp_path, groups=groups, files=files)) == nbytes


def test_the_default_is_half_of_what_the_machine_has_free(tmp_path):
    assert default_memory(system(tmp_path, groups="", files={}, free=3 * 1024**3)) == 3 * 1024**3 // 2
