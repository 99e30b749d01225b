"""Folders in the layout of exllamav3 (EXL3), written slowly from its description, and their models.

Nothing here uses quip: bits are written one by one, states read from the circular text of a tile,
and matrices multiplied by dense Hadamard matrices, in float64.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
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
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **words: hf.LlamaConfig(**{**SIZES, **words}),
    "qwen2": lambda **words: hf.Qwen2Config(**{**SIZES, **words}),  # q, k and v have biases
}
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # none of them: 3INST
MIXED = {  # bits and code of each matrix
    "q_proj": (2, "3inst"),
    "k_proj": (3, "mcg"),
    "v_proj": (4, "mul1"),
    "o_proj": (5, "mcg"),
    "gate_proj": (1, "mcg"),
    "up_proj": (7, "3inst"),
    "down_proj": (8, "mul1"),
    "lm_head": (6, "mul1"),
}
BLOCK = 128  # numbers that a Hadamard matrix turns together


@cache
def values(code: str) -> np.ndarray:
    """The weight of each of the 65,536 states."""
    s = np.arange(1 << 16, dtype=np.uint64)
    if code == "mul1":
        x = s * np.uint64(MARKERS[code]) & np.uint64(0xFFFFFFFF)
        total = sum((x >> np.uint64(8 * i)) & np.uint64(255) for i in range(4))
        factor, shift = np.array([0x1EEE, 0xC931], dtype=np.uint16).view(np.float16)
        # A fused multiply-add rounds once, and float64 holds what comes before exactly.
        exact = (1024.0 + total.astype(np.float64)) * np.float64(factor) + np.float64(shift)
        return exact.astype(np.float16).astype(np.float64)
    x = s * np.uint64(MARKERS["mcg"]) if code == "mcg" else s * np.uint64(89226354)
    x = (x if code == "mcg" else x + np.uint64(64248484)) & np.uint64(0xFFFFFFFF)
    y = (x & np.uint64(0x8FFF8FFF)) ^ np.uint64(0x3B603B60)
    low, high = ((y >> np.uint64(shift)).astype(np.uint16).view(np.float16) for shift in (0, 16))
    return (low.astype(np.float64) + high.astype(np.float64)).astype(np.float16).astype(np.float64)


def place(step: int) -> tuple[int, int]:
    """The input and the output, inside a tile of 16 x 16, of the weight of a step.

    Thread t of 32 holds eight weights: of the inputs 2 (t mod 4) + 0, 1, 8, 9 and of the outputs
    t / 4 and t / 4 + 8, as the second factor of a product of tensor cores is laid out.
    """
    thread, i = divmod(step, 8)
    return 2 * (thread % 4) + i % 2 + 8 * (i % 4 // 2), thread // 4 + 8 * (i // 4)


def text_of(codes: list[int], bits: int) -> str:
    """The bits of a tile, one code after the other, the highest bit of each first."""
    return "".join(f"{code:0{bits}b}" for code in codes)


def words_of(text: str) -> list[int]:
    """int16 words: of each 32 bits, the later 16 come first."""
    words = [int(text[i : i + 16], 2) for i in range(0, len(text), 16)]
    words = [words[i ^ 1] for i in range(len(words))]
    return [x - (1 << 16) if x >> 15 else x for x in words]


def states_of(text: str, bits: int) -> list[int]:
    """The 16 bits that end where the code of each step ends, around the end of the text."""
    around = text[-16:] + text  # which starts 16 bits before the text
    return [int(around[bits * t : bits * t + 16], 2) for t in range(1, 257)]


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix over sqrt(n)."""
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H / n**0.5


