"""Folders in the published layout of QuIP#, written slowly from its description, and tiny models.

Nothing here uses quip.published: words are filled bit by bit, and codes decoded one by one.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from quip.codebooks import e8p, e81b
from quip.kernels.hadamard import matrices as hadamard
from quip.matrix.build import build_recipe
from quip.model.quantize import quantize_model
from tests.support.checkpoints import save
from tests.support.tiny import VOCAB, tokens
from tests.support.tokenizer import save_tokenizer

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda **words: hf.LlamaConfig(**{**SIZES, "intermediate_size": 128, **words}),
    # Omega_192 and Omega_384 have an outer factor, and it is not symmetric.
    "mistral": lambda **words: hf.MistralConfig(**{**SIZES, "intermediate_size": 192, **words}),
}
BOOKS = {  # bits: codebook, its id, version, packsz and published ratio
    2: ("E8P12", 7, 1, 4, None),
    3: ("E8P12RVQ3B", 18, 0, 8 / 3, 2.04),
    4: ("E8P12RVQ4B", 17, 1, 2, 3.45),
}
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.upgate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def place(row: int, group: int, words: int) -> tuple[int, int]:
    """The word, counted through the whole matrix, and i, of the E8P code of a group of columns."""
    T, below = divmod(row, 16)
    gamma, low = divmod(below, 2)
    J, right = divmod(8 * group, 64)
    t, high = divmod(right, 16)
    return ((T * (words // 2) + J) * 8 + gamma) * 4 + t, low + 2 * (high // 8)


def slow_e8p(codes: list[list[int]], n: int) -> Tensor:
    """The words of 16-bit codes."""
    width = n // 32
    flat = [0] * (len(codes) * width)
    for row, line in enumerate(codes):
        for group, code in enumerate(line):
            word, i = place(row, group, width)
            flat[word] |= (code >> 8) << (8 * i)
            for j in range(8):
                flat[word] |= (code >> j & 1) << (32 + 4 * j + i)
    return torch.tensor([x - 2**64 if x >> 63 else x for x in flat]).reshape(len(codes), width)


def slow_e81b(codes: list[list[int]], n: int) -> Tensor:
    rows = [
        [sum(line[8 * j + i] << 8 * i for i in range(8)) for j in range(n // 64)] for line in codes
    ]
    return torch.tensor([[x - 2**64 if x >> 63 else x for x in row] for row in rows])


def slow_words(codes: Tensor, n: int, bits: int) -> Tensor:
    words = slow_e8p((codes & 0xFFFF).tolist(), n)
    if bits == 2:
        return words
    second = (codes >> 16).tolist()
    return torch.cat([words, (slow_e81b if bits == 3 else slow_e8p)(second, n)], dim=1)


def point(code: int) -> list[float]:
    """The decoded point of E8P, by the five steps of its description."""
    a, s = code >> 8, code & 255
    odd = s.bit_count() % 2
    s ^= odd
    v = [x / 2 for x in e8p.magnitudes()[a].tolist()]
    if sum(v) % 2:
        v[7] = -v[7]
    for b, i in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        if s >> b & 1:
            v[i] = -v[i]
    return [x - 0.25 if odd else x + 0.25 for x in v]


def decoded(codes: Tensor, bits: int, ratio: float | None) -> Tensor:
    """W~ over Wscale, float64."""
    rows = []
    for line in codes.tolist():
        row: list[float] = []
        for code in line:
            first = point(code & 0xFFFF)
            if bits > 2:
                second = code >> 16
                left = point(second) if bits == 4 else (e81b.doubled()[second] / 2).tolist()
                first = [x + y / ratio for x, y in zip(first, left, strict=True)]
            row += first
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def omega(n: int) -> Tensor:
    """(K x S) / sqrt(n), dense."""
    K = next((k for k in (156, 60, 52, 36, 28, 20, 12) if n % k == 0), 1)
    dense = torch.kron(hadamard.matrix(K), hadamard.matrix(n // K))
    return dense.double() / n**0.5


def random_matrix(
    m: int,
    n: int,
    bits: int,
    members: int,
    ratio: float | None,
    rng: torch.Generator,
    rescale: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The published tensors of a random matrix, and W_hat, float64."""
    codes = torch.randint(2 ** (8 * bits), (m, n // 8), generator=rng)
    tensors = {
        "Qidxs": slow_words(codes, n, bits),
        "SU": (1 + 0.2 * torch.randn(n, generator=rng)).half(),
        "SV": (0.3 * torch.randn(m, generator=rng)).half(),
        "Wscale": (0.3 + torch.rand((), generator=rng)).half(),
        "codebook_id": torch.tensor(BOOKS[bits][1]),
    }
    W = tensors["Wscale"].double() * decoded(codes, bits, ratio)
    W = tensors["SV"].double()[:, None] * (omega(m) @ W @ omega(n).T) * tensors["SU"].double()
    if rescale:
        r = (0.5 + torch.rand(n, generator=rng)).bfloat16()
        tensors["scaleWH"] = r.float()
        W = W / r.double()
    return tensors, W


def write_published(
    folder: Path,
    name: str = "llama",
    bits: int = 2,
    *,
    rescale: bool = False,
    resid: float = -1,
    **words: Any,
) -> PreTrainedModel:
    """A random folder in the layout; returns the dense model of the same weights, float32."""
    rng = torch.Generator().manual_seed(bits)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](**words), dtype=torch.float32).eval()
    book, _, version, packsz, ratio = BOOKS[bits]
    ratio = resid if resid > 0 else ratio
    files: dict[str, Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
        for block in range(model.config.num_hidden_layers):
            for fused, members in FUSED.items():
                layers = [model.get_submodule(f"model.layers.{block}.{x}") for x in members]
                sizes, n = [x.out_features for x in layers], layers[0].in_features
                tensors, W = random_matrix(sum(sizes), n, bits, len(sizes), ratio, rng, rescale)
                if len(members) > 1:
                    tensors["fuse_scales"] = (0.5 + torch.rand(len(sizes), generator=rng)).half()
                scales = tensors.get("fuse_scales", torch.ones(1)).double()
                for layer, scale, part in zip(layers, scales, W.split(sizes), strict=True):
                    layer.weight.copy_(scale * part)
                if layers[0].bias is not None:
                    tensors["bias"] = torch.cat([x.bias for x in layers]).half()
                files |= {f"model.layers.{block}.{fused}.{k}": x for k, x in tensors.items()}
    inner = tuple(member for members in FUSED.values() for member in members)
    for key, x in model.state_dict().items():
        if not any(f".{member}." in key for member in inner):
            files[key] = x.half()
    if model.config.tie_word_embeddings:
        del files["lm_head.weight"]
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "torch_dtype": "float16",
        "dtype": "float16",
        "quip_params": {
            "codebook": book,
            "codebook_version": version,
            "codesz": 8,
            "fused": True,
            "idx_dtype": "torch.int64",
            "lora_rank": 0,
            "model_version": 1,
            "outlier_channel_split": False,
            "packsz": packsz,
            "rescale_WH": rescale,
            "resid_scale_override": resid,
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return model


def save_packed(
    folder: Path, name: str = "llama", flags: dict[str, object] | None = None, **words: Any
) -> PreTrainedModel:
    """A checkpoint of a tiny model, whose other tensors float16 holds; returns the model."""
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](**words), dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
    recipe = build_recipe(**{"codebook": "E8P12", "range_": "tensor", **(flags or {})})
    quantize_model(model, tokens(2), recipe, device="cpu", seed=0)
    save(model.requires_grad_(False), folder)
    return model


def change(folder: Path, edit: Any) -> None:
    """Edit the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    found = {name: x.clone() for name, x in load_file(path).items()}
    edit(found)
    save_file(found, path, metadata={"format": "pt"})


def reword(folder: Path, *, params: dict[str, Any] | None = None, **words: Any) -> None:
    """Edit config.json and its quip_params; None removes a word."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **words}
    if params:
        config["quip_params"] = {**config["quip_params"], **params}
    path.write_text(json.dumps({k: x for k, x in config.items() if x is not None}))
