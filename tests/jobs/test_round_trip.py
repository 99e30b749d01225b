"""What is written for another engine and read from it again is the same checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from quip.jobs.export import export_compressed_tensors, export_gptq
from quip.packed.compressed_tensors.read import import_compressed_tensors
from quip.packed.gptq.read import import_gptq
from tests.support.grids import save_grids

pytestmark = pytest.mark.usefixtures("command")


@pytest.mark.parametrize(
    ("there", "back", "bits", "group"),
    [
        (export_gptq, import_gptq, 4, 32),
        (export_gptq, import_gptq, 8, None),
        (export_compressed_tensors, import_compressed_tensors, 3, 32),
        (export_compressed_tensors, import_compressed_tensors, 4, None),
    ],
)
def test_every_tensor_is_what_it_was(tmp_path, there, back, bits, group):
    folder = save_grids(tmp_path / "ours", "llama", bits, group, signed=True)
    there(folder, tmp_path / "theirs")
    back(tmp_path / "theirs", tmp_path / "again")
    found, wanted = (load_file(tmp_path / x / "model.safetensors") for x in ("again", "ours"))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name
        assert found[name].dtype == x.dtype or not name.endswith(("codes", "step")), name
