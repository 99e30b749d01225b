"""The values of trellis codes: the specified statistics, slow formulas, and the shipped tables."""

import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch

from quip.codebooks.names import CODEBOOKS, LEARNED_STATES, TRELLIS_CODES
from quip.codebooks.trellis_codes import COMPUTED, code, hybrid_places, target_rms
from quip.errors import QuipError
from quip.kernels.trellis import encode

BITS = CODEBOOKS["trellis"].bits
CPU = torch.device("cpu")
DRAW = Path(__file__).parents[2] / "scripts/dev/draw_trellis_tables.py"
STATES = [0, 1, 2, 12345, 65535]
MEASURED = {  # over 65,536 states: mean, std, kurtosis, least, most, distinct, values at STATES
    "1mad": (-0.00039, 1.00009, 2.699, -3.268, 3.173, 908),
    "3inst": (0.00021, 1.24371, 2.880, -3.957, 3.973, 10598),
    "mcg": (-0.00004, 1.24411, 2.880, -3.949, 3.949, 10746),
    "mul1": (-0.00193, 1.00031, 2.703, -3.453, 3.348, 913),
    "int8": (-0.00299, 36.9497, 2.697, -126, 119, 240),
}
VALUES = {
    "1mad": (-1.251687, -0.838969, -0.426250, 0.020298, 0.412718),
    "3inst": (0.768066, -0.919434, 0.931641, 1.086914, -0.158203),
    "mcg": (1.843750, 0.134521, -0.759277, -0.406738, 0.850098),
    "mul1": (-3.453125, 0.641113, -0.448486, -1.409180, -0.651367),
    "int8": (-126, 5, 10, -64, -55),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_codes_have_the_specified_values(name):
    table = code(name, 2, 16, CPU).table
    assert table.shape == (65536, 1)
    x = table[:, 0].double()
    mean, std, kurtosis, least, most, distinct = MEASURED[name]
    centred = x - x.mean()
    found = (x.mean(), centred.square().mean().sqrt(), x.min(), x.max())
    # Half a unit of the last digit that the specification prints.
    tolerances = [5.1e-6, 5.1e-6 if std < 2 else 5.1e-5, 5.1e-4, 5.1e-4]
    for value, wanted, tolerance in zip(found, (mean, std, least, most), tolerances, strict=True):
        assert float(value) == pytest.approx(wanted, abs=tolerance)
    moment = centred.pow(4).mean() / centred.square().mean().square()
    assert float(moment) == pytest.approx(kurtosis, abs=5.1e-4)
    assert len(x.unique()) == distinct
    assert x[STATES].tolist() == pytest.approx(VALUES[name], abs=5.1e-7)


def in_half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def to_half(value: float) -> float:
    return struct.unpack("<e", struct.pack("<e", value))[0]


def slow_value(name: str, x: int) -> float:
    """What the word x is worth, with Python's integers and its rounding to half precision."""
    if name in ("3inst", "mcg"):
        y = (x & 0x8FFF8FFF) ^ 0x3B603B60
        return to_half(in_half(y & 0xFFFF) + in_half(y >> 16))
    if name == "int8":
        return sum((x & 0x3F3F3F3F).to_bytes(4, "little")) - 126
    total = sum(x.to_bytes(4, "little"))
    if name == "1mad":
        return (total - 510) / 147.800537
    return to_half((1024 + total) * in_half(0x1EEE) + in_half(0xC931))


@pytest.mark.parametrize("name", COMPUTED)
def test_the_second_weight_of_a_step_is_the_value_of_the_next_word(name):
    formula, table = COMPUTED[name], code(name, 2.5, 9, CPU).table
    for s in range(512):
        first = (formula.factor * s + formula.offset) % 2**32
        second = (formula.factor * first + formula.offset) % 2**32
        wanted = [slow_value(name, first), slow_value(name, second)]
        assert table[s].tolist() == torch.tensor(wanted).tolist()


@pytest.mark.parametrize("name", [*COMPUTED, "hyb"])
def test_fewer_states_have_the_first_values(name):
    whole, few = code(name, 2, 16, CPU), code(name, 2, 10, CPU)
    assert (few.L, few.bits, few.V) == (10, 2 * few.V, whole.V)
    assert torch.equal(few.table, whole.table[:1024])


def test_two_weights_of_a_step_know_nothing_of_one_another():
    for name in COMPUTED:
        correlation = torch.corrcoef(code(name, 1.5, 16, CPU).table.T)[0, 1]
        assert abs(correlation) < 0.02, name  # those of neighbours are up to 0.36


def test_hyb_reads_the_specified_rows_and_flips():
    rows, signs = hybrid_places(16)
    at = [0, 1, 2, 10, 12345, 65535]
    assert rows[at].tolist() == [0, 0, 0, 1, 115, 0]
    assert signs[at, 0].tolist() == [1, 1, 1, 1, -1, 1]
    slow = [s * (s + 1) % 2**32 for s in range(65536)]
    assert rows.tolist() == [(h >> 6) % 512 for h in slow]
    assert signs[:, 1].tolist() == [-1.0 if h >> 31 else 1.0 for h in slow]
    table = code("hyb", 2, 16, CPU).table
    first = {int(row): i for i, row in reversed(list(enumerate(rows.tolist())))}
    same = torch.tensor([first[row] for row in rows.tolist()])
    assert torch.equal(table * signs, (table * signs)[same])


@pytest.mark.parametrize("bits", BITS)
def test_learned_tables_are_there_for_all_bits(bits):
    for name, states in [*(("learned", L) for L in LEARNED_STATES), ("hyb", 16)]:
        found = code(name, bits, states, CPU)
        assert (found.name, found.L, found.V) == ("table", states, 2 if name == "hyb" else found.V)
        assert found.bits == bits * found.V
        assert torch.equal(found.table, found.table.half().float())
        rms = float(found.table.square().mean().sqrt())
        assert 0.8 < rms < 1.3  # those of few bits are shorter than weights, others longer
        assert target_rms(name, bits, states) == 1.0


def test_codes_are_made_once_for_a_device():
    assert code("learned", 2, 10, CPU) is code("learned", 2, 10, CPU)
    assert code("mcg", 2, 10, torch.device("meta")).table.is_meta


def test_kernels_are_told_the_names_of_what_they_can_compute():
    assert {code(name, 3, 12, CPU).name for name in COMPUTED} == set(COMPUTED)
    assert {code(name, 3.5, 12, CPU).name for name in TRELLIS_CODES} == {"table"}


@pytest.mark.parametrize(
    ("name", "bits", "L", "says"),
    [
        ("e8p", 2, 12, "no trellis code is called 'e8p'; there are learned, mcg, m"),
        ("learned", 5, 12, "a trellis has no 5 bits per weight; there are 1, 1.5, 2"),
        ("mcg", 2.25, 12, "a trellis has no 2.25 bits per weight"),
        ("mcg", 2, 17, "a state of mcg at 2 bits has 3 to 16 bits, not 17"),
        ("mcg", 4, 4, "a state of mcg at 4 bits has 5 to 16 bits, not 4"),
        ("hyb", 4, 8, "a state of hyb at 4 bits has 9 to 16 bits, not 8"),
        ("learned", 2, 9, "a state of learned has 8, 10, 12 bits, not 9"),
    ],
)
def test_a_code_that_is_not_there_is_refused_in_one_line(name, bits, L, says):
    with pytest.raises(QuipError) as refused:
        code(name, bits, L, CPU)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


@pytest.fixture
def check(monkeypatch, capsys):
    """check(*names) -> the exit status and the output of drawing tables anew."""

    def call(*names: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [DRAW.name, "--check", *names])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(DRAW), run_name="__main__")
        return left.value.code, capsys.readouterr().out

    return call


compiled = pytest.mark.skipif(
    not any(form.available() for form in encode.forms.values()), reason="no C++ compiler"
)


@compiled
def test_a_learned_table_is_drawn_again_bit_for_bit(check):
    assert check("learned-2-8") == (0, "learned-2-8: the same\n")


@compiled
@pytest.mark.slow
def test_all_small_tables_are_drawn_again_bit_for_bit(check):
    names = [f"learned-{k:g}-{L}" for k in BITS for L in LEARNED_STATES if L < 12]
    assert check(*names) == (0, "".join(f"{name}: the same\n" for name in names))
