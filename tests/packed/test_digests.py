"""Digests: what was saved is what is loaded, or the tensor is named that is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quip.errors import QuipError, Unavailable
from quip.packed import shards
from quip.packed.checkpoint import load
from quip.packed.digests import (
    DIGESTS,
    SEAL,
    check_digests,
    digest_of,
    digests_of,
    seal_of,
    sign,
    unverified,
    verify,
)
from quip.packed.files import header, weight_files
from tests.support.checkpoints import quantized, refusals, save
from tests.support.damage import (
    body_of,
    clear,
    flip,
    halve,
    header_of,
    spread,
    start_of,
    tensor_at,
    text_at,
    unsigned,
)
from tests.support.tiny import tokens

SHARP = {"codebook": "E8P12"}
TENSORS = {
    "codes": torch.arange(-3, 3, dtype=torch.int32).reshape(2, 3),
    "step": torch.tensor([[1.5, torch.nan]], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "count": torch.tensor(3),
    "none": torch.empty(0, 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint with signs, in one file and in several."""
    folder = tmp_path_factory.mktemp("whole")
    model = quantized("llama", SHARP, blocks=1)
    one = save(model, folder / "one")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "SHARD", "5KB")
        several = save(model, folder / "several")
    assert len(weight_files(several)) > 2
    return {"one": one, "several": several}


@pytest.fixture
def folder(whole, tmp_path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(whole[kind], tmp_path / kind))


def file_of(folder: Path, end: str) -> tuple[Path, str]:
    """The file with the first tensor whose name ends so, and that name."""
    found = [(path, key) for path in weight_files(folder) for key in sorted(header(path))]
    return next((path, key) for path, key in found if key.endswith(end))


def test_a_digest_is_of_type_shape_and_bytes():
    codes = TENSORS["codes"]
    expected = xxhash.xxh3_128(b"int32 [2, 3]" + codes.numpy().tobytes()).hexdigest()
    assert digest_of(codes) == digest_of(codes.T.contiguous().T) == expected
    others = [codes.view(3, 2), codes.view(torch.float32), codes + (codes == 0), codes.T]
    assert len({digest_of(x) for x in (codes, *others, *TENSORS.values())}) == 9


def test_signing_leaves_tensors_as_they_are_and_files_the_same_each_time(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in files:
        save_file(TENSORS, path, metadata={"format": "pt"})
        tensors = body_of(path)
        sign(path)
        assert body_of(path) == tensors
        assert start_of(path) % 8 == 0
        found = load_file(path)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[k].nan_to_num(), x.nan_to_num()) for k, x in TENSORS.items())
    assert len({path.read_bytes() for path in files}) == 1
    signed = json.loads(header_of(path)["__metadata__"][DIGESTS])
    for name, x in TENSORS.items():  # by what docs/format.md says
        begin, end = header_of(path)[name]["data_offsets"]
        words = f"{x.dtype} {list(x.shape)}".removeprefix("torch.").encode()
        assert signed[name] == xxhash.xxh3_128(words + body_of(path)[begin:end]).hexdigest()
    assert header_of(path)["__metadata__"].keys() == {"format", DIGESTS}
    assert verify(path) == dict.fromkeys(sorted(TENSORS), True)


