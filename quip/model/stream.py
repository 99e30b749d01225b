"""Models larger than memory: blocks stay in their files until their turn comes, one at a time.

    embeddings, head, final norm, buffers     in memory
    blocks                                    on the meta device but for their turn

transformers itself makes the skeleton and fills the blocks, by the names and conversions that it
knows of the model's kind: it is handed tensors that are read when it asks for their content, and
those of blocks have none at first. So what is missing, left over or of another shape is known from
the headers of the files, before a block is read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from quip.errors import Unavailable
from quip.model.matrices import check_weight, find_blocks
from quip.model.unread import META, Unread, entries_of, names_by_block, stamp, without_bars
from quip.packed.checkpoint import skeleton
from quip.packed.digests import digest_of_state, reading_from
from quip.packed.experts import unfuse

Reader: TypeAlias = Callable[[], Mapping[str, Tensor]]  # the tensors of a block, by name in it
HOME = torch.device("cpu")


class Stream:
    """The files of a model, of which one block at a time is in memory, and perhaps the next.

    Once a block is finished it may come from elsewhere (`moved`).
    """

    home = HOME

    def __init__(self, name: str, folder: Path, config: PretrainedConfig) -> None:
        """Looks at headers alone. Raises Unavailable for a folder without safetensors, and where
        these lack a tensor of their index; and as `skeleton` and `find_blocks` do."""
        self.name = name
        self._entries = entries_of(folder)
        self._stamps = {entry.path: stamp(entry.path) for entry in self._entries.values()}
        self._model = skeleton(config)  # as transformers makes it, to be filled
        self._prefix, self._blocks = find_blocks(self._model)
        self._names = names_by_block(self._model, self._entries, self._prefix)
        self._moved: dict[int, Reader] = {}
        self._mapping: list[Any] = []
        self._digest: str | None = None
        self._turn = Lock()

    def load(
        self, config: PretrainedConfig, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model without its blocks, in this dtype; and what does not fit between it and files,
        as from_pretrained tells it."""
        paths = tuple(map(str, self._stamps))
        empty = {name: Unread(entry) for name, entry in self._entries.items()}
        with self._open(self._names[None]) as unread, reading_from(paths):
            loaded: Any = type(self._model).from_pretrained(
                None,
                config=config,
                state_dict={**empty, **unread},
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        model, info = loaded
        model.eval().requires_grad_(False)
        self._blocks = find_blocks(model)[1]
        self._mapping = get_model_conversion_mapping(
            model, None, getattr(model, "hf_quantizer", None)
        )
        # What is filled is of this dtype, and has the room that packed matrices were made.
        self._model.set_submodule(self._prefix, deepcopy(self._blocks), strict=True)
        return model, info

    def index(self, block: nn.Module) -> int:
        """The number of a block of the model that was loaded."""
        return next(i for i, own in enumerate(self._blocks) if own is block)

    def empty(self, block: nn.Module) -> None:
        """Put a block back on the meta device, but for buffers that no file holds."""
        kept = {
            id(module.get_buffer(name))
            for module in block.modules()
            for name in module._non_persistent_buffers_set
        }
        block._apply(lambda x: x.to(self.home if id(x) in kept else META))

    def read(self, index: int) -> Mapping[str, Tensor]:
        """The tensors of a block by their names in it, from the disk; the block stays as it is.

        Raises Unavailable where its files changed since the start. Other threads may work on other
        blocks meanwhile.
        """
        with self._turn:
            moved = self._moved.get(index)
            return moved() if moved else self._read(index)

    def moved(self, index: int, read: Reader) -> None:
        """From now on a block comes from elsewhere: it was finished, and is what `read` tells."""
        self._moved[index] = read

    def state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The entries of the model's state_dict in their order, with one block in memory."""
        index, block = -1, dict[str, Tensor]()
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta:
                yield name, tensor
                continue
            number, _, own = name.removeprefix(f"{self._prefix}.").partition(".")
            if int(number) != index:
                index, block = int(number), {}  # before the next is read
                block = dict(self.read(index))
            yield name, block[own]

    def digest(self, model: nn.Module) -> str:
        """One digest of the whole model's state, taken once. Raises NonFinite, naming the first
        parameter that holds a NaN or an infinity."""
        if self._digest is None:
            parameters = {name for name, _ in model.named_parameters()}
            self._digest = digest_of_state(_finite(self.state(model), parameters))
        return self._digest

    def _read(self, index: int) -> Mapping[str, Tensor]:
        blocks = find_blocks(self._model)[1]
        bare = deepcopy(blocks[index])
        with self._open(self._names[index]) as unread, without_bars():
            convert_and_load_state_dict_in_model(
                self._model, unread, LoadStateDictConfig(weight_mapping=self._mapping)
            )
        filled, blocks[index] = blocks[index], bare
        unfuse(filled)
        return filled.state_dict()

    @contextmanager
    def _open(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The tensors of these names in their files, which have not changed before or after."""
        entries = [self._entries[name] for name in names]
        paths = {entry.path for entry in entries}
        with ExitStack() as stack:
            self._check(paths)
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            yield {entry.name: Unread(entry, files[entry.path]) for entry in entries}
            self._check(paths)

    def _check(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if stamp(path) != self._stamps[path]:
                raise Unavailable(
                    f"{self.name}: {path.name} was changed while it is in use; start again, and "
                    "leave the files alone"
                )


def put_state(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make these the content of a block, each in the type that the block has for it.

    Raises RuntimeError where they do not fit.
    """
    room = block.state_dict()
    own = {name: x.to(room[name].dtype) if name in room else x for name, x in tensors.items()}
    block.load_state_dict(own, assign=True)
    block.requires_grad_(False)


def _finite(entries: Iterable[tuple[str, Tensor]], parameters: set[str]) -> Iterator:
    for name, tensor in entries:
        if name in parameters:
            check_weight(name, tensor)
        yield name, tensor
