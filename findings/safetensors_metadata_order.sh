#!/usr/bin/env bash
# safetensors 0.8.0: a file with two or more metadata keys has other bytes each time that it is saved.
#
# The keys of `__metadata__` are written in the order of a hash map that is seeded anew for each call. With one key
# (`format`, which transformers writes) the file is always the same; with three, 32 saves of the same tensor in one
# process make up to six files. Programs that compare files or name them by a checksum see a change where there is none.
#
# Seen: 1 file with one key, 2 with two keys, more with three.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$room/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

KEYS = ("format", "recipe", "seed")


def saved(count):
    return {save({"w": np.zeros(4, np.float32)}, metadata={key: "x" for key in KEYS[:count]}) for _ in range(32)}


found = {count: saved(count) for count in (1, 2, 3)}
print(f"safetensors {version('safetensors')}: different files of 32 saves, by the number of metadata keys")
for count, files in found.items():
    print(f"{count}: {len(files)}")
    assert all(np.array_equal(load(data)["w"], np.zeros(4, np.float32)) for data in files)
# That all of 32 orders are the same by chance happens once in 2e9 runs.
assert len(found[1]) == 1, "one key"
assert len(found[2]) == 2, "two keys"
assert len(found[3]) > 2, "three keys"
PYTHON
