"""Which packed matrices a layer of vLLM is made of: without vLLM."""

import tomllib
from types import SimpleNamespace

import pytest
import torch

from quip.errors import UnsupportedModel
from quip.packed.cut import Cut
from quip.packed.layout import Layout
from quip.packed.spec import Spec
from quip.serve.vllm.products import Product, in_order, products, rows
from quip.serve.vllm.shares import Share, cut_of, shares
from tests.support.checkpoints import ROOT, fresh

GRID = Spec({"kind": "grid", "bits": 2, "group": 1, "symmetric": True}, ())
FINE = Spec({"kind": "grid", "bits": 4, "group": 1, "symmetric": True}, ())
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def alone(*names: str) -> Layout:
    return Layout(dict.fromkeys(names, GRID))


def stacked(*names: str) -> Layout:
    return Layout({}, {names: GRID})


def test_single_matrices_go_where_vllm_has_them_each_as_what_it_is():
    layout = Layout({"a.k_proj": FINE, "a.q_proj": GRID, "a.v_proj": GRID, "a.o_proj": FINE})
    found = [Product(GRID, (0,)), Product(FINE, (1,)), Product(GRID, (2,))]
    assert products(layout, "a.qkv_proj", MERGED) == found
    assert products(layout, "a.o_proj", MERGED) == [Product(FINE, (0,))]
    assert products(layout, "b.qkv_proj", MERGED) == []


def test_a_stack_is_one_product_and_its_rows_are_put_in_the_order_of_vllm():
    found = products(stacked("m.up_proj", "m.gate_proj"), "m.gate_up_proj", MERGED)
    assert found == [Product(GRID, (1, 0))]
    up, gate = torch.zeros(5), torch.ones(3)
    parts = in_order(found, rows("m.gate_up_proj", [3, 5], found))
    assert torch.equal(torch.cat([torch.cat([up, gate])[x] for x in parts]), torch.cat([gate, up]))
    found = products(stacked("q_proj", "k_proj", "v_proj"), "qkv_proj", MERGED)
    assert in_order(found, [4, 2, 2]) is None


def test_a_stack_of_some_and_the_other_alone_are_put_in_order_too():
    layout = Layout({"k_proj": FINE}, {("v_proj", "q_proj"): GRID})
    found = products(layout, "qkv_proj", MERGED)
    assert found == [Product(FINE, (1,)), Product(GRID, (2, 0))]
    assert in_order(found, [4, 3, 2]) == [slice(5, 9), slice(0, 3), slice(3, 5)]


def test_one_matrix_for_a_merged_layer_is_taken_where_its_rows_are_known_to_lie_alike():
    found = products(alone("a.qkv_proj"), "a.qkv_proj", MERGED)
    assert rows("a.qkv_proj", [4, 2, 2], found) == [8]
    with pytest.raises(UnsupportedModel, match=r"a\.query_key_value: one matrix .* and 3 in vLLM"):
        rows("a.query_key_value", [4, 2, 2], found)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (alone("a.q_proj", "a.v_proj"), r"a\.k_proj is not quantized"),
        (stacked("a.q_proj", "a.k_proj", "a.v_proj", "a.g_proj"), r"a\.g_proj is stacked with it"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused_by_name_with_a_way_out(layout, message):
    with pytest.raises(UnsupportedModel, match=rf"^a\.qkv_proj: .*{message}.*quip serve"):
        products(layout, "a.qkv_proj", MERGED)


def test_each_of_two_processes_has_its_rows_of_every_part_and_shared_heads_whole():
    layer = SimpleNamespace(tp_rank=1, tp_size=2, num_kv_head_replicas=2)  # one head of k and v
    parts = shares(layer, [64, 32, 32], 256)
    assert parts == [
        Share(128, slice(64, 128)),
        Share(32, slice(0, 32)),
        Share(32, slice(0, 32)),
    ]
    rows_of_all = Cut(rows=(slice(64, 128), slice(128, 160), slice(160, 192)))
    assert cut_of(layer, parts, 128, 128) == rows_of_all
    assert cut_of(layer, parts[1:], 128, 128) is None
    assert cut_of(layer, shares(layer, [128], 128), 96, 192) == Cut(columns=slice(96, 192))


def test_import_quip_and_the_entry_point_leave_vllm_alone():
    words = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = words["vllm.general_plugins"]["quip"].partition(":")
    code = (
        "import json, sys, quip, {0}; print(json.dumps([callable({0}.{1}), 'vllm' in sys.modules]))"
    )
    assert fresh(code.format(module, function)) == [True, False]
