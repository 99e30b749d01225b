"""The lattice point by point: what the fast form searches, it searches to its end."""

import pytest
import torch

from quip.codebooks import e8p
from quip.kernels.lattice_points import cpu, reference

FORMS = {"torch": reference, "native": cpu}


@pytest.mark.parametrize("form", FORMS)
def test_every_point_is_nearest_to_itself(form):
    if form == "native" and not cpu.available():
        pytest.skip("no C++ compiler")
    stages = (e8p.tables(torch.device("cpu")),)
    codes = torch.arange(2**16, dtype=torch.int32)[:, None]
    x = FORMS[form].decode(codes, stages, torch.ones(1), group=None, ratio=None)
    found = FORMS[form].nearest(x, stages, scale=torch.tensor(1.0), ratio=None)
    assert torch.equal(found.int(), codes[:, 0])
