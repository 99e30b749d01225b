"""What a checkpoint holds and takes, from its config.json, the headers of its files and run.json.

No weight is read, unless to verify it. The shapes come from the model that config.json describes,
made without content.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quip.errors import QuipError, Unavailable
from quip.evaluate.memory import module_bytes
from quip.jobs.report.folder import REMEDY, read_report
from quip.model.records import MatrixRecord, record_of
from quip.packed.checkpoint import check_folder, skeleton
from quip.packed.digests import unverified, verify
from quip.packed.files import header, naming_damage, weight_files
from quip.packed.hub import QuipConfig, QuipQuantizer
from quip.packed.layout import Layout
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.shapes import check_shape

WORST = 10  # matrices that are named
DAMAGED_NAMES = 100  # tensors


def inspect_checkpoint(folder: str | Path, *, verify_tensors: bool = False) -> dict[str, Any]:
    """What the checkpoint holds, fit for JSON; sizes in bytes.

    With b the bytes of the tensors stored for a quantized matrix, bias excluded,
    bits_per_weight = 8 sum(b) / sum(m n); bits_per_weight_of_all counts every tensor of the files
    against every parameter of the dense model, tied ones once.

    With `verify_tensors`, each tensor that was saved with a digest is read and compared with it.

    A run.json that is damaged costs what only it knows, and a note says so: the checkpoint itself
    is whole without it. Raises Unavailable for whatever else is missing or damaged, and
    UnsupportedModel for a folder that quip did not write.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        files = weight_files(folder)
        model = _skeleton(folder, files)
        verification = _verification(files) if verify_tensors else None
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    layers, layout = quantized_layers(model), Layout.of(model)
    sizes = {name: held.nbytes for path in files for name, held in header(path).items()}
    file_bytes = sum(path.stat().st_size for path in files)
    kinds = _bytes_by_kind(sizes, layers, layout)
    stored = sum(n for kind, n in kinds.items() if kind not in ("bias", "other"))
    quantized = sum(layer.out_features * layer.in_features for layer in layers.values())
    weights = quantized + sum(parameter.numel() for parameter in model.parameters())
    body: nn.Module = model
    return {
        "folder": str(folder),
        "architecture": _architecture(model.config),
        **_of_run(folder),
        "format": layout.format,
        **_specifications(layout, layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized_matrices": len(layout.names),
        "quantized_weights": quantized,
        "weights": weights,
        "bits_per_weight": 8 * stored / quantized,
        **_tables(layers, layout),
        "bits_per_weight_of_all": 8 * sum(kinds.values()) / weights,
        "files": len(files),
        "file_bytes": file_bytes,
        "header_bytes": file_bytes - sum(sizes.values()),
        "bytes_by_kind": kinds,
        "memory_bytes": module_bytes(body),
        "dense_bytes": 2 * weights,
        "plot": "layers.png" if (folder / "layers.png").is_file() else None,
        "verification": verification,
    }


def matrix_records(folder: str | Path) -> list[MatrixRecord]:
    """The quantized matrices as run.json knows them. Raises Unavailable if it does not."""
    _, records = _read_run(Path(folder))
    if not records:
        raise Unavailable(
            f"{folder}: no run.json there knows the matrices, so there is no proxy loss to plot; "
            "name a folder written by `quip run ... --save`"
        )
    return records


def _skeleton(folder: Path, files: Sequence[Path]) -> PreTrainedModel:
    """The model with room for its packed matrices, on the meta device, which the files do fit."""
    model = skeleton(folder)
    quantizer = QuipQuantizer(QuipConfig(**model.config.quantization_config))
    with unverified():
        quantizer.preprocess_model(model, checkpoint_files=[str(path) for path in files])
    return model


def _verification(files: Sequence[Path]) -> dict[str, Any]:
    """How many tensors were saved with digests and have others now; and which, the first of them.

    `unsigned` are the files without digests.
    """
    found = {path.name: verify(path) for path in files}
    damaged = [name for file in found.values() for name, whole in file.items() if not whole]
    return {
        "tensors": sum(map(len, found.values())),
        "damaged": len(damaged),
        "damaged_tensors": damaged[:DAMAGED_NAMES],
        "unsigned": [name for name, file in found.items() if not file],
    }


def _specifications(layout: Layout, layers: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    """What the matrices are; where they are of several specifications, how many are of each."""
    if len(layout.specs) == 1:
        return layout.specs[0].to_json()
    rows = []
    for spec in layout.specs:
        own = [layer for layer in layers.values() if layer.spec == spec]
        weights = sum(layer.out_features * layer.in_features for layer in own)
        stored = sum(tensor.nbytes for layer in own for tensor in layer.stored().values())
        rows.append(
            {
                **spec.to_json(),
                "quantized_matrices": len(layout.only(spec).names),
                "quantized_weights": weights,
                "bits_per_weight": 8 * stored / weights,
            }
        )
    return {"specs": rows}


def _tables(layers: Mapping[str, QuantizedLinear], layout: Layout) -> dict[str, Any]:
    """Embedding and head apart from the matrices of blocks, where they are packed."""
    own = set(layout.embeddings)
    apart = [layer for name, layer in layers.items() if name in own or "." not in name]
    within = [layer for layer in layers.values() if layer not in apart]
    if not (own and within):
        return {}
    return {"bits_per_weight_of_tables": _bits(apart), "bits_per_weight_of_blocks": _bits(within)}


def _bits(layers: Sequence[QuantizedLinear]) -> float:
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.stored().values())
    return 8 * stored / sum(layer.out_features * layer.in_features for layer in layers)


def _bytes_by_kind(
    sizes: Mapping[str, int], layers: Mapping[str, QuantizedLinear], layout: Layout
) -> dict[str, int]:
    """Bytes of codes, step and all else of quantized matrices, of their biases, and of the rest."""
    kinds = {
        f"{name}.{kind}": kind for name, layer in layers.items() for kind in layer.stored()
    } | {f"{name}.bias": "bias" for name in layout.names}
    totals = dict.fromkeys([*kinds.values(), "other"], 0)
    for name, size in sizes.items():
        totals[kinds.get(name, "other")] += size
    return totals


def _architecture(config: PretrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "class": next(iter(config.architectures or []), None),
        "model_type": config.model_type,
        "blocks": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
    }


def _of_run(folder: Path) -> dict[str, Any]:
    """What only the report of the run knows."""
    notes = []
    try:
        known, records = _read_run(folder)
    except Unavailable as error:
        known, records = _known({}), []
        notes.append(f"{error}; what only it knows is left out")
    worst = sorted(records, key=lambda r: (math.isnan(r.proxy_loss), r.proxy_loss), reverse=True)
    matrices = [
        {
            "name": record.name,
            "rows": record.rows,
            "columns": record.columns,
            "bits_per_weight": record.bits_per_weight,
            "proxy_loss": _plain(record.proxy_loss),
        }
        for record in worst[:WORST]
    ]
    return {**known, "worst_matrices": matrices, "notes": notes}


def _read_run(folder: Path) -> tuple[dict[str, Any], list[MatrixRecord]]:
    """What run.json says of the whole model, and its matrices; nothing where there is no file."""
    run = read_report(folder)
    with naming_damage(f"{folder / 'run.json'} is damaged", REMEDY):
        check_shape(found := run.get("matrices") or [], list[Any], "matrices")
        rows = [{k: _value(x) for k, x in row.items()} for row in found]
        check_shape(rows, list[MatrixRecord], "matrices")
    return _known(run), [record_of(MatrixRecord, row) for row in rows]


def _known(run: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("evaluation", "original_perplexity", "perplexity")
    stamps, original, found = (run.get(key) or {} for key in keys)
    perplexities = [
        {
            **stamps.get(name, {}),
            "dataset": name,
            "original": _plain(original.get(name)),
            "quantized": _plain(found.get(name)),
        }
        for name in {**original, **found}
    ]
    return {
        "base_model": run.get("model"),
        "method": run.get("method"),
        "recipe": run.get("recipe"),
        "finetune": _tuned(run.get("finetune")),
        "perplexities": perplexities,
    }


def _tuned(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `quip finetune` did, after the proxy losses had been measured."""
    keys = ("teacher", "kl_before", "kl_after", "epochs")
    return {key: entry.get(key) for key in keys} if entry else None


def _value(value: Any) -> Any:
    """A number that run.json holds as a word is a number again."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _plain(value: Any) -> float | str | None:
    """A number as JSON can hold it: NaN and infinity are words."""
    if value is None:
        return None
    return float(value) if math.isfinite(float(value)) else str(float(value))
