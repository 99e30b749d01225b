"""Matrices of compressed-tensors and of GPTQ, read from the descriptions of these formats alone."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def bits_of(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes of each row, from the number of each bit."""
    raw = words.astype("<i4").copy().view(np.uint8)
    flat = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits]
    return (flat.reshape(-1, count, bits).astype(np.int64) << np.arange(bits)).sum(-1)


def read_compressed(own: Mapping[str, Tensor], words: Mapping) -> np.ndarray:
    """W of one matrix: scale (q - z), with signed q and z, in float64."""
    bits, (m, n) = words["num_bits"], own["weight_shape"].tolist()
    q = bits_of(own["weight_packed"].numpy(), bits, n) - 2 ** (bits - 1)
    scale = own["weight_scale"].double().numpy()
    assert words["strategy"] == ("channel" if words["group_size"] is None else "group")
    group = np.arange(n) // (words["group_size"] or n)
    z = np.zeros_like(scale)
    if not words["symmetric"]:
        packed = own["weight_zero_point"].numpy()
        z = bits_of(packed.T.copy(), bits, m).T - 2 ** (bits - 1)
    return scale[:, group] * (q - z[:, group])


def read_gptq(own: Mapping[str, Tensor], words: Mapping) -> np.ndarray:
    """W of one matrix: scale (q - z), with z stored less 1, in float64."""
    bits, n = words["bits"], len(own["g_idx"])
    q = bits_of(own["qweight"].numpy().T.copy(), bits, n)
    scale = own["scales"].double().numpy().T
    z = (bits_of(own["qzeros"].numpy(), bits, len(scale)).T + 1) % 2**bits
    group = own["g_idx"].numpy()
    return scale[:, group] * (q - z[:, group])
