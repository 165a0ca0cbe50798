"""Searches without weights: a renderer that notes the numbers of a recipe, in place of a merge."""

from fastmerge.recipe import Recipe


class Notes:
    """Writes the weight of every model into a mapping; counts."""

    def __init__(self):
        self.rendered = 0

    def render(self, recipe, into):
        Recipe.load(recipe)
        self.rendered += 1
        into.clear()
        into.update({entry["model"]: entry["parameters"]["weight"] for entry in recipe["models"]})


def template(models="abc"):
    entries = [{"model": m, "parameters": {"weight": {"low": 0.0, "high": 1.0}}} for m in models]
    return {"merge_method": "linear", "models": entries}


class Near:
    """Items that agree about which weights are good, and are of different difficulty; counts what it is asked."""

    def __init__(self, items=16, noise=0.0):
        self.goal = {"a": 0.3, "b": 0.9, "c": 0.1}
        self.count, self.noise, self.asked = items, noise, []

    def __len__(self):
        return self.count

    def __call__(self, model, items):
        self.asked.append(list(items))
        loss = sum((model.get(m, 0.0) - g) ** 2 for m, g in self.goal.items())
        return [-loss + 0.01 * i + self.noise * ((i * 37) % 7 - 3) for i in items]
