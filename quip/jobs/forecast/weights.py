"""The files that hold a model's weights, by their headers: how large they are, and how exact."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from quip.model.located import locate
from quip.packed.files import INDEX, SINGLE, header, weight_files

NARROW = {"F16": 2, "BF16": 2}  # bytes of a number that a checkpoint keeps in 16 bits


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are, and what they take there."""

    path: Path | None  # of one of the files; None: they are not on this machine
    nbytes: int
    kept: int  # bytes of a number that is kept as it is, once it is saved
    streams: bool  # whether they can be read block by block


def weights_of(name: str, numbers: int) -> Weights:
    """The files of a model of so many numbers, named as `load_model` takes it.

    What is not on this machine is taken to be of 16 bits. Raises as `weight_files` and `header` do.
    """
    source = locate(name)
    where = source.where
    if source.gguf is not None:
        path = Path(where) / source.gguf
        return Weights(path, path.stat().st_size, 4, streams=False)
    folder = Path(where) if Path(where).is_dir() else _cached(where)
    if folder is None:
        return Weights(None, 2 * numbers, 2, streams=True)
    if not any((folder / file).exists() for file in (SINGLE, INDEX)):
        # A config alone, or files of pickles, of which nothing is known without reading them.
        return Weights(None, 2 * numbers, 2, streams=not [*folder.glob("*.bin")])
    entries = [entry for path in weight_files(folder) for entry in header(path).values()]
    largest = max(entries, key=lambda entry: entry.nbytes)
    return Weights(
        largest.path,
        sum(entry.nbytes for entry in entries),
        NARROW.get(largest.dtype, 4),
        streams=True,
    )


def _cached(hub_id: str) -> Path | None:
    """The folder of a model of the hub that was fetched before."""
    for file in (SINGLE, INDEX):
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str):
            return Path(found).parent
    return None
