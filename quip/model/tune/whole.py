"""Tune a quantized model against its original: the same predictions from the same tokens.

The loss is KL(p_teacher || p_student) of the next token (QuIP#, section 5, in the form whose
minimum is 0: the cross-entropy H(p_teacher, p_student) less the teacher's own entropy, which is
constant). The teacher runs beside the student, window by window: no distribution is ever stored.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel, UsageError, finite
from quip.matrix.seeds import rng_for
from quip.model.calls import forwards
from quip.model.device import placed
from quip.model.finite import finite_predictions
from quip.model.matrices import find_blocks
from quip.model.passed import Passed
from quip.model.team import ALONE, Team
from quip.model.tune.descent import descend, is_noise
from quip.model.tune.kl import CHUNK, kl_terms
from quip.model.tune.tunable import MasterWeights
from quip.model.tune.tuning import Tuning
from quip.packed.embedding import TiedHead
from quip.packed.linear import QuantizedLinear, quantized_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelTuning(Tuning):
    """How to tune a whole model.

    The rates are those of QuIP#'s paper; its published commands take a fifth of them. A model of a
    million weights learns faster with ten times as much; its centroids, in two and in four
    dimensions, with half a percent of their RMS better than with none and with one.
    """

    epochs: int = 8
    lr: float = 5e-5
    signs_lr: float = 5e-4
    centroids_lr: float = 5e-3
    batch_size: int = 2
    patience: int = 3
    held_out: float = 0.25


@dataclass(frozen=True, kw_only=True)
class ModelTuningRecord:
    """What tuning a whole model came to. KL in nats per token, over the windows held out."""

    kl_before: float
    kl_after: float
    epochs: int
    windows: int  # trained on
    windows_held_out: int
    parameters: int  # numbers that were tuned
    head: bool  # whether those of lm_head were
    seconds: float
    kl_std_error: float | None = None  # of kl_before - kl_after, over those windows; None of one

    @property
    def improved(self) -> bool:
        return self.kl_after < self.kl_before

    @property
    def within_noise(self) -> bool:
        return is_noise(self.kl_before, self.kl_after, self.kl_std_error)


def tune_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Int[Tensor, "count seqlen"],
    tuning: ModelTuning,
    *,
    device: torch.device | str,
    seed: int,
    passed: Passed | None = None,
    team: Team = ALONE,
) -> ModelTuningRecord:
    """Tune sign vectors, centroids, norms, biases, and an lm_head that is not tied, to the teacher.

    Computes in float32, with W~ in the student's dtype; blocks keep their inputs only, and run
    again for the backward pass, which then holds the W~ of one block whose centroids are learnt.
    Both models are on the device meanwhile, then back where they were; of a teacher whose blocks
    the windows have `passed`, what is outside them, to the same result. The student is left in the
    best state by the last windows, which it is not trained on; bitwise as it was if that is the
    first. Raises UsageError and UnsupportedModel before anything runs. In a team the windows of a
    step are dealt to its processes, and all of them make what one alone would, bit for bit.
    """
    _check(student, teacher, tokens)
    held = tuning.held(len(tokens))
    start, head = time.perf_counter(), _head(student)
    trained = [p for p in student.parameters() if p.ndim == 1] + (
        [head] if head is not None else []
    )
    there = passed.standing_in(teacher, device) if passed else placed(teacher, device)
    with placed(student, device), there, _recomputed(student):
        masters = MasterWeights(student, trained, dtype=student.dtype)
        with masters, _Progress(tuning, len(tokens), held, team) as progress:
            found = descend(
                masters,
                partial(_losses, student, teacher, tokens.to(device), progress),
                [1] * len(tokens),
                tuning,
                rng=rng_for(seed, "the whole model"),
                tell=progress.report,
                team=team,
            )
        _check_finite(found.before, student, teacher, tokens[-held:].to(device))
    return ModelTuningRecord(
        kl_before=found.before,
        kl_after=found.after,
        epochs=found.epochs,
        windows=len(tokens) - held,
        windows_held_out=held,
        parameters=sum(p.numel() for p in masters.parameters),
        head=head is not None,
        seconds=time.perf_counter() - start,
        kl_std_error=found.std_error,
    )


@torch.no_grad()
def _check_finite(
    kl: float, student: nn.Module, teacher: nn.Module, held: Int[Tensor, "held seqlen"]
) -> None:
    """Raise NonFinite for a KL before tuning that is not finite, with where it began."""
    if math.isfinite(kl):
        return
    for name, model in (("teacher", teacher), ("student", student)):
        for ids in held.split(1):
            with finite_predictions(model, f"the {name}'s KL divergence"):
                model(input_ids=ids, use_cache=False)
    finite(kl, "the KL divergence on windows held out")


def _check(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Int[Tensor, "count seqlen"]
) -> None:
    if tokens.shape[1] < 2:
        raise UsageError(f"windows of {tokens.shape[1]} tokens: 2 or more are needed")
    for name, model in (("student", student), ("teacher", teacher)):
        if model.training:
            raise UsageError(
                f"the {name} is in training mode, where dropout is random; call eval()"
            )
    named = f"the teacher {teacher.name_or_path}".rstrip()
    if quantized_layers(teacher):
        raise UnsupportedModel(f"{named} is quantized itself; give the original model")
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UnsupportedModel(
            f"{named} has a vocabulary of {sizes[1]} tokens, the model to tune of {sizes[0]}; "
            "give the model that it was quantized from"
        )


def _head(model: PreTrainedModel) -> nn.Parameter | None:
    """The weights of lm_head; None if they are packed, or those of the embedding, and stay."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, QuantizedLinear | TiedHead):
        log.info("lm_head is packed: what is around its codes is tuned, as of every packed matrix")
        return None
    if head is None or head.weight is getattr(embedding, "weight", None):
        log.info("lm_head is tied to the embedding, and stays as it is")
        return None
    return head.weight


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """The model's blocks keep no activations for the backward pass but run again in it."""
    _, blocks = find_blocks(model)
    with forwards(blocks, lambda _, x: partial(checkpoint, x.forward, use_reentrant=False)):
        yield


