"""Changes of basis that make W and H easy to round, applied structurally and undone exactly.

W becomes W~ = A W B^-1 and H becomes B H B^T, so that tr(W H W^T) keeps its value and
A^-1 W~ (B x) = W x. `Rescale` is a diagonal B; `Kronecker` has orthogonal A and B, each
p x q blocks of small random rotations around a permutation: O(m n (p + q)), never n x n.
`Hadamard` has random signs and a Hadamard matrix: O(m n log(m n)).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from quip import hadamard
from quip.errors import QuipError
from quip.rotation import STORED, Rotation
from quip.stored import Options, Stored


@runtime_checkable
class Transform(Stored, Protocol):
    """A frozen change of basis; its laws are in tests/laws.py."""

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]: ...

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]: ...

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """B x: activations entering."""
        ...

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        """A^-1 y: activations leaving."""
        ...


Draw = Callable[[Tensor, Tensor, torch.Generator], Transform]


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other."""

    links: Sequence[Transform] = ()

    @classmethod
    def draw(
        cls, draws: Sequence[Draw], W: Tensor, H: Tensor, rng: torch.Generator
    ) -> tuple["Chain", Tensor, Tensor]:
        """Draw each transform for what the ones before it left; also returns W and H after all."""
        links = []
        for draw in draws:
            links.append(draw(W, H, rng))
            W, H = links[-1].apply(W, H)
        return cls(tuple(links)), W, H

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        for link in self.links:
            W, H = link.apply(W, H)
        return W, H

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all links."""
        return {name: x for link in self.links for name, x in link.tensors().items()}

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        for link in reversed(self.links):
            W_hat = link.undo(W_hat)
        return W_hat

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        for link in self.links:
            x = link.input(x)
        return x

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        for link in reversed(self.links):
            y = link.output(y)
        return y


@dataclass(frozen=True)
class Rescale:
    """W diag(r), diag(r)^-1 H diag(r)^-1 (QuIP, Algorithm 1, line 4)."""

    r: Float[Tensor, " n"]

    @classmethod
    def draw(cls, W: Tensor, H: Tensor, rng: torch.Generator) -> "Rescale":
        """r_j = (H_jj / (W^T W)_jj)^(1/4), the minimiser of tr(H) |W|_F^2.

        A column of W that is zero counts as an average one, and so does an input that always is:
        any positive r would do, but a small one would blow up what undo makes of that column.
        """
        r = (_filled(H.diagonal()) / _filled(W.square().sum(0))).pow(0.25)
        return cls((r / r.mean()).clamp_min(1e-8).to(STORED).to(W.dtype))

    def options(self) -> Options:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"rescale": self.r.to(STORED)}

    @classmethod
    def layout(cls, m: int, n: int) -> dict[str, Tensor]:
        return {"rescale": torch.empty(n, dtype=STORED, device="meta")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], m: int, n: int) -> "Rescale":
        r = tensors["rescale"].float()
        if not bool(((r > 0) & r.isfinite()).all()):
            raise QuipError("a factor of its rescaling is not positive: the file is damaged")
        return cls(r)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        return W * self.r, H / self.r / self.r[:, None]

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return W_hat / self.r.to(W_hat)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x / self.r.to(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return y


@dataclass(frozen=True)
class Kronecker:
    """R_out W R_in^T, R_in H R_in^T with random orthogonal R (QuIP, Algorithm 1, line 5)."""

    R_out: Rotation
    R_in: Rotation

    @classmethod
    def draw(
        cls,
        W: Tensor,
        H: Tensor,
        rng: torch.Generator,
        *,
        blocked: bool = False,
        permute: bool = True,
    ) -> "Kronecker":
        """Two rotations as `Rotation.draw` makes them.

        R_out draws no permutation of its output: that would only shuffle the rows, which are
        rounded independently.
        """
        R_in = Rotation.draw(W.shape[1], rng, blocked=blocked, mix=permute, shuffle=permute)
        R_out = Rotation.draw(W.shape[0], rng, blocked=blocked, mix=permute, shuffle=False)
        return cls(R_out, R_in)

    def options(self) -> Options:
        haars = [h for R in (self.R_in, self.R_out) for h in (R.left, R.right)]
        blocked = any(len(haar.signs) > 1 for haar in haars)
        return {"blocked": blocked, "permute": self.R_in.mix is not None}

    def tensors(self) -> dict[str, Tensor]:
        pairs = zip(self.R_in.stored(), self.R_out.stored(), strict=True)
        parts = [torch.cat(pair) for pair in pairs]
        return {name: x for name, x in zip(ROTATIONS, parts, strict=True) if x.numel()}

    @classmethod
    def layout(cls, m: int, n: int, *, blocked: bool, permute: bool) -> dict[str, Tensor]:
        pairs = zip(*_sizes(m, n, blocked, permute), strict=True)
        return {
            name: torch.empty(sum(pair), dtype=dtype, device="meta")
            for (name, dtype), pair in zip(ROTATIONS.items(), pairs, strict=True)
            if sum(pair)
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], m: int, n: int, *, blocked: bool, permute: bool
    ) -> "Kronecker":
        sizes_in, _ = _sizes(m, n, blocked, permute)
        parts = [tensors.get(name, torch.empty(0)) for name in ROTATIONS]
        halves = [(x[:size], x[size:]) for x, size in zip(parts, sizes_in, strict=True)]
        of_in, of_out = zip(*halves, strict=True)
        R_in = Rotation.restored(n, of_in, blocked=blocked, mix=permute, shuffle=permute)
        return cls(Rotation.restored(m, of_out, blocked=blocked, mix=permute, shuffle=False), R_in)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        W = self.R_in.rotate(self.R_out.rotate_rows(W))
        return W, self.R_in.rotate(self.R_in.rotate_rows(H))

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return self.R_in.invert(self.R_out.invert_rows(W_hat))

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self.R_in.rotate(x)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return self.R_out.invert(y)


@dataclass(frozen=True)
class Hadamard:
    """The randomized Hadamard transform (QuIP#, section 3): with Omega orthogonal and S diagonal,

        W~ = Omega_m^T S_out^-1 W S_in^-1 Omega_n,   H~ = Omega_n^T S_in H S_in Omega_n,
        W_hat = S_out Omega_m W~_hat Omega_n^T S_in.

    S_in and S_out are drawn as random signs. Fine-tuning may make them any numbers.
    """

    signs_in: Float[Tensor, " n"]
    signs_out: Float[Tensor, " m"]
    block: int | None = None  # Omega is block diagonal with blocks of this size; None: one block

    @classmethod
    def draw(
        cls, W: Tensor, H: Tensor, rng: torch.Generator, *, block: int | None = None
    ) -> "Hadamard":
        """Raises UsageError where no Hadamard matrix fits the size of W."""
        for size in W.shape:
            hadamard.check(size, block)
        m, n = W.shape
        signs = 2.0 * torch.randint(2, (n + m,), generator=rng) - 1
        signs = signs.to(W)
        return cls(signs[:n], signs[n:], block)

    def options(self) -> Options:
        return {"block": self.block}

    def tensors(self) -> dict[str, Tensor]:
        return {"signs_in": self.signs_in.to(SIGNS), "signs_out": self.signs_out.to(SIGNS)}

    @classmethod
    def layout(cls, m: int, n: int, *, block: int | None) -> dict[str, Tensor]:
        sizes = {"signs_in": n, "signs_out": m}
        return {k: torch.empty(size, dtype=SIGNS, device="meta") for k, size in sizes.items()}

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], m: int, n: int, *, block: int | None
    ) -> "Hadamard":
        for size in (m, n):
            hadamard.check(size, block)
        signs_in, signs_out = tensors["signs_in"].float(), tensors["signs_out"].float()
        if not bool(signs_in.isfinite().all() and signs_out.isfinite().all()):
            raise QuipError("a sign of its Hadamard transform is not finite: the file is damaged")
        return cls(signs_in, signs_out, block)

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        W = W / self.signs_out.to(W)[:, None] / self.signs_in.to(W)
        s = self.signs_in.to(H)
        return self._from_both(W), self._from_both(H * s * s[:, None])

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        W = hadamard.rotate(hadamard.rotate(W_hat, block=self.block).T, block=self.block).T
        return W * self.signs_out.to(W)[:, None] * self.signs_in.to(W)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return hadamard.invert(x * self.signs_in.to(x), block=self.block)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return hadamard.rotate(y, block=self.block) * self.signs_out.to(y)

    def _from_both(self, A: Tensor) -> Tensor:
        """Omega^T A Omega."""
        return hadamard.invert(hadamard.invert(A, block=self.block).T, block=self.block).T


SIGNS = torch.float16  # of finer steps than bfloat16 near 1, where fine-tuned signs stay
ROTATIONS = {"factors": STORED, "permutations": torch.int32}


def _sizes(m: int, n: int, blocked: bool, permute: bool) -> tuple[tuple[int, int], ...]:
    """The lengths of what R_in and R_out each add to the tensors of ROTATIONS."""
    return (
        Rotation.sizes(n, blocked=blocked, mix=permute, shuffle=permute),
        Rotation.sizes(m, blocked=blocked, mix=permute, shuffle=False),
    )


def _filled(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Zeros replaced by the mean of all, or by 1 if there is nothing else."""
    return torch.where(sizes > 0, sizes, sizes.mean() if bool(sizes.any()) else 1.0)


draw_blocked = partial(Kronecker.draw, blocked=True)
draw_blocked_unpermuted = partial(Kronecker.draw, blocked=True, permute=False)

# By the name that a file gives them.
TRANSFORMS: dict[str, Any] = {"rescale": Rescale, "kronecker": Kronecker, "hadamard": Hadamard}
