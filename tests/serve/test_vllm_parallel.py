"""Two processes of vLLM share out the matrices of a checkpoint, where these can be cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import ROOT
from tests.support.engines import save_wide

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

# Prints how far each layer is from quip's, or what was refused.
WORK = """
import json, sys
from pathlib import Path
import torch
import quip
from quip.errors import QuipError
from tests.support.vllm_models import expected, join, packed_layers, read

meeting, folder, rank, count = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
join(meeting, rank, count)
try:
    model, ours, far = read(folder), quip.load(folder), {}
except QuipError as error:
    print(json.dumps(str(error)))
    raise SystemExit
for name, layer in packed_layers(model).items():
    x = torch.randn(3, layer.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = expected(ours, name, model.packed_modules_mapping, x)
        if name.endswith(("o_proj", "down_proj")):  # which share out their inputs
            y, mine = layer(x.chunk(count, -1)[rank].contiguous())[0], whole
        else:
            y, mine = layer(x)[0], [part.chunk(count, -1)[rank] for part in whole]
    far[name] = float((y - torch.cat(mine, -1)).abs().max() / torch.cat(whole, -1).abs().max())
print(json.dumps(far))
"""


def shared_out(folder: Path, tmp_path: Path, count: int = 2) -> list:
    """What each of so many processes prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_DIST_IDENT": str(os.getpid())}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORK,
                str(tmp_path / "meeting"),
                str(folder),
                str(i),
                str(count),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        return [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("kind", ["llama of blocks", "llama of groups"])
def test_shares_of_a_layer_are_those_of_the_whole(kind, tmp_path):
    folder = save_wide(tmp_path / "checkpoint", kind)
    for far in shared_out(folder, tmp_path):
        assert len(far) == 8
        assert max(far.values()) < 1e-5  # of two sums in place of one


def test_what_cannot_be_cut_is_refused_with_the_ways_out(tmp_path):
    folder = save_wide(tmp_path / "checkpoint", "llama of stacks")
    for said in shared_out(folder, tmp_path):
        assert "qkv_proj: its rotation (hadamard) mixes" in said
        assert "--hadamard_block 32, or give --tensor-parallel-size 1" in said
