"""The recipes of CONTRIBUTING.md, followed: what they add is one file and a line here and there."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import quip.codebooks
import quip.matrix.feedback
import quip.matrix.methods
import quip.matrix.order
import quip.matrix.polish
import quip.transforms
from quip.codebooks import CODEBOOKS, Codebook, Decoder
from quip.codebooks.names import Entry
from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.matrix.linalg import proxy_loss
from quip.matrix.polish import Polish
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe, describe
from quip.matrix.seeds import rng_for
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec
from quip.transforms import Draw, RescaleDraw, Transform
from tests import laws

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FENCE = re.compile(r"^```python\n# ([^\n]+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def code(section: str) -> tuple[tuple[str, str], str]:
    """A section's file, as path and text, and the lines that register it."""
    (path, file), (_, lines) = FENCE.findall(SECTIONS[section])
    return (path, file), lines


def module(path: str, text: str, folder: Path, monkeypatch) -> ModuleType:
    """The file as a module under the name that it would have."""
    assert not (ROOT / path).exists()
    file = folder / Path(path).name
    file.write_text(text)
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def signs(tmp_path, monkeypatch) -> Codebook:
    (path, text), lines = code("A codebook")
    made = module(path, text, tmp_path, monkeypatch)
    for registry in (CODEBOOKS, laws.CODEBOOKS):
        monkeypatch.setitem(registry, "signs", None)  # taken out again at the end
    exec(lines, vars(made) | {"Entry": Entry, "CODEBOOKS": CODEBOOKS, "LAWS": laws.CODEBOOKS})
    row = CODEBOOKS["signs"]  # of which DECODERS is made when it is first used
    monkeypatch.setitem(quip.codebooks.DECODERS, row.home, getattr(made, row.decoder))
    return laws.CODEBOOKS["signs"]


@pytest.fixture
def flip(tmp_path, monkeypatch):
    (path, text), lines = code("A transform")
    made = module(path, text, tmp_path, monkeypatch)
    monkeypatch.setitem(quip.transforms.TRANSFORMS, "flip", None)
    monkeypatch.setitem(laws.TRANSFORMS, "rescale, flip", None)
    names = {"TRANSFORMS": quip.transforms.TRANSFORMS, "LAWS": laws.TRANSFORMS}
    exec(lines, vars(made) | {"RescaleDraw": RescaleDraw} | names)
    return laws.TRANSFORMS["rescale, flip"]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_codebook_obeys_the_laws(signs, shift):
    rng = torch.Generator().manual_seed(0)
    X, h = torch.randn(6, 8, generator=rng).double() + shift, torch.rand(8, generator=rng).double()
    assert isinstance(signs, Codebook)
    laws.check_codebook(signs, X, h + 0.1)


@pytest.mark.parametrize("group", [None, 16])
def test_the_codebook_quantizes_a_matrix_that_a_checkpoint_can_hold(signs, problem, group):
    W, H = problem(12, 40)
    recipe = Recipe(codebook=signs, group=group)
    q = quantize_matrix(W, H, recipe, rng=rng_for(0, "W"))
    nearest = quantize_matrix(
        W, H, replace(recipe, feedback=quip.matrix.feedback.none), rng=rng_for(0, "W")
    )
    assert isinstance(q.decoder, Decoder)
    laws.check_stored(q.decoder, *W.shape)
    assert describe(recipe)["codebook"] == {"name": "Signs"}
    assert proxy_loss(W, q.dequantize(), H) < proxy_loss(W, nearest.dequantize(), H) < 1
    spec = Spec.from_json(**Spec.of(q).to_json())
    decoder, _ = spec.restore(q.tensors(), *W.shape)
    assert torch.equal(decoder.decode(q.codes), q.decoder.decode(q.codes))
    x = torch.randn(3, 40)
    layer = QuantizedLinear.from_matrix(q, bias=None)
    assert torch.allclose(layer(x), x @ q.dequantize().T, atol=1e-4)  # float32 sums of 40 terms


def test_the_codebook_can_be_named_and_refuses_flags_that_it_does_not_read(signs):
    recipe = build_recipe(codebook="signs", quant="gptq", range_="16")
    assert (type(recipe.codebook), recipe.group) == (type(signs), 16)
    with pytest.raises(UsageError, match=r"--groupsize 8 speaks of grid a and vq: say --codebook"):
        build_recipe(codebook="signs", groupsize=8)


def test_the_transform_obeys_the_laws(flip, problem):
    laws.check_transform(flip, *problem(12, 20))
    laws.check_transform(flip, *problem(12, 20, rank=3, dead=(0, 7)))
    T = flip[-1](*problem(12, 20), torch.Generator())
    assert isinstance(T, Transform)
    assert isinstance(flip[-1], Draw)


def test_the_transform_goes_with_the_codebook(signs, flip, problem):
    W, H = problem(12, 40)
    q = quantize_matrix(
        W, H, Recipe(codebook=signs, transforms=tuple(flip)), rng=torch.Generator().manual_seed(0)
    )
    spec = Spec.of(q)
    assert [part["kind"] for part in spec.transforms] == ["rescale", "flip"]
    _, transform = spec.restore(q.tensors(), *W.shape)
    assert torch.equal(transform.undo(W.float()), q.transform.undo(W.float()))


def test_the_method_is_a_row_that_every_recipe_can_name(problem, monkeypatch):
    (path, text), lines = code("A feedback, an order, a method")
    feedback, methods = quip.matrix.feedback, quip.matrix.methods
    assert path == "quip/matrix/feedback.py"
    monkeypatch.setattr(feedback, "half", None, raising=False)
    exec(text, vars(feedback))
    monkeypatch.setitem(methods.METHODS, "half", None)
    exec(lines, vars(quip.matrix.order) | vars(feedback) | vars(methods))
    W, H = problem(12, 48)
    for flags in laws.GRIDS.values():
        laws.check_recipe({"quant": "half", "wbits": 2, **flags}, W, H)
    laws.check_loss_falls({"quant": "half", "incoh_processing": True}, W, H)
    losses = [
        proxy_loss(
            W,
            quantize_matrix(
                W, H, build_recipe(quant=quant, wbits=4), rng=rng_for(0, "W")
            ).dequantize(),
            H,
        )
        for quant in ("ldlq", "half", "nearest")
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("group", [None, 8])
def test_the_polish_obeys_the_laws(signs, problem, group):
    (_, text), lines = code("A polish")
    names = dict(vars(quip.matrix.polish)) | {"POLISHES": dict(laws.POLISHES)}
    exec(text + lines, names)
    polish = names["POLISHES"]["until settled"]
    assert isinstance(polish, Polish)
    for book in (signs, *laws.CODEBOOKS.values()):
        laws.check_polish(polish, book, *problem(9, 24), group)


def test_every_file_that_the_recipes_name_is_there_or_is_theirs():
    made = {path for path, _ in FENCE.findall(TEXT)}
    named = set(re.findall(r"`((?:quip|tests|scripts|docs)/[\w/.]*)`", TEXT)) - made
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert len(SECTIONS) == 8  # to set up, and seven recipes
