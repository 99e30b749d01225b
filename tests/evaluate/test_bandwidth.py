"""What bounds decoding: what a token needs of the memory, and what the memory can do."""

import torch
from transformers import DynamicCache

from quip.evaluate import bandwidth
from quip.evaluate.bandwidth import bytes_read, cache_bytes, copy_rate
from quip.evaluate.memory import module_bytes
from tests.support.checkpoints import quantized
from tests.support.tiny import VOCAB, tiny, tokens


def test_tables_of_which_a_row_is_looked_up_are_not_read_unless_they_are_the_head_too():
    llama = tiny("llama")
    table = llama.get_input_embeddings().weight
    assert bytes_read(llama) == module_bytes(llama) - 4 * VOCAB * 32
    llama.lm_head.weight = table
    assert bytes_read(llama) == module_bytes(llama)


def test_packed_matrices_count_as_they_are_packed():
    packed, dense = quantized("llama", blocks=1), tiny("llama")
    dense.model.layers = dense.model.layers[:1]
    saved = module_bytes(dense) - module_bytes(packed)
    assert saved > 0
    assert bytes_read(dense) - bytes_read(packed) == saved


@torch.no_grad()
def test_a_cache_counts_with_its_keys_and_values():
    cache = tiny("llama")(tokens(3), use_cache=True).past_key_values
    assert cache_bytes(cache) == 4 * 2 * 4 * (3 * 12 * 16)  # layers, two, bytes; 2 heads of 8
    assert cache_bytes(DynamicCache()) == cache_bytes(None) == 0


def test_a_copy_reads_and_writes(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(bandwidth, "now", lambda device: next(clock))
    monkeypatch.setitem(bandwidth.SIZES, "cpu", 1000)
    copy_rate.cache_clear()
    assert copy_rate(torch.device("cpu")) == 2 * 1000 / 2.0
    assert copy_rate(torch.device("cpu")) == 1000  # known by now
    copy_rate.cache_clear()