def _losses(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    progress: "_Progress",
    windows: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    for i in windows:
        ids = tokens[i : i + 1]
        with torch.no_grad():
            p_logits = teacher(input_ids=ids, use_cache=False).logits[0, :-1]
        q_logits = student(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = _kl(p_logits, q_logits)
        yield loss, loss.detach()[None]
        progress.bar.update()


def _kl(
    p_logits: Float[Tensor, "s vocab"], q_logits: Float[Tensor, "s vocab"]
) -> Float64[Tensor, ""]:
    """The mean of KL(p || q), in nats; beside the logits, a chunk of positions in memory."""
    size = max(1, CHUNK // p_logits.shape[-1])
    chunks = zip(p_logits.split(size), q_logits.split(size), strict=True)
    sums = [checkpoint(_kl_of_chunk, x, y, use_reentrant=False) for x, y in chunks]
    return torch.stack(sums).sum() / len(p_logits)


def _kl_of_chunk(
    p_logits: Float[Tensor, "s vocab"], q_logits: Float[Tensor, "s vocab"]
) -> Float64[Tensor, ""]:
    return kl_terms(p_logits, q_logits).sum(dtype=torch.float64)


class _Progress:
    """A bar of windows on a terminal, and a line for each comparison."""

    def __init__(self, tuning: ModelTuning, count: int, held: int, team: Team) -> None:
        trained = tuning.epochs * (count - held)
        step = tuning.batch_size
        between = math.ceil(tuning.every / step) * step if tuning.every else count - held
        comparisons = 1 + math.ceil(trained / between)
        self.bar = tqdm(
            total=(trained + comparisons * held) // team.size,  # of this process
            desc="fine-tuning",
            unit="window",
            dynamic_ncols=True,
            disable=not (team.leads and sys.stderr.isatty()),
        )

    def report(self, windows: int, kl: float) -> None:
        log.info("tuned on %d windows: held-out KL divergence %.4g", windows, kl)
        self.bar.set_postfix(kl=f"{kl:.4g}")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
