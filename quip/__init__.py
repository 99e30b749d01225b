"""Compress language models to 2, 3 and 4 bits per weight: QuIP, OPTQ and their baselines.

    import quip

    loaded = quip.load_model("demo")
    recipe = quip.build_recipe(quant="ldlq", wbits=2, incoh_processing=True)
    quip.quantize_model(loaded.model, tokens, recipe, device="cpu", seed=0)

Names are imported when they are first used, so that `import quip` costs nothing, and
`quip.quantize_matrix` nothing beyond torch. After `import quip`, transformers' from_pretrained
loads checkpoints that quip saved.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from quip.data.hessians import HessianStore as HessianStore
    from quip.evaluate.perplexity import perplexity as perplexity
    from quip.jobs.experiment import Experiment as Experiment
    from quip.jobs.hessians import Collection as Collection
    from quip.jobs.hessians import collect_hessians as collect_hessians
    from quip.jobs.plan import build_plan as build_plan
    from quip.jobs.run import run_experiment as run_experiment
    from quip.matrix.build import build_recipe as build_recipe
    from quip.matrix.quantize import quantize_matrix as quantize_matrix
    from quip.matrix.recipe import Recipe as Recipe
    from quip.model.load import load_model as load_model
    from quip.model.plan import Plan as Plan
    from quip.model.quantize import quantize_model as quantize_model
    from quip.model.tune import BlockTuning as BlockTuning
    from quip.model.tune import ModelTuning as ModelTuning
    from quip.model.tune import tune_model as tune_model
    from quip.packed.checkpoint import load as load
    from quip.packed.checkpoint import save_checkpoint as save_checkpoint
    from quip.serve.generate import generate as generate
    from quip.serve.sampling import Sampling as Sampling

    __version__: str

_HOMES = {
    "BlockTuning": "quip.model.tune",
    "Collection": "quip.jobs.hessians",
    "Experiment": "quip.jobs.experiment",
    "HessianStore": "quip.data.hessians",
    "ModelTuning": "quip.model.tune",
    "Plan": "quip.model.plan",
    "Recipe": "quip.matrix.recipe",
    "Sampling": "quip.serve.sampling",
    "build_plan": "quip.jobs.plan",
    "build_recipe": "quip.matrix.build",
    "collect_hessians": "quip.jobs.hessians",
    "generate": "quip.serve.generate",
    "load": "quip.packed.checkpoint",
    "load_model": "quip.model.load",
    "perplexity": "quip.evaluate.perplexity",
    "quantize_matrix": "quip.matrix.quantize",
    "quantize_model": "quip.model.quantize",
    "run_experiment": "quip.jobs.run",
    "save_checkpoint": "quip.packed.checkpoint",
    "tune_model": "quip.model.tune",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("quip-quant")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(_: object) -> None:
    import_module("quip.packed.hub")


# At once where transformers has its quantizers already, otherwise as soon as it does.
register_post_import_hook(_register, "transformers.quantizers.auto")
