"""`quip import-quip-sharp` and `quip export --quip-sharp`: one line, or one line of refusal."""

from pathlib import Path

import pytest

from quip.packed.checkpoint import load
from quip.packed.linear import quantized_layers
from tests.support.published import save_packed, write_published


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "ours"
    save_packed(folder)
    return folder


def test_a_checkpoint_goes_to_the_layout_and_back(quip, packed, tmp_path):
    status, out, err = quip("export", packed, tmp_path / "theirs", "--quip-sharp")
    assert (status, err) == (0, [])
    assert out.startswith(f"{tmp_path / 'theirs'}: ")
    assert out.endswith(", in the published layout of QuIP#\n")
    status, out, err = quip("import-quip-sharp", tmp_path / "theirs", tmp_path / "again")
    assert (status, err) == (0, [])
    assert "14 matrices of E8P12 (2 bits), a checkpoint that quip loads" in out
    assert len(quantized_layers(load(tmp_path / "again"))) == 8


def test_a_tokenizer_may_come_from_elsewhere(quip, packed, tmp_path):
    write_published(tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("tokenizer*"):
        path.unlink()
    words = ("import-quip-sharp", tmp_path / "theirs", tmp_path / "ours")
    status, out, [line] = quip(*words)
    assert (status, out) == (1, "")
    assert "no usable tokenizer" in line
    assert "give --tokenizer NAME" in line
    status, _, err = quip(*words, "--tokenizer", packed)
    assert (status, err) == (0, [])
    status, _, [line] = quip(*words, "--tokenizer", packed)
    assert (status, "add --overwrite" in line) == (2, True)
    assert quip(*words, "--tokenizer", packed, "--overwrite")[0] == 0


def test_export_takes_exactly_one_format(quip, packed, tmp_path):
    for flags, reason in [
        ((), "--quip-sharp for the published layout"),
        (("--dense", "--quip-sharp"), "are two formats: leave one out"),
        (("--quip-sharp", "--dtype", "bfloat16"), "that layout is in float16"),
    ]:
        status, out, [line] = quip("export", packed, tmp_path / "out", *flags)
        assert (status, out) == (2, "")
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_what_is_not_in_the_layout_is_one_line(quip, packed, tmp_path):
    status, out, [line] = quip("import-quip-sharp", packed, tmp_path / "out")
    assert (status, out) == (1, "")
    assert "has no quip_params" in line
