"""What the stored tensors of a packed matrix make: a decoder, a transform, the scales of its rows.

Parts are made when a matrix is first computed with, and kept for as long as its tensors stay as
they are; they never refer to the packed codes.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from quip.codebooks.grid import Grids
from quip.packed.spec import Spec
from quip.transforms.vectors import Vectors

FEW = 16  # tokens: no decoder has a kernel for more
Kept = tuple[weakref.ref[Tensor], tuple[int, bool], dict[int, Tensor]]


class Answers:
    """What was computed for one member of a stack, until the others come for their parts of it."""

    def __init__(self) -> None:
        # Of a question: the inputs, their version and whether gradients were asked for, and who
        # has not come for the answer yet.
        self.kept: Kept | None = None

    def ask(self, x: Tensor, index: int, compute: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """Part `index` of compute(x), where each part is asked for once."""
        # Tensors of inference_mode have no version: they must not be changed between two members.
        now = (_version(x), torch.is_grad_enabled())
        held = self.kept  # read once: another thread may put its own there meanwhile
        left = held[2] if held and held[0]() is x and held[1] == now else {}
        y = left.pop(index, None)
        if y is None:
            answers = dict(enumerate(compute(x)))
            y = answers.pop(index)
            self.kept = (weakref.ref(x, self.forget), now, answers)
        elif not left:
            self.forget()
        return y

    def forget(self, _: Any = None) -> None:
        """Let go of answers that nobody will ask for."""
        self.kept = None


class Parts:
    """W_hat of a matrix or stack of `sizes` rows, as something that vectors are multiplied by."""

    def __init__(
        self, stored: Mapping[str, Tensor], spec: Spec, sizes: Sequence[int], n: int
    ) -> None:
        self._made_of = [(weakref.ref(x), _version(x)) for x in stored.values()]
        with torch.inference_mode(False):  # what is made may be used in training later
            self.decoder, self.transform = spec.restore(stored, sum(sizes), n)
            self.scales = _of_rows(stored["scales"], sizes) if "scales" in stored else None
            self.vectors = Vectors.of(self.transform, self.scales)
        self.answers = Answers()  # of compiled code
        self.ready = False  # whether a product leaves nothing more to be made (ops.py)

    def fit(self, stored: Mapping[str, Tensor]) -> bool:
        """Whether these tensors are what the parts were made of, and unchanged."""
        pairs = zip(self._made_of, stored.values(), strict=True)
        return all(ref() is x and version == _version(x) for (ref, version), x in pairs)

    def multiply(
        self, x: Float[Tensor, "*batch n"], codes: Int32[Tensor, "m words"]
    ) -> Float[Tensor, "*batch m"]:
        """diag(scales) W_hat x in the dtype of x."""
        m, n = codes.shape[0], x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens = x.numel() // n
        if tokens * (m + n) > 2 * m * n:
            W = self.dense(codes, n, wide)
            return linear(x, (W if self.scales is None else W * self.scales[:, None]).to(x.dtype))
        # A rotation may gather all of |x| in one number, beyond the range of float16.
        dtype = wide if x.dtype == torch.float16 else x.dtype
        # A kernel for few tokens takes more exact inputs; else they are rounded now, in one pass.
        x_t = self.vectors.input(x, wide if tokens <= FEW else dtype)
        return self.vectors.output(self.decoder.multiply(codes, x_t, dtype), x.dtype)

    def rows(
        self, ids: Int[Tensor, "*batch"], codes: Int32[Tensor, "m words"], n: int
    ) -> Float[Tensor, "*batch n"]:
        """Rows of W_hat by their numbers, of a matrix without transforms, in float32."""
        picked, decoder = ids.flatten(), cast(Grids, self.decoder)
        found = decoder.of_rows(picked).dense(codes[picked], n, torch.float32)
        return found.view(*ids.shape, n)

    def dense(
        self, codes: Int32[Tensor, "m words"], n: int, dtype: torch.dtype
    ) -> Float[Tensor, "m n"]:
        """W_hat in the original basis."""
        return self.transform.undo(self.decoder.dense(codes, n, dtype))


# By the packed codes, for layers and for compiled code (ops.py) alike. Parts go with their codes.
MADE: Any = WeakTensorKeyDictionary()


def parts_of(stored: Mapping[str, Tensor], spec: Spec, sizes: Sequence[int], n: int) -> Parts:
    """The parts that these tensors make, made anew where one of them was changed.

    `sizes` are the rows of the members of a stack, or of the one matrix. Raises QuipError where
    the tensors make none.
    """
    made = MADE.get(stored["codes"])
    if made is None or not made.fit(stored):
        made = MADE[stored["codes"]] = Parts(stored, spec, sizes, n)
    return made


def _of_rows(scales: Float[Tensor, " count"], sizes: Sequence[int]) -> Float[Tensor, " m"]:
    return torch.cat([s.expand(m) for s, m in zip(scales, sizes, strict=True)])


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version  # tensors of inference_mode have none
