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
    return [o.name for o in made.ops]


def by_name(made):
    return {o.name: o for o in made.ops}


def models_of(op):
    """The model that each input of an op is read from."""
    return tuple(source.model for source in op.inputs)


def tensors_of(op):
    """The tensor that each input of an op is."""
    return [source.info.name for source in op.inputs]


def method_of(op):
    """The name of what is computed; None where bytes are copied."""
    return None if op.spec.grain == "copy" else op.spec.method.name
