"""Models of other engines, and .gguf files for them, as lines; or one line of refusal."""

import pytest

from tests.support.grids import save_grids
from tests.support.integers import write_ct, write_gptq
from tests.support.runs import write_text


@pytest.mark.parametrize(
    ("verb", "write"),
    [("import-gptq", write_gptq), ("import-compressed-tensors", write_ct)],
    ids=["gptq", "compressed-tensors"],
)
def test_a_model_is_imported_inspected_measured_and_spoken_with(quip, verb, write, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    write(theirs, bits=3, scattered=True)
    status, said, err = quip(verb, theirs, out)
    assert (status, err) == (0, [])
    assert said.startswith(f"{out}: ")
    assert said.endswith("7 matrices of integers (3 bits), a checkpoint that quip loads\n")
    status, said, _ = quip("inspect", out)
    assert status == 0
    assert "7 matrices, 30,720 of" in said
    text = write_text(tmp_path / "text.txt")
    sizes = ("--nsamples", "2", "--seqlen", "12")
    status, said, err = quip("evaluate", out, "--datasets", text, *sizes)
    assert status == 0, err
    assert "perplexity" in said
    status, said, err = quip("generate", out, "the", "--max_new_tokens", "2")
    assert status == 0, err
    assert said.strip()
    status, _, [line] = quip(verb, theirs, out)
    assert (status, "add --overwrite" in line) == (2, True)


@pytest.mark.parametrize("verb", ["import-gptq", "import-compressed-tensors"])
def test_what_is_not_in_the_format_is_one_line(quip, verb, tmp_path):
    status, out, [line] = quip(verb, save_grids(tmp_path / "ours"), tmp_path / "out")
    assert (status, out) == (1, "")
    assert "was quantized by 'quip'" in line


def test_a_file_is_written_measured_and_spoken_with(quip, tmp_path):
    folder, out = save_grids(tmp_path / "ours"), tmp_path / "out.gguf"
    status, said, err = quip("export", folder, out, "--gguf")
    assert (status, err) == (0, [])
    assert said.startswith(f"{out}: ")
    assert said.endswith(", 14 matrices of Q4_0\n")
    text = write_text(tmp_path / "text.txt")
    sizes = ("--datasets", text, "--nsamples", "2", "--seqlen", "12")
    told = [quip("evaluate", model, *sizes, "--dtype", "float32") for model in (folder, out)]
    assert [status for status, _, _ in told] == [0, 0], told
    ours, theirs = (
        [line.rpartition(" ")[2] for line in err if "perplexity" in line] for _, _, err in told
    )
    assert ours == theirs != []
    for words, reason in [
        (("--gguf",), "it exists; name another file or add --overwrite"),
        (("--gguf", "--dense"), "--dense and --gguf are two formats: leave one out"),
        (("--gguf", "--dtype", "float16"), "each tensor there has its own type"),
    ]:
        status, said, [line] = quip("export", folder, out, *words)
        assert (status, said) == (2, "")
        assert reason in line


def test_a_matrix_without_blocks_is_one_line(quip, tmp_path):
    folder = save_grids(tmp_path / "ours", "llama", 4, 16)
    status, _, [line] = quip("export", folder, tmp_path / "out.gguf", "--gguf")
    assert status == 2
    assert "q_proj: each 16 of its inputs have a step of their own" in line
    assert "--groupsize 32" in line
