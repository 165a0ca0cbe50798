"""Plans of made-up models, and what tests look at."""

from fastmerge.planning import plan
from fastmerge.recipe import Recipe

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, density: 0.5}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
STOCK = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


def make(text, **models):
    recipe = Recipe.load(text)
    return plan(recipe, models={str(r): models[str(r)] for r in recipe.refs})


def names(made):
    return [o.name for o in made.outputs]


def by_name(made):
    return {o.name: o for o in made.outputs}