def test_tensors_added_and_lost_are_not_what_was_signed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    assert verify(path) == {}
    sign(path)
    words = header_of(path)["__metadata__"]
    save_file({"more": TENSORS["codes"], "mask": TENSORS["mask"]}, path, metadata=words)
    assert verify(path) == {**dict.fromkeys(sorted({*TENSORS, "more"}), False), "mask": True}
    with pytest.raises(Unavailable, match=r"damaged: 'codes', 'count', 'more', 'none', 'step' are"):
        check_digests([path])
    save_file({f"{i:02d}": torch.ones(1) for i in range(9)}, path, metadata=words)
    with pytest.raises(Unavailable, match=r"damaged: '00', '01', .*, '04' and 9 more are not what"):
        check_digests([path])


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize(
    "end",
    ["codes", "signs_in", "scale", "layernorm.weight", "embed_tokens.weight", "lm_head.weight"],
)
def test_a_flipped_bit_is_named_with_its_tensor(folder, kind, end):
    damaged = folder(kind)
    path, name = file_of(damaged, end)
    flip(path, tensor_at(path, name), bit=0)  # the least that can happen
    assert refusals(damaged) == (
        f"Unavailable: {damaged}: {path.name} is damaged: '{name}' is not what was saved (the "
        "digests differ); download or save it again"
    )


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("i", range(12))
def test_no_bit_of_the_body_flips_unseen(folder, kind, i):
    damaged = folder(kind)
    path = (files := weight_files(damaged))[i % len(files)]
    flip(path, spread(path, 12)[i], bit=i % 8)
    assert list(verify(path).values()).count(False) == 1
    assert f": {path.name} is damaged: '" in refusals(damaged)


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("damage", [clear, halve])
def test_pages_and_halves_that_are_lost_are_named(folder, kind, damage):
    damaged = folder(kind)
    path = weight_files(damaged)[-1]
    damage(path)
    assert f": {path.name} is damaged" in refusals(damaged)


def outcome(folder: Path) -> str:
    """The line with which a folder is refused; nothing where it loads."""
    try:
        load(folder)
    except QuipError as error:
        return str(error)
    return ""


def test_headers_that_were_damaged_are_refused_in_one_line(folder):
    damaged = folder("one")
    path = damaged / "model.safetensors"
    whole, word = path.read_bytes(), text_at(path, DIGESTS)
    starts = (word + 20, text_at(path, '"dtype"'), text_at(path, 'signs_in":{'))
    places = [at for start in (0, 8, *starts) for at in range(start, start + 8)]
    for i, at in enumerate(places):
        flip(path, at, bit=i % 7)
        line = outcome(damaged)
        assert line.startswith(f"{damaged}: "), at
        assert "\n" not in line
        path.write_bytes(whole)
    flip(path, word)  # then there are none: what they were of is whole
    assert outcome(damaged) == ""


def test_damage_can_be_loaded_by_who_asks_for_it(folder):
    damaged = folder("one")
    path, name = file_of(damaged, "norm.weight")
    flip(path, tensor_at(path, name))
    load(damaged, verify=False)
    with unverified():
        AutoModelForCausalLM.from_pretrained(damaged)
    with pytest.raises(QuipError, match=r"is not what was saved"):
        load(damaged)


@pytest.mark.parametrize("kind", ["one", "several"])
def test_checkpoints_without_digests_load_as_before(whole, folder, kind):
    older = folder(kind)
    for path in weight_files(older):
        unsigned(path, DIGESTS)
        assert verify(path) == {}
    ids = tokens()[:2]
    with torch.no_grad():
        assert torch.equal(load(older)(ids).logits, load(whole[kind])(ids).logits)


def test_what_transformers_saves_of_a_loaded_model_has_no_stale_digests(folder, tmp_path):
    model = load(folder("one"))
    for tensor in (model.model.norm.weight, model.lm_head.weight):
        tensor.data.mul_(2)
    for place in (tmp_path / "one", tmp_path / "new"):  # also where the old ones were
        model.save_pretrained(place)
        assert verify(place / "model.safetensors") == {}
        assert torch.equal(load(place).model.norm.weight, model.model.norm.weight)
        assert torch.equal(load(place).lm_head.weight, model.lm_head.weight)
    again = save(load(tmp_path / "new"), tmp_path / "again")
    assert all(verify(again / "model.safetensors").values())


def test_a_seal_is_of_names_tensors_and_words():
    words = {"block": "3", "records": "[]"}
    digests = digests_of(TENSORS)
    seal = seal_of(digests, words)
    assert seal == seal_of(dict(reversed(digests.items())), {**words, SEAL: seal})
    changed = [
        seal_of(digests_of({**TENSORS, "count": torch.tensor(4)}), words),
        seal_of(digests_of({**TENSORS, "more": torch.tensor(4)}), words),
        seal_of({f"{name}.": x for name, x in digests.items()}, words),
        seal_of(digests, {**words, "block": "4"}),
        seal_of(digests, {**words, "more": ""}),
        seal_of(digests, {}),
    ]
    assert len({seal, *changed}) == 7
