"""Folders in the formats of GPTQ and of compressed-tensors, written slowly from their descriptions.

Nothing here uses quip: codes become bits and bits words; W is multiplied out in float64.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tokenizer import save_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **words: hf.LlamaConfig(**{**SIZES, **words}),
    "qwen2": lambda **words: hf.Qwen2Config(**{**SIZES, **words}),  # q, k and v have biases
}
Parts = dict[str, np.ndarray]  # codes, zero, scale and place of a matrix


def stream(codes: np.ndarray, bits: int) -> Tensor:
    """Each row as one stream of bits, the lowest first, in little-endian words."""
    rows, count = codes.shape
    flat = ((codes[..., None] >> np.arange(bits)) & 1).reshape(rows, count * bits)
    flat = np.pad(flat, ((0, 0), (0, -count * bits % 32)))
    return torch.from_numpy(np.packbits(flat.astype(np.uint8), 1, "little").view("<i4").copy())


def whole(codes: np.ndarray, bits: int) -> Tensor:
    """Words of whole codes, floor(32 / bits) of them in each."""
    rows, count = codes.shape
    held = 32 // bits
    words = np.zeros((rows, -(-count // held)), dtype=np.uint32)
    for j in range(count):
        words[:, j // held] |= (codes[:, j] << bits * (j % held)).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def random_parts(
    m: int, n: int, bits: int, group: int | None, rng: np.random.Generator, **kinds: Any
) -> Parts:
    """A random matrix. `kinds`: sym (zeros in the middle), scattered groups, dtype of scales."""
    groups = -(-n // group) if group else 1
    scale = (0.02 * rng.uniform(0.5, 1.5, (m, groups))).astype(np.float32)
    scale = torch.from_numpy(scale).to(kinds.get("dtype", torch.float16)).double().numpy()
    zero = rng.integers(2**bits, size=(m, groups))
    place = np.arange(n) // (group or n)
    return {
        "codes": rng.integers(2**bits, size=(m, n)),
        "zero": np.full_like(zero, 2 ** (bits - 1)) if kinds.get("sym") else zero,
        "scale": scale,
        "place": rng.permutation(place) if kinds.get("scattered") else place,
    }


def weights(parts: Parts) -> np.ndarray:
    """scale (code - zero) in float64."""
    place = parts["place"]
    return parts["scale"][:, place] * (parts["codes"] - parts["zero"][:, place])


def gptq_tensors(parts: Parts, bits: int, version: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a matrix, of zeros less 1 in version 1."""
    zero = (parts["zero"] - (version == 1)) % 2**bits
    return {
        "qweight": stream(parts["codes"], bits).T.contiguous(),
        "qzeros": stream(zero.T, bits),
        "scales": torch.from_numpy(parts["scale"].T).to(dtype).contiguous(),
        "g_idx": torch.from_numpy(parts["place"]).int(),
    }


