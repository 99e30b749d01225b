"""What matrices of a block became, as words and tensors, to be sent to another process."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quip.packed.layout import Layout


def packed_parts(
    block: nn.Module, names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layout, fit for JSON, and the tensors of these matrices of a block, by names inside it.

    Of a stack all members are named.
    """
    layout, own = Layout.of(block), {*names}
    layout = Layout(
        {name: spec for name, spec in layout.modules.items() if name in own},
        {members: spec for members, spec in layout.stacks.items() if own.issuperset(members)},
    )
    return layout.to_json(), {
        key: x
        for key, x in block.state_dict().items()
        if any(key.startswith(f"{name}.") for name in own)
    }


def put_parts(block: nn.Module, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make matrices of a block what `packed_parts` said of them."""
    packed = Layout.from_json(layout)
    packed.make_room(block)
    for name in packed.names:
        module, own = block.get_submodule(name), f"{name}."
        found = {k.removeprefix(own): x for k, x in tensors.items() if k.startswith(own)}
        module.load_state_dict(found, assign=True)
        module.requires_grad_(False).train(block.training)
