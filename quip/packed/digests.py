"""Digests of tensors: what is read is what was written, or it is named.

A file carries them in its own header, so that they go where it goes, and are gone once another
program writes it anew. Of a checkpoint each tensor has its own; of other files, all have one with
the words beside them.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from quip.errors import Unavailable, shown
from quip.files import replacing
from quip.packed.files import DAMAGED, opened
from quip.reading import parse_json

DIGESTS = "xxh3_128"  # the word of a header that holds the digest of each tensor by name
SEAL = "seal"  # that which holds one of all tensors and of the other words
NAMED = 5  # damaged tensors, in a message
BUFFER = 1 << 24  # bytes that are copied at once

verifying = ContextVar("verifying", default=True)
streamed: ContextVar[Sequence[str]] = ContextVar("streamed", default=())


@contextmanager
def unverified() -> Iterator[None]:
    """What from_pretrained loads inside is not compared with its digests."""
    token = verifying.set(False)
    try:
        yield
    finally:
        verifying.reset(token)


@contextmanager
def reading_from(files: Sequence[str]) -> Iterator[None]:
    """What from_pretrained is handed inside as a `state_dict` is read from these files."""
    token = streamed.set(files)
    try:
        yield
    finally:
        streamed.reset(token)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, in the order of its entries."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest_of(tensor: Tensor) -> str:
    """XXH3 of 128 bits, in hexadecimal, of `int32 [8, 4]`, say, and the bytes of such a tensor."""
    words = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    digest = xxhash.xxh3_128(words.encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def digest_of_state(entries: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of tensors by name, in their order: of their names, types, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in entries:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def sign(path: Path) -> None:
    """Write the digest of each tensor of a safetensors file into its header."""
    with opened(path, f"{path.name} is damaged", DAMAGED) as file:
        digests = {name: digest_of(file.get_tensor(name)) for name in sorted(file.keys())}
    # Not by safetensors, whose headers of several words are in another order each time.
    with path.open("rb") as old, replacing(path) as partial, partial.open("wb") as new:
        words = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        words.setdefault("__metadata__", {})[DIGESTS] = json.dumps(digests)
        text = json.dumps(words, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, BUFFER)


def verify(path: Path) -> dict[str, bool]:
    """Whether each tensor of a file is what was signed, by name; empty where nothing was.

    Raises Unavailable for a file that is no whole one.
    """
    with opened(path, f"{path.name} is damaged or truncated", DAMAGED) as file:
        text = (file.metadata() or {}).get(DIGESTS)
        if text is None:
            return {}
        signed, held = parse_json(text, dict[str, str]), set(file.keys())
        return {
            name: name in held and digest_of(file.get_tensor(name)) == signed.get(name)
            for name in sorted(held | signed.keys())
        }


def check_digests(files: Sequence[Path]) -> None:
    """Raise Unavailable, naming tensors, for the first of these files that is not what was signed.

    Files without digests, of older versions and of other programs, are not looked at.
    """
    for path in files:
        if names := [name for name, whole in verify(path).items() if not whole]:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise Unavailable(
                f"{path.name} is damaged: {', '.join(map(shown, names[:NAMED]))}{more} "
                f"{'is' if len(names) == 1 else 'are'} not what was saved (the digests differ); "
                + DAMAGED
            )


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor by name."""
    return {name: digest_of(tensor) for name, tensor in tensors.items()}


def seal_of(digests: Mapping[str, str], words: Mapping[str, str]) -> str:
    """One digest of tensors, their names, and the words of a header but the seal itself."""
    known = {
        "tensors": dict(digests),
        "words": {key: word for key, word in words.items() if key != SEAL},
    }
    return xxhash.xxh3_128(json.dumps(known, sort_keys=True).encode()).hexdigest()
