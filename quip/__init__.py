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
    from quip.checkpoint import load as load
    from quip.checkpoint import save_checkpoint as save_checkpoint
    from quip.collecting import Collection as Collection
    from quip.collecting import collect_hessians as collect_hessians
    from quip.evaluate.perplexity import perplexity as perplexity
    from quip.experiment import Experiment as Experiment
    from quip.experiment import run_experiment as run_experiment
    from quip.finetune import BlockTuning as BlockTuning
    from quip.finetune import ModelTuning as ModelTuning
    from quip.finetune import tune_model as tune_model
    from quip.hessian_store import HessianStore as HessianStore
    from quip.models import load_model as load_model
    from quip.pipeline import quantize_model as quantize_model
    from quip.quantize import quantize_matrix as quantize_matrix
    from quip.recipe import Recipe as Recipe
    from quip.recipes import build_recipe as build_recipe

    __version__: str

_HOMES = {
    "BlockTuning": "quip.finetune",
    "Collection": "quip.collecting",
    "Experiment": "quip.experiment",
    "HessianStore": "quip.hessian_store",
    "ModelTuning": "quip.finetune",
    "Recipe": "quip.recipe",
    "build_recipe": "quip.recipes",
    "collect_hessians": "quip.collecting",
    "load": "quip.checkpoint",
    "load_model": "quip.models",
    "perplexity": "quip.evaluate.perplexity",
    "quantize_matrix": "quip.quantize",
    "quantize_model": "quip.pipeline",
    "run_experiment": "quip.experiment",
    "save_checkpoint": "quip.checkpoint",
    "tune_model": "quip.finetune",
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
    import_module("quip.pretrained")


# At once where transformers has its quantizers already, otherwise as soon as it does.
register_post_import_hook(_register, "transformers.quantizers.auto")
