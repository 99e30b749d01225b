"""The table of flags: each is read by some part of a recipe, and refused where no part reads it."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quip
from quip.codebooks import CODEBOOKS
from quip.codebooks.names import INTEGERS
from quip.errors import UsageError
from quip.matrix.build import build_recipe, check_flags, flags_read
from quip.matrix.flags import FLAGS, IGNORED, Flags
from quip.matrix.methods import METHODS, RECIPES, ROTATIONS
from quip.matrix.recipe import Recipe
from quip.matrix.said import as_line

# A value of each flag that asks for something.
ASKED = {
    "wbits": 2,
    "quant": "gptq",
    "npasses": 0,
    "groupsize": 8,
    "percdamp": 0.1,
    "codebook": "E8P12",
    "scale": "auto",
    "scale_override": 0.9,
    "resid_scale_override": 3.0,
    "pre_proj_extra": 2,
    "rotation": "blocked",
    "hadamard_block": 8,
    "qfn": "a",
    "range": "tensor",
    "rho": 2.4,
    "vq_dim": 4,
    "columns_per_group": 128,
    "bits_per_value": 3.25,
    "em_iters": 20,
    "vq_seed": "kpp",
    "vq_weights": "none",
    "vq_scaling": 64,
    "codebook_update": "none",
    "codebook_bits": 16,
    "codebook_scale": "columns",
    "svd_rank": 0.5,
    "trellis_code": "mul1",
    "trellis_states": 10,
    "tile": "16x16",
    **{name: True for name, known in FLAGS.items() if known.metadata["said"].kind is bool},
}
GRIDS = {
    "grid a": {},
    "grid a, rotated": {"pre_proj": True},
    "grid b": {"pre_proj": True, "qfn": "b"},
    "incoherence": {"incoh_processing": True},
}
TURNS = [
    {},
    *({"rotation": name} for name in ROTATIONS),
    *({"pre_proj_extra": i} for i in range(3)),
]


def bases() -> list[dict[str, object]]:
    """All codebooks, grids and rotations that mean something together."""
    found = []
    for book, grid, turn in itertools.product(CODEBOOKS, GRIDS.values(), TURNS):
        bits = {} if CODEBOOKS[book].only_bits else {"wbits": 3}
        base = {"codebook": book, **bits, **grid, **turn}
        try:
            check_flags(**base)
        except UsageError:
            continue
        found.append(base)
    return found


BASES = bases()
SHARES = 7  # of the flags, that bases take in turns


def words(flags: dict[str, object]) -> str:
    return " ".join(as_line(flags))


def test_every_flag_is_told_and_read_by_a_part_of_some_recipe():
    assert set(ASKED) == set(FLAGS)
    assert all(len(known.metadata["said"].help) > 20 for known in FLAGS.values())
    read = set().union(*(flags_read(**base) for base in BASES))
    assert read == set(Flags.__dataclass_fields__)


@pytest.mark.parametrize("quant", METHODS)
def test_whatever_parts_mean_something_together_can_be_built(quant):
    for base in BASES:
        if not (quant == "ldlbal_admm" and base["codebook"] != "int"):
            assert isinstance(build_recipe(**{**base, "quant": quant}), Recipe)


@pytest.mark.parametrize("base", BASES, ids=words)
def test_a_flag_that_no_part_reads_is_refused_by_the_parts_that_do_and_the_remedy_works(base):
    read = flags_read(**base)
    turn = BASES.index(base) % SHARES  # every flag meets every kind of base: all would take minutes
    for name, value in [*ASKED.items()][turn::SHARES]:
        key = FLAGS[name].name
        if key in base:
            continue
        if key in read:
            continue
        with pytest.raises(UsageError) as caught:
            build_recipe(**base, **{key: value})
        shown = f"--{name}" if value is True else f"--{name} {value}"
        said = re.fullmatch(
            rf"{re.escape(shown)} speaks of (.+): (say (.+), or )?leave it out", str(caught.value)
        )
        assert said, str(caught.value)
        if said[3]:
            check_flags(**{**base, key: value, **parsed(said[3])})


@pytest.mark.parametrize("base", BASES, ids=words)
def test_flags_that_say_one_thing_twice_mean_what_one_of_them_does(base):
    said = {"pre_rescale": True, "pre_proj": True, "pre_gptqH": True}
    once = check_flags(**{**base, "incoh_processing": True})
    assert check_flags(**{**base, **said, "incoh_processing": True}).draws == once.draws


def parsed(line: str) -> dict[str, object]:
    """--rotation hadamard --no-incoh_processing as flags."""
    found: dict[str, object] = {}
    for flag in re.findall(r"--(\S+)(?: ([^-\s]\S*))?", line):
        name = flag[0].removeprefix("no-")
        known = FLAGS[name]
        switch = known.metadata["said"].kind is bool
        found[known.name] = name == flag[0] if switch else known.metadata["said"].kind(flag[1])
    return found


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"wbits": 2, "rho": 3.0}, "--rho 3.0 speaks of grid b: say --incoh_processing, or leave"),
        ({"wbits": 3, "scale": "auto"}, "say --codebook E8P12RVQ3B, or leave it out"),
        ({"wbits": 8, "scale": "auto"}, "say --codebook E8P12 --wbits 2, or leave it out"),
        ({"wbits": 2, "hadamard_block": 8}, "say --pre_proj --rotation hadamard, or leave it out"),
        (
            {"wbits": 2, "pre_proj": True, "qfn": "b", "groupsize": 8},
            "and vq: say --qfn a, or",
        ),
        ({"codebook": "E8P12", "rho": 3.0}, "say --codebook int --wbits 2 --incoh_processing, or"),
    ],
    ids=str,
)
def test_the_remedy_is_the_nearest_that_works(flags, reason):
    with pytest.raises(UsageError) as caught:
        build_recipe(**flags)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", [name for name, value in ASKED.items() if value is True])
def test_what_is_switched_off_asks_for_nothing(name):
    assert build_recipe(wbits=2, **{name: False}) == build_recipe(wbits=2)
    assert build_recipe(codebook="E8P12", **{name: False}) == build_recipe(codebook="E8P12")


@pytest.mark.parametrize("name", IGNORED)
def test_flags_of_the_papers_code_are_accepted_and_change_nothing(name):
    assert build_recipe(wbits=2, **{name: True}) == build_recipe(wbits=2)


def test_flags_become_words_of_a_line_and_back():
    for recipe in RECIPES.values():
        line = as_line(recipe.flags)
        assert parsed(" ".join(line).replace("=", " ")) == recipe.flags
    off = {"incoh_processing": False, "rho": None, "range_": "8", "unbiased": True}
    assert as_line(off) == ["--no-incoh_processing", "--range=8", "--unbiased"]


def test_the_name_of_the_integer_grids_is_typed_in_one_file():
    files = Path(quip.__file__).parent.rglob("*.py")
    others = "compressed_tensors"  # calls its integers so, too
    typed = [path for path in files if f'"{INTEGERS}"' in path.read_text()]
    assert [path.name for path in typed if path.parent.name != others] == ["names.py"]


# What needs no torch does not wait for it


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--help", 0),
        ("run --help", 0),
        ("zork", 2),
        ("run demo pydoc --wbits 2 --rho 3", 2),
        ("run demo pydoc --codebook E8P12 --rho 3", 2),
        ("run demo pydoc --codebook E8P12 --wbits 3", 2),
        ("run demo pydoc --recipe quip-2bit --ft_lr 1", 2),
        ("run demo pydoc --wbits 2 --resume", 2),
        ("hessians demo pydoc --save x --from quantized --wbits 2 --range 8", 2),
        ("proxy demo nowhere --resume", 2),
        ("export nowhere x", 2),
        ("recipes", 0),
    ],
)
def test_help_and_refusals_import_no_torch(line, status):
    code = (
        "import sys\nfrom quip.cli import main\n"
        f"try:\n    status = main({line.split()!r})\n"
        "except SystemExit as left:\n    status = left.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        f"assert (status, heavy) == ({status}, set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
