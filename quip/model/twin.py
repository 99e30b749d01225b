"""A block beside the block that it was: what its outputs lack for the inputs that it gets.

    original hidden states   ->   block as it was   ->   x~, W x~, h~ + W x~
    hidden states            ->   block as it is    ->   x,  W x,  h + W x

The groups of its matrices are observed one after the other, each when those before it have been
quantized: o_proj can then make up for what q, k and v have lost, and down_proj for all of them.
Both blocks have the same parameters until those of one are replaced, or tuned.
"""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.matrix.hessian import Observed
from quip.model.block import Block, Runner
from quip.model.inputs import Inputs
from quip.model.lacking import Lacking, Windows
from quip.model.residual import Reached, Residual
from quip.model.sensitivity.found import Sensitivity
from quip.model.states import States
from quip.packed.experts import Experts


class Twin(Block):
    """One decoder block of a paired walk."""

    def __init__(self, index: int, name: str, module: nn.Module, states: States) -> None:
        super().__init__(index, name, module, states)
        held = chain(module.parameters(), module.buffers())
        self._original: nn.Module = deepcopy(module, {id(x): x for x in held})

    def groups(self) -> list[list[str]]:
        """The names of the matrices to quantize, those of one input together, in their order.

        Matrices of the experts of one layer are together too.
        """
        found = self._states.team.tell(self._persist(self._leaders))
        for name, module in self.module.named_modules():
            if isinstance(module, Experts):
                own = f"{self.name}.{name}"
                found |= {one: own for one in self.matrices() if one.startswith(f"{own}.")}
        groups: dict[str, list[str]] = {}
        for name in self.matrices():
            groups.setdefault(found.get(name, name), []).append(name)
        return list(groups.values())

    @torch.no_grad()
    def observe_lacking(
        self,
        names: Sequence[str],
        held: Collection[int] | None = None,
        *,
        weights: Sensitivity | None = None,
        all_experts: bool = False,
    ) -> list[dict[str, Observed]]:
        """The moments of the one input of these matrices, with what their outputs lack.

        They do without the latter, as of `observe`, where a matrix does not see every token once:
        those of experts. Windows of this process that are `held` out, where there are any, are
        summed up apart too. With weights of tokens, the moments of tokens that weigh the same come
        after them. Raises as `observe` does.
        """
        anchors = dict[str, Tensor]()
        found = self._persist(lambda: self._observe_lacking(names, held, weights, anchors))
        each = [None] if weights is None else [weights, None]
        return found or self.observe_each(each, names, all_experts=all_experts)

    @torch.no_grad()
    def replay(self) -> None:
        """hidden = block(hidden), and the same of the original beside."""
        self._replay(self._run_original)
        super().replay()

    @torch.no_grad()
    def part(self, share: float) -> Float[Tensor, "count seqlen width"]:
        """What the block is to give once its parameters are tuned: its outputs, and from them this
        share of the way to those of the original, which has parameters of its own from now on.
        """
        self._original = deepcopy(self._original)
        wanted, done = self.outputs(self._run_original), 0
        for _, now in self._run_all(self.run) if share < 1 else ():
            then = wanted[done : done + len(now)]
            then.copy_(torch.lerp(now.float(), then.to(now.device, torch.float32), share))
            done += len(now)
        return wanted

    def _run_original(self, batches: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        whole = self._states.original.split(self.batch_size)
        yield from self._run(self._original, whole, batches)

    @torch.no_grad()
    def _leaders(self) -> dict[str, str]:
        """By the name of each matrix that runs on the first batch, the first of the same input."""
        inputs = Inputs()

        def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.name(name, args[0] if args else next(iter(kwargs.values())))

        hooks = [
            one.module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
            )
            for name, one in self.matrices().items()
        ]
        try:
            for _ in self.run([0]):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return inputs.names

    def _observe_lacking(
        self,
        names: Sequence[str],
        held: Collection[int] | None,
        weights: Sensitivity | None,
        anchors: dict[str, Tensor],
    ) -> list[dict[str, Observed]] | None:
        own, team = self.matrices(), self._states.team
        roots = weights.roots(names[0]) if weights else None
        sums = Lacking(
            {name: own[name] for name in names},
            team,
            anchors,
            holds_out=held is not None,
            device=self._device,
        )
        until: Collection[str] | None = None  # of the first batch all
        for i, entering in enumerate(self._states.batches()):
            windows = entering.shape[0], entering.shape[1]
            then = self._see(self._original, self._run_original, names, i, until)
            now = self._see(self.module, self.run, names, i, until)
            whole = all(one.is_whole(names, windows) for one in (then, now))
            if until is None and not all(team.hear(whole)):
                return None
            if not whole:
                raise UnsupportedModel(
                    f"{names[0]} sees other tokens in one batch than in others; only matrices that "
                    "run once per pass can be walked"
                )
            until = then.sums.keys() & now.sums.keys()
            first = i * self.batch_size
            seen = Windows(
                now.inputs(names[0], windows),
                {name: then.lack(name, now, windows) for name in names},
                [j for j in range(len(entering)) if first + j in (held or ())],
            )
            if weights is not None:
                at = slice(first * windows[1], (first + windows[0]) * windows[1])
                seen = seen.weighed(None if roots is None else roots[at].view(windows))
            sums.add(seen)
        found = sums.join()
        return [dict.fromkeys(names, each) for each in (found, found.plain) if each is not None]

    def _see(
        self,
        module: nn.Module,
        run: Runner,
        names: Sequence[str],
        batch: int,
        until: Collection[str] | None,
    ) -> Residual:
        """What passes by these matrices on a batch; with `until`, until their sums are there."""
        seen = Residual(None if until is None else (names, until))
        hooks = [module.register_forward_pre_hook(seen.enter, with_kwargs=True)]
        for name in names:
            one = module.get_submodule(name.removeprefix(f"{self.name}."))
            hooks.append(one.register_forward_hook(seen.hook(name), with_kwargs=True))
        try:
            with seen:
                for _ in run([batch]):
                    pass
        except Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen
