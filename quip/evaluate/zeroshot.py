"""Zero-shot tasks: EleutherAI's lm-eval on a loaded model, with three tasks of our own.

Ours (quip.evaluate.cloze) come before lm-eval's of the same name: `lambada_quip`, prompted as by
the QuIP paper; `storycloze`, from a file of the user's; `quip_demo_cloze`, without a download.
"""

import copy
import difflib
import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.data.reach import reach_hub
from quip.errors import Unavailable, UsageError, how_to_install, one_line, shown
from quip.evaluate.cloze import OWN, story_rows, task_config
from quip.evaluate.quiet import quiet
from quip.model.device import placed
from quip.model.finite import finite_predictions
from quip.model.vocabulary import first_token

BOOTSTRAP = 1000  # resamples, for the error of a perplexity; an accuracy's has a closed form

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """What is asked for."""

    tasks: tuple[str, ...]  # ours, or any task, group or tag of lm-eval
    num_fewshot: int = 0
    limit: int | None = None  # documents per task, the first ones
    storycloze_csv: Path | None = None


def check_tasks(asked: ZeroShot) -> None:
    """Raise what would be raised later, without a model and without the network.

    A name that is not ours makes lm-eval read its thousands of task files, once a process.
    """
    if find_spec("lm_eval") is None:
        raise Unavailable(
            f"zero-shot tasks need the package lm-eval; install it with: {how_to_install('eval')}"
        )
    if not asked.tasks:
        raise UsageError("no zero-shot task is named; name one, such as quip_demo_cloze")
    if asked.num_fewshot < 0:
        raise UsageError(f"num_fewshot is {asked.num_fewshot}; it must be at least 0")
    if asked.limit is not None and asked.limit < 1:
        raise UsageError(f"limit is {asked.limit}; it must be at least 1")
    for name in asked.tasks:
        if name in OWN and asked.num_fewshot:
            raise UsageError(f"{name} has no examples to show; it runs with num_fewshot 0 only")
        if name not in OWN and name not in _manager(True).task_index:
            known = [*OWN, *_manager(True).all_tasks]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"ours are {', '.join(OWN)}"
            raise UsageError(
                f"unknown zero-shot task {shown(name)}: {hint} (`lm-eval ls tasks`: all)"
            )
    if "storycloze" in asked.tasks:
        story_rows(asked.storycloze_csv)


def fetch_tasks(
    asked: ZeroShot, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Any]:
    """lm-eval's tasks with their data, downloaded where they must be: what `zeroshot` asks.

    Raises whatever could be raised later, for want of a data set or of a first token.
    """
    check_tasks(asked)
    first_token(model, tokenizer)
    with quiet(progress=False):
        return _build(asked)


def zeroshot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: ZeroShot,
    *,
    device: str,
    batch_size: int = 8,
    progress: bool = False,
    tasks: list[Any] | None = None,
) -> dict[str, dict[str, float | int]]:
    """task -> {acc, acc_stderr, acc_norm, ...: whatever the task measures; samples; version}.

    log p is taken in float32 from logits of any dtype. A group gives a row for itself and one for
    each of its tasks. The same model gives the same numbers; no random state is touched. The
    model is on the device during the evaluation, then back where it was, its weights tied or
    untied as they were. Prompts longer than the model are cut from the left, with a warning.
    `tasks` are those of `fetch_tasks`, once. Raises NonFinite where the model predicts nothing.
    """
    tasks = fetch_tasks(asked, model, tokenizer) if tasks is None else tasks
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    with (
        quiet(progress) as warnings,
        placed(model, device),
        finite_predictions(model, "a zero-shot score"),
    ):
        found = _evaluate(model, tokenizer, tasks, asked, batch_size)
    if cut := sum("exceeds model's maximum length" in line for line in warnings):
        log.warning("zero-shot: %d prompts were longer than the model and cut from the left", cut)
    return {name: _row(name, found) for name in found["results"]}


@cache
def _manager(defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _build(asked: ZeroShot) -> list[Any]:
    """Tasks and groups with their data, downloaded where they must be."""
    built: dict[str, Any] = {}
    source: dict[str, str] = {}  # task -> the name it was asked for by
    for name in dict.fromkeys(asked.tasks):
        loaded = _load(name, asked)
        for task_name, task in loaded["tasks"].items():
            if source.setdefault(task_name, name) != name:
                raise UsageError(f"{task_name} is in both {source[task_name]} and {name}; name one")
            _check_built(task_name, task, asked)
        groups = loaded["groups"]
        built.update({name: groups[name]} if name in groups else loaded["tasks"])
    return list(built.values())


def _load(name: str, asked: ZeroShot) -> Any:
    own = name in OWN
    if not own:
        reach_hub(f"task {name}")
    spec = task_config(name, storycloze_csv=asked.storycloze_csv) if own else name
    try:
        return _manager(not own).load([spec])
    except ImportError as error:
        raise Unavailable(f"{name}: {error}; install the package that lm-eval needs") from error
    except Exception as error:  # the hub's errors share no class: network, cache, parser, ...
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise Unavailable(
            f"{name}: its data set cannot be loaded ({reason}); go online, "
            "or fill the hub's cache elsewhere and set HF_HUB_OFFLINE=1"
        ) from error


def _check_built(name: str, task: Any, asked: ZeroShot) -> None:
    """Refuse what lm-eval would refuse without a remedy, or answer with other than was asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name} runs code that the model writes, which is not done; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name} asks about images or sound, not text alone; leave it out")
    shots = asked.num_fewshot
    if shots == 0:
        return
    if task.get_config("num_fewshot") == 0:
        raise UsageError(f"{name} fixes num_fewshot at 0; leave out --num_fewshot or the task")
    # lm-eval would take them from the documents it scores, the one in question among them.
    examples = getattr(task, "fewshot_cfg", None)
    chosen = examples is not None and (examples.split or examples.samples)
    apart = task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())
    if not chosen and not apart:
        raise UsageError(f"{name} has no examples to show; it runs with num_fewshot 0 only")
    if hasattr(task, "sampler") and shots > len(task.sampler.df):
        raise UsageError(f"num_fewshot {shots}: {name} has only {len(task.sampler.df)} examples")


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    asked: ZeroShot,
    batch_size: int,
) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # HFLM would tie an output layer that was given weights of its own.
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            prefix_token_id=first_token(model, tokenizer),
            batch_size=batch_size,
            softmax_dtype=torch.float32,  # log p of some -10 has a spacing of 0.06 in bfloat16
        )
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=_manager(False),
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            random_seed=None,  # these three would seed the global generators
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    finally:
        del model.tie_weights


def _row(name: str, found: Any) -> dict[str, float | int]:
    """{metric: value}; lm-eval's keys are `metric,filter`, and its `none` is no filter."""
    result = found["results"][name]
    row: dict[str, float | int] = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }
    if "sample_len" in result:
        row["samples"] = result["sample_len"]
    version = found["versions"].get(name)
    return row | ({"version": version} if isinstance(version, int | float) else {})
