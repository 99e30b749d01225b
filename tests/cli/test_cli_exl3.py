"""`quip import-exl3` and what comes after it, as lines; or one line of refusal."""

from pathlib import Path

import pytest

from tests.support.exl3 import write_exl3
from tests.support.runs import write_text


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exl3") / "theirs"
    write_exl3(folder, kinds={"o_proj": (2, "mcg"), "lm_head": (6, "mul1")})
    return folder


def test_a_model_is_imported_inspected_measured_and_spoken_with(quip, theirs, tmp_path):
    out = tmp_path / "ours"
    status, said, err = quip("import-exl3", theirs, out)
    assert (status, err) == (0, [])
    assert said.startswith(f"{out}: ")
    assert said.endswith(
        "2 matrices of a trellis (mcg, mul1; 4 bits), a checkpoint that quip loads\n"
    )
    status, said, _ = quip("inspect", out)
    assert status == 0
    assert "trellis bits=2 code=mcg" in said
    assert "2 matrices, 32,768 of" in said
    text = write_text(tmp_path / "text.txt")
    sizes = ("--nsamples", "2", "--seqlen", "12")
    status, said, err = quip("evaluate", out, "--datasets", text, *sizes)
    assert status == 0, err
    assert "perplexity" in said
    status, said, err = quip("generate", out, "the", "--max_new_tokens", "2")
    assert status == 0, err
    assert said.strip()


def test_what_is_not_in_the_layout_is_one_line(quip, theirs, tmp_path):
    status, out, [line] = quip("import-exl3", tmp_path, tmp_path / "out")
    assert (status, out) == (1, "")
    assert "no config.json" in line
    status, _, [line] = quip("import-exl3", theirs, theirs.parent)
    assert (status, "add --overwrite" in line) == (2, True)