def ct_tensors(parts: Parts, bits: int, dense: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a matrix of compressed-tensors; `place` where its groups lie scattered."""
    pack, (m, n) = stream if dense else whole, parts["codes"].shape
    found = {
        "weight_packed": pack(parts["codes"], bits),
        "weight_scale": torch.from_numpy(parts["scale"]).to(dtype),
        "weight_shape": torch.tensor([m, n]),
    }
    if (parts["zero"] != 2 ** (bits - 1)).any():
        found["weight_zero_point"] = pack(parts["zero"].T, bits).T.contiguous()
    if (np.diff(parts["place"]) < 0).any():
        found["weight_g_idx"] = torch.from_numpy(parts["place"]).int()
    return found


def write_folder(
    folder: Path,
    name: str,
    tensors_of: Callable[[str, int, int], tuple[dict[str, Tensor], np.ndarray] | None],
    quantization: Mapping[str, Any] | None,
    **words: Any,
) -> PreTrainedModel:
    """A random model of packed matrices; returns the dense one of the same weights, in float64.

    `tensors_of` makes the tensors of a matrix by its name, outputs and inputs, and its weights.
    """
    rng = np.random.default_rng(1)
    config = CONFIGS[name](**{"tie_word_embeddings": False, **words})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    files: dict[str, Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.tensor(rng.normal(size=parameter.shape))
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
        for key, module in model.named_modules():
            made = None
            if isinstance(module, torch.nn.Linear):
                made = tensors_of(key, *module.weight.shape)
            if made is not None:
                module.weight.copy_(torch.from_numpy(made[1]))
                files |= {f"{key}.{k}": x for k, x in made[0].items()}
                files[f"{key}.weight"] = None  # type: ignore[assignment]
        files = {k: x.half() for k, x in model.state_dict().items() if k not in files} | files
    folder.mkdir(parents=True)
    known = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16"}
    known |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(known))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    files = {k: x for k, x in files.items() if x is not None and k not in tied}
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return model


def write_gptq(
    folder: Path,
    name: str = "llama",
    bits: int = 4,
    group: int | None = 32,
    *,
    version: int = 1,
    dynamic: Mapping[str, tuple[int, int]] | None = None,
    quantization: Mapping[str, Any] | None = None,
    head: bool = False,
    dtype: torch.dtype = torch.float16,
    **kinds: Any,
) -> PreTrainedModel:
    """A folder as AutoGPTQ writes it; `dynamic` are bits and groups by the last part of a name."""
    rng, special = np.random.default_rng(0), dynamic or {}
    sym = bool(kinds.get("sym"))
    words = {key: kinds.pop(key) for key in list(kinds) if key not in ("sym", "scattered")}

    def tensors_of(key: str, m: int, n: int) -> tuple[dict[str, Tensor], np.ndarray] | None:
        last = key.rpartition(".")[2]
        if last == "lm_head" and not head:
            return None
        own, size = special.get(last, (bits, group))
        parts = random_parts(m, n, own, None if size == -1 else size, rng, dtype=dtype, **kinds)
        return gptq_tensors(parts, own, version, dtype), weights(parts)

    about = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "desc_act": bool(kinds.get("scattered")),
        "sym": sym,
        "lm_head": head,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
        "true_sequential": True,
        "damp_percent": 0.01,
        **(quantization or {}),
    }
    if special:
        about["dynamic"] = {
            rf"+:.*\.{last}.*": {"bits": own, "group_size": size}
            for last, (own, size) in special.items()
        }
    return write_folder(folder, name, tensors_of, about, **words)


def write_ct(
    folder: Path,
    name: str = "llama",
    bits: int = 4,
    group: int | None = 32,
    *,
    dense: bool = True,
    schemes: Mapping[str, tuple[int, int | None, bool]] | None = None,
    quantization: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **kinds: Any,
) -> PreTrainedModel:
    """A folder as llm-compressor writes it; `schemes` are bits, groups and symmetry by names."""
    rng = np.random.default_rng(0)
    sym, scattered = bool(kinds.pop("sym", False)), bool(kinds.pop("scattered", False))
    found = {"Linear": (bits, group, sym), **(schemes or {})}

    def tensors_of(key: str, m: int, n: int) -> tuple[dict[str, Tensor], np.ndarray] | None:
        if key == "lm_head":
            return None
        own, size, middle = found.get(key.rpartition(".")[2], found["Linear"])
        parts = random_parts(
            m, n, own, size, rng, sym=middle, scattered=scattered and bool(size), dtype=dtype
        )
        return ct_tensors(parts, own, dense, dtype), weights(parts)

    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear" if target == "Linear" else rf"re:.*\.{target}$"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": own,
                    "type": "int",
                    "symmetric": middle,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                    "actorder": "group" if scattered else None,
                    "dynamic": False,
                },
            }
            for i, (target, (own, size, middle)) in enumerate(found.items())
        },
        **(quantization or {}),
    }
    return write_folder(folder, name, tensors_of, about, **kinds)


def reword(folder: Path, **words: Any) -> None:
    """Edit the quantization_config of config.json; None removes a word."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    about = {**config["quantization_config"], **words}
    config["quantization_config"] = {k: x for k, x in about.items() if x is not None}
    path.write_text(json.dumps(config))
