"""Farms of tiny recipes, and scores that misbehave."""

import hashlib
import json

SCORE = """
# The weight of the first model, which names the recipe: each line of "scored" is a call.
model=$1
here=$(dirname "$0")
weight=$(sed -n 's/ *weight: //p' "$model/mergekit_config.yml" | head -n 1)
echo "$weight" >> "$here/scored"
echo $PPID > "$here/pid.$weight"
[ -e "$here/poison.$weight" ] && kill -9 $PPID
[ -e "$here/once.$weight" ] && rm "$here/once.$weight" && kill -9 $PPID
while [ -e "$here/hold.$weight" ]; do sleep 0.02; done
echo "$weight"
"""


def scorer(directory):
    """A command that scores by weight, counts its calls, and kills its worker where a file says so."""
    (directory / "score.sh").write_text(SCORE)
    (directory / "scored").touch()
    return f"sh {directory / 'score.sh'} {{model}}"


def calls(directory):
    """Weights in the order in which they were scored."""
    return (directory / "scored").read_text().split()


def template(paths):
    models = [{"model": str(paths["a"]), "parameters": {"weight": "${w}"}}]
    models.append({"model": str(paths["b"]), "parameters": {"weight": 0.5}})
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16"}


def farm(root, paths, count, **more):
    """A farm of so many recipes: their weights are 1/count to 1."""
    grid = {"w": [i / count for i in range(1, count + 1)]}
    here = {"store": str(root / "store"), "workers": 2, "memory": "128MB", "device": "cpu"}
    return {**here, "recipes": [{"template": template(paths), "grid": grid}], **more}


def tree(model):
    """What a model is: names and hashes of its files but for the report, which tells times, and the card's title."""
    found = {}
    for path in sorted(p for p in model.rglob("*") if p.is_file() and p.name != "merge_report.json"):
        found[str(path.relative_to(model))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def contents(store):
    """All results, without whose and how fast, and their models."""
    found = {}
    for result in store.results():
        facts = json.loads((store.entry(result.id) / "result.json").read_text())
        model = store.entry(result.id) / "model"
        del facts["worker"], facts["seconds"]
        found[result.id] = (facts, tree(model) if model.is_dir() else None)
    return found


def idle(store):
    """What workers left behind."""
    return [p.name for p in (store.root / "staging").iterdir() if not p.name.startswith(".clock")]
