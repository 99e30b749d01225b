"""What the packed matrices of a block are, as words and tensors: to be written down, or sent."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quip.packed.layout import Layout


def packed_parts(
    block: nn.Module, names: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layout, fit for JSON, and the tensors of these matrices of a block; None: all of it.

    Names are those inside the block; of a stack all members are named.
    """
    layout, tensors = Layout.of(block), block.state_dict()
    if names is None:
        return layout.to_json(), tensors
    own = {*names}
    layout = Layout(
        {name: spec for name, spec in layout.modules.items() if name in own},
        {members: spec for members, spec in layout.stacks.items() if own.issuperset(members)},
    )
    return layout.to_json(), {
        key: x for key, x in tensors.items() if any(key.startswith(f"{name}.") for name in own)
    }


def put_parts(
    block: nn.Module, layout: Mapping[str, Any], tensors: Mapping[str, Tensor], *, whole: bool
) -> None:
    """Make matrices of a block what `packed_parts` said of them; `whole`: all of the block.

    Raises QuipError or RuntimeError where the words or the tensors do not fit.
    """
    training = block.training
    packed = Layout.from_json(layout)
    packed.make_room(block)
    if whole:
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False).train(training)
        return
    for name in packed.names:
        module, own = block.get_submodule(name), f"{name}."
        found = {k.removeprefix(own): x for k, x in tensors.items() if k.startswith(own)}
        module.load_state_dict(found, assign=True)
        module.requires_grad_(False).train(training)
