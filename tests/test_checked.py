"""The check of every call that the tests make: what is not as declared is refused."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from quip.matrix.hessian import Hessian
from tests.support.checked import checked

REFUSED = (BeartypeCallHintViolation, TypeCheckError)
x = torch.zeros(2, 3)


@checked
def added(x: Float[Tensor, "m n"], y: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    return x + y


@checked
def turned(x: "Float[Tensor, 'm n'] | None") -> Float[Tensor, "n m"]:
    return x if x is None or len(x) < 3 else x.T


@checked
def widened(x: list[Float[Tensor, "m n"]], n: int) -> Float[Tensor, "m {n}"]:
    return torch.cat(x, 1)


@checked
def rows(x: Float[Tensor, "m n"]) -> Iterator[Float[Tensor, " n"]]:
    for row in x:
        added(row[None], row[None])  # sizes of its own
        yield row


@checked
@dataclass(frozen=True)
class Record:
    name: str
    codes: Int[Tensor, "m n"]

    @property
    @checked
    def count(self) -> int:
        return self.name

    @classmethod
    @checked
    def empty(cls, name: str) -> "Record":
        return cls(name, x.long())


def test_what_is_as_declared_passes():
    assert added(x, y=x).shape == (2, 3)
    assert turned(torch.zeros(3, 2)).shape == (2, 3)
    assert widened([x, x], 6).shape == (2, 6)
    assert len(list(rows(x))) == 2
    assert Record.empty("a").name == "a"


@pytest.mark.parametrize(
    "call",
    [
        lambda: added(x, x.T),
        lambda: added(x, x[0]),
        lambda: added(x, x.long()),
        lambda: added(x, "x"),
        lambda: turned(x),
        lambda: turned(None),
        lambda: widened([x, x], 5),
        lambda: widened([x, x], "6"),
        lambda: rows(x[0]),
        lambda: Record("a", x),
        lambda: Record.empty(1),
        lambda: Record.empty("a").count,
        lambda: Hessian(3).update(x.long()),
    ],
)
def test_what_is_not_is_refused(call):
    with pytest.raises(REFUSED):
        call()


def test_arguments_that_do_not_fit_are_no_matter_of_types():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        added(x)