def turned(W: np.ndarray, suh: np.ndarray, svh: np.ndarray) -> np.ndarray:
    """diag(suh) (I x H) W~ (I x H) diag(svh), inputs x outputs."""
    n, m = W.shape
    left = np.kron(np.eye(n // BLOCK), hadamard(BLOCK))
    right = np.kron(np.eye(m // BLOCK), hadamard(BLOCK))
    return suh[:, None] * (left @ W @ right) * svh


def random_matrix(
    m: int, n: int, bits: int, code: str, rng: np.random.Generator, *, signs: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random matrix, and W [outputs, inputs] in float64.

    With `signs`, vectors of signs as the first files had them, a bit each.
    """
    tiles, W = [], np.empty((n, m))
    for i in range(0, n, 16):
        for j in range(0, m, 16):
            text = text_of(rng.integers(1 << bits, size=256).tolist(), bits)
            tiles.append(words_of(text))
            for step, state in enumerate(states_of(text, bits)):
                of_input, of_output = place(step)
                W[i + of_input, j + of_output] = values(code)[state]
    tensors = {"trellis": torch.tensor(tiles, dtype=torch.int16).view(n // 16, m // 16, 16 * bits)}
    if signs:
        vectors = [rng.choice([-1.0, 1.0], size=size) for size in (n, m)]
        tensors |= {key: packed(x) for key, x in zip(("su", "sv"), vectors, strict=True)}
    else:
        vectors = [rng.normal(size=n) * 0.05, 1 + 0.2 * rng.normal(size=m)]
        vectors[1][m // 3] = 0  # as an output that no weight leads to
        vectors = [x.astype(np.float16).astype(np.float64) for x in vectors]
        tensors |= {k: torch.tensor(x).half() for k, x in zip(("suh", "svh"), vectors, strict=True)}
    if code in MARKERS:
        marker = np.array(MARKERS[code], dtype=np.uint32).view(np.int32)
        tensors[code] = torch.tensor(int(marker), dtype=torch.int32)
    return tensors, torch.tensor(turned(W, *vectors).T)


def packed(signs: np.ndarray) -> Tensor:
    """int16 words of 16 signs: bit i of a word is set where sign i of it is -1."""
    words = [sum(int(s < 0) << i for i, s in enumerate(run)) for run in signs.reshape(-1, 16)]
    return torch.tensor([x - (1 << 16) if x >> 15 else x for x in words], dtype=torch.int16)


def write_exl3(
    folder: Path,
    name: str = "llama",
    kinds: Mapping[str, tuple[int, str]] = MIXED,
    *,
    signs: bool = False,
    quantization: Mapping[str, Any] | None = None,
    **words: Any,
) -> PreTrainedModel:
    """A random folder in the layout; returns the dense model of the same weights, float32.

    Matrices of names that `kinds` does not have stay as they are.
    """
    rng = np.random.default_rng(0)
    config = CONFIGS[name](**{"tie_word_embeddings": False, **words})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    files: dict[str, Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.tensor(rng.normal(size=parameter.shape))
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
        for key, module in model.named_modules():
            last = key.rpartition(".")[2]
            if last in kinds and isinstance(module, torch.nn.Linear):
                m, n = module.weight.shape
                tensors, W = random_matrix(m, n, *kinds[last], rng, signs=signs)
                # A head of its own, or the embedding would be quantized too.
                module.weight = torch.nn.Parameter(W.float(), requires_grad=False)
                files |= {f"{key}.{k}": x for k, x in tensors.items()}
        for key, x in model.state_dict().items():
            if f"{key.removesuffix('.weight')}.trellis" not in files:
                files[key] = x.half()
    folder.mkdir(parents=True)
    about = {
        "quant_method": "exl3",
        "version": "0.0.12",
        "bits": 4.0,
        "head_bits": 6,
        "calibration": {"rows": 100, "cols": 2048},
        "out_scales": "auto",
        "codebook": "mcg",
    }
    known = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    known |= {"dtype": "float16", "quantization_config": {**about, **(quantization or {})}}
    (folder / "config.json").write_text(json.dumps(known))
    # What is listed there the headers of the files say as well.
    (folder / "quantization_config.json").write_text(json.dumps({**about, "tensor_storage": {}}))
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return model


def reword(folder: Path, **words: Any) -> None:
    """Edit config.json; None removes a word."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **words}
    path.write_text(json.dumps({k: x for k, x in config.items() if x is not None}))
