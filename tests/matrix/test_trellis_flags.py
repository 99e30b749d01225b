"""Flags of trellis codes: the tiles and states that they choose, and what means nothing."""

import pytest

from quip.codebooks import Trellis
from quip.errors import UsageError
from quip.matrix.build import build_recipe, check_flags
from quip.matrix.methods import METHODS
from quip.matrix.polish import Greedy
from quip.matrix.recipe import describe
from quip.transforms import HadamardDraw

TRELLIS = {"codebook": "trellis", "wbits": 2}
HALF = {**TRELLIS, "wbits": 2.5}
MUL1 = {**TRELLIS, "trellis_code": "mul1"}
LEARNED = Trellis(code="learned", bits=2, states=12, rows=256, columns=1)

REFUSED = [
    ({"wbits": 2.5}, "--wbits 2.5: int has 2, 3, 4, 5, 6, 7, 8 bits; say one of them, or --codebo"),
    ({"wbits": 2.5, "codebook": "vq"}, "say one of them, or --codebook trellis"),
    ({"wbits": 2.5, "codebook": "E8P12"}, "--wbits 2.5: E8P12 has 2 bits; leave out --wbits, or"),
    ({**TRELLIS, "wbits": 2.3}, "trellis has 1, 1.5, 2, 2.5, 3, 3.5, 4 bits; say one of them"),
    ({**TRELLIS, "wbits": 5}, "--wbits 5: 1 to 4 bits can be quantized to"),
    ({**TRELLIS, "wbits": float("nan")}, "--wbits nan: trellis has 1, 1.5, 2"),
    ({**TRELLIS, "trellis_code": "lut"}, "--trellis_code lut: not one of learned, mcg, mul1, 1mad"),
    (
        {**TRELLIS, "trellis_states": 11},
        "--trellis_states 11: learned codes have 8, 10, 12; say one of them, or another "
        "--trellis_code",
    ),
    ({**MUL1, "trellis_states": 17}, "--trellis_states 17: a state has 1 to 16 bits"),
    ({**MUL1, "trellis_states": 0}, "--trellis_states 0: a state has 1 to 16 bits"),
    (
        {**MUL1, "wbits": 3, "trellis_states": 3},
        "--trellis_states 3 --wbits 3: a step brings 3 bits, and a state has more than that; say 4 "
        "or more",
    ),
    (
        {**MUL1, "wbits": 3.5, "trellis_states": 7},
        "--trellis_states 7 --wbits 3.5: a step brings 7 bits, and a state has more than that; say "
        "8 or more",
    ),
    *(
        ({**TRELLIS, "tile": tile}, f"--tile {tile}: rows x columns are needed, as in 256x1")
        for tile in ("256", "256x", "0x1", "x", "-1x2", "1.5x2", "2x2x2", "1e3x1", "9999999999x1")
    ),
    (
        {**HALF, "tile": "256x1"},
        "--tile 256x1 with --wbits 2.5: a step is of two neighbours in a row; say an even number "
        "of columns, such as 128x2",
    ),
    ({**TRELLIS, "trellis_code": "hyb", "tile": "9x3"}, "--tile 9x3 with --trellis_code hyb: a st"),
    (
        {**TRELLIS, "wbits": 4, "tile": "16x17"},
        "--tile 16x17 --wbits 4: a row of it has 68 bits, and 64 are the most; say 16 columns or "
        "fewer",
    ),
    ({**HALF, "tile": "16x26"}, "a row of it has 65 bits, and 64 are the most; say 24 columns or"),
    (
        {**TRELLIS, "tile": "5x1"},
        "--tile 5x1 --wbits 2: its 10 bits are fewer than the 12 of a state; say a larger one, or "
        "fewer --trellis_states",
    ),
    (
        {**TRELLIS, "quant": "ldlbal_admm", "tile": "16x16"},
        "--quant ldlbal_admm with --tile 16x16: it bounds the feedback of single columns; say one "
        "column, or ldlq",
    ),
    ({**TRELLIS, "tile": "16x16", "range_": "8"}, "--range 8: say tensor, or a multiple of 16 col"),
    ({**TRELLIS, "scale": "auto", "scale_override": 0.9}, "leave out what fixes one"),
    ({**TRELLIS, "unbiased": True}, "--unbiased speaks of integer grids: say --codebook int, or"),
    ({**TRELLIS, "faithful": True}, "--faithful speaks of grid a, grid b, E8P12"),
    ({"wbits": 2, "tile": "16x16"}, "--tile 16x16 speaks of trellis: say --codebook trellis, or"),
    ({"codebook": "E8P12", "trellis_states": 10}, "--trellis_states 10 speaks of trellis: say "),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED, ids=str)
def test_what_means_nothing_is_refused_in_one_line(flags, reason):
    with pytest.raises(UsageError) as caught:
        check_flags(**flags)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trellis_is_learned_on_tiles_of_a_column_rotated_and_stacked():
    recipe = build_recipe(**TRELLIS)
    assert recipe.codebook == LEARNED
    assert recipe.transforms == (HadamardDraw(block=None),)
    assert (recipe.group, recipe.stack, recipe.trials) == (8, True, ())
    assert recipe.polish == (Greedy(1),)
    assert not build_recipe(**TRELLIS, no_fuse=True).stack
    assert build_recipe(**TRELLIS, rotation="none").transforms == ()
    assert build_recipe(**TRELLIS, quant="nearest").polish == ()


@pytest.mark.parametrize(
    ("flags", "states", "tile", "group"),
    [
        ({"wbits": 2.5}, 12, (128, 2), 8),
        ({"trellis_states": 10}, 10, (256, 1), 8),
        ({"trellis_code": "mcg"}, 16, (256, 1), 8),
        ({"trellis_code": "mcg", "wbits": 1.5}, 16, (128, 2), 8),
        ({"trellis_code": "hyb"}, 16, (128, 2), 8),
        ({"trellis_code": "mul1", "trellis_states": 14}, 14, (256, 1), 8),
        ({"tile": "16x16"}, 12, (16, 16), 16),
        ({"tile": "32x3"}, 12, (32, 3), 9),
        ({"tile": "32x8", "range_": "tensor"}, 12, (32, 8), None),
        ({"range_": "column"}, 12, (256, 1), 1),
        ({"tile": "32x8", "range_": "64"}, 12, (32, 8), 64),
    ],
    ids=str,
)
def test_states_tiles_and_groups_are_those_said_or_those_that_fit(flags, states, tile, group):
    recipe = build_recipe(**{**TRELLIS, **flags})
    book = recipe.codebook
    assert (book.states, (book.rows, book.columns), recipe.group) == (states, tile, group)


@pytest.mark.parametrize("quant", METHODS)
def test_every_method_takes_tiles_of_a_column(quant):
    assert build_recipe(**TRELLIS, quant=quant).codebook == LEARNED


def test_scales_are_fixed_or_tried_around_the_best_one():
    assert build_recipe(**TRELLIS, scale_override=0.9).codebook.size == 0.9
    assert [book.size for book in build_recipe(**TRELLIS, scale="auto").trials] == [0.93, 1, 1.07]


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5, 4])
def test_whole_bits_are_whole_numbers_however_they_are_said(bits):
    book = build_recipe(codebook="trellis", wbits=float(bits)).codebook
    assert (book.bits, type(book.bits)) == (bits, type(bits))
    assert describe(build_recipe(codebook="trellis", wbits=bits))["codebook"]["bits"] == bits
    if bits in (2, 3, 4):
        assert describe(build_recipe(wbits=float(bits))) == describe(build_recipe(wbits=bits))
