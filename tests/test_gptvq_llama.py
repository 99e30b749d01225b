"""The command line of GPTVQ's llama.py: each published flag, and what it is made of."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from quip.errors import UsageError
from tests.support.runs import save_model, write_text

SCRIPT = Path(__file__).parent.parent / "scripts/gptvq/llama.py"
DOOR = runpy.run_path(str(SCRIPT), run_name="door")
VQ = "--use-vq --wbits 2 --groupsize 2048"
PUBLISHED = (  # specification of its command line
    *("seed", "nsamples", "percdamp", "wbits", "groupsize", "columns-per-group", "use-vq"),
    *("vq-dim", "kmeans-init-method", "kmeans-iters", "hessian-weighted-lookups"),
    *("include-m-step", "codebook-bitwidth", "quantize-per-codebook", "quantize-during-kmeans"),
    *("vq-scaling-blocksize", "vq-scaling-n-bits", "vq-scaling-norm", "vq-scaling-domain"),
    *("svd-rank", "only-init-kmeans", "assignment-chunk-size", "model-type", "true-sequential"),
    *("nearest", "sym", "no-quant", "new-eval", "output-dir", "act-order", "static-groups"),
    *("save", "kpp-n-subsample"),
)
OF_VQ = {  # published defaults, of pairs
    "--wbits": "2",
    "--codebook": "vq",
    "--faithful": "",
    "--vq_dim": "2",
    "--groupsize": "2048",
    "--quant": "gptq",
    "--vq_seed": "mahalanobis",
    "--em_iters": "10",
    "--vq_weights": "none",
    "--codebook_update": "none",
    "--codebook_bits": "16",
}


def run_line(words: str, data: str = "pydoc") -> dict[str, str]:
    """What `quip run` is told, flag by flag; an empty word for a switch."""
    said, further = DOOR["published"]().parse_known_args(["demo", data, *words.split()])
    assert further == []
    model, dataset, *flags = DOOR["run_line"](vars(said))
    assert (model, dataset) == ("demo", data)
    found = [flag.partition("=")[::2] for flag in flags]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_published_flag_is_known():
    known = {word for action in DOOR["published"]()._actions for word in action.option_strings}
    assert known - {"-h", "--help"} == {f"--{name}" for name in PUBLISHED}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", {"--wbits": "16"}),
        ("--wbits 16 --nearest", {"--wbits": "16"}),
        (f"--no-quant {VQ} --seed 3", {"--wbits": "16", "--seed": "3"}),
        ("--wbits 3", {"--wbits": "3", "--quant": "gptq", "--qfn": "a"}),
        (
            "--wbits 3 --nearest --groupsize 64",
            {"--wbits": "3", "--quant": "nearest", "--qfn": "a", "--groupsize": "64"},
        ),
        (
            "--wbits 4.0 --percdamp 0.1 --nsamples 7 --save X",
            {"--nsamples": "7", "--save": "X", "--percdamp": "0.1"}
            | {"--wbits": "4", "--quant": "gptq", "--qfn": "a"},
        ),
    ],
)
def test_without_codebooks_it_evaluates_or_rounds_to_grids(words, told):
    assert run_line(words) == told


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--vq-dim 1", {"--vq_dim": "1", "--vq_seed": "cdf"}),
        ("--vq-dim 4 --kmeans-init-method kpp", {"--vq_dim": "4", "--vq_seed": "kpp"}),
        ("--kmeans-iters 100", {"--em_iters": "100"}),
        ("--columns-per-group 128", {"--columns_per_group": "128"}),
        ("--hessian-weighted-lookups", {"--vq_weights": "loss"}),
        ("--include-m-step", {"--codebook_update": "cg"}),
        ("--only-init-kmeans", {"--quant": "nearest"}),
        ("--codebook-bitwidth 8", {"--codebook_bits": "8", "--codebook_scale": "columns"}),
        ("--codebook-bitwidth 8 --quantize-per-codebook", {"--codebook_bits": "8"}),
        ("--codebook-bitwidth 4", {"--codebook_bits": "4"}),
        ("--vq-dim 1 --svd-rank 0.5", {"--vq_dim": "1", "--vq_seed": "cdf", "--svd_rank": "0.5"}),
        (
            "--vq-scaling-blocksize 32 --vq-scaling-n-bits 4 --vq-scaling-norm max "
            "--vq-scaling-domain log",
            {"--vq_scaling": "32"},
        ),
        (
            "--true-sequential --model-type mistral --assignment-chunk-size 4 --kpp-n-subsample 9",
            {},
        ),
    ],
)
def test_each_flag_of_codebooks_is_one_of_run(words, changed):
    assert run_line(f"{VQ} {words}") == OF_VQ | changed


@pytest.mark.parametrize(
    ("data", "words", "measured"),
    [
        ("pydoc", "", None),
        ("c4", "", "wikitext2"),
        ("wikitext2", "--new-eval", "wikitext2,ptb-new,c4-new"),
    ],
)
def test_texts_are_those_that_the_published_code_evaluates(data, words, measured):
    assert run_line(words, data).get("--eval_datasets") == measured


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--use-vq", "--use-vq with --wbits 16, the default, quantizes nothing: say --wbits 2"),
        ("--use-vq --wbits 2", "--groupsize -1, the default, with --use-vq: say how many weights"),
        (f"{VQ} --kmeans-init-method cdf", "cdf with --vq-dim 2: quantiles are of single weights"),
        (f"{VQ} --nearest", "with --use-vq say --only-init-kmeans instead"),
        (f"{VQ} --act-order", "--act-order: the published code stops at it too; leave it out"),
        ("--wbits 3 --static-groups", "--static-groups: the published code stops at it too"),
        ("--wbits 3 --sym", "--sym: grids reach from the smallest weight of a row to its largest"),
        ("--wbits 3 --kmeans-iters 9", "--kmeans-iters speaks of codebooks: add --use-vq"),
        ("--wbits 3 --svd-rank 0.5", "--svd-rank speaks of codebooks: add --use-vq"),
        (f"{VQ} --quantize-per-codebook", "speaks of rounded codebooks: add --codebook-bitwidth 8"),
        (
            f"{VQ} --vq-scaling-norm L2",
            "--vq-scaling-norm L2: scales are logarithms of the largest",
        ),
        (f"{VQ} --vq-scaling-n-bits 8", "--vq-scaling-n-bits 8: scales are logarithms"),
        ("--wbits 2.5", "--wbits 2.5: a whole number of bits per weight is needed"),
    ],
)
def test_what_contradicts_itself_is_refused(words, reason):
    with pytest.raises(UsageError) as refused:
        run_line(words)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


# The whole script


@pytest.fixture
def llama(capsys, monkeypatch, tmp_path):
    """llama(words) -> status, output and lines of stderr, in a folder with a model and a text."""
    save_model(tmp_path / "llama", "llama")
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)

    def call(words: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["llama.py", "llama", "text.txt", *words.split()])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return left.value.code, out, err.splitlines()

    return call


SMALL = "--nsamples 2 --seqlen 12 --device cpu --eval_datasets text.txt --eval_nsamples 2"
TINY_VQ = "--use-vq --wbits 2 --groupsize 64 --columns-per-group 4"


@pytest.mark.parametrize(
    ("words", "quant"), [("--wbits 3", "gptq"), (f"{TINY_VQ} --only-init-kmeans", "nearest")]
)
def test_dense_weights_are_written_and_packed_ones_beside_them(llama, words, quant):
    status, out, err = llama(f"{words} --output-dir DENSE {SMALL}")
    assert status == 0, err
    report = json.loads(Path("DENSE-packed/run.json").read_text())
    assert report["flags"]["quant"] == quant
    assert "DENSE: " in out
    AutoModelForCausalLM.from_pretrained("DENSE", local_files_only=True)
    assert "quantization_config" not in json.loads(Path("DENSE/config.json").read_text())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--slow", "unrecognized arguments: --slow"),
        ("--output-dir DENSE", "--output-dir DENSE: nothing is quantized; leave it out"),
        ("--wbits 3 --output-dir llama", "--output-dir llama: it exists and is not empty"),
        ("--no-quant --save X", "--save needs weights to quantize"),
        ("--use-vq", "--use-vq with --wbits 16"),
        (f"{TINY_VQ} --vq-dim 3 --kmeans-init-method kpp", "--vq_dim"),
    ],
)
def test_what_cannot_be_is_one_line(llama, words, reason):
    status, out, err = llama(f"{words} {SMALL}")
    assert (status, out, len(err)) == (2, "", 1)
    assert reason in err[0]


def test_seeds_that_the_published_default_has_not_for_pairs_are_told(llama):
    err = llama(f"{TINY_VQ} {SMALL}")[2]
    assert "cdf, the default, serves --vq-dim 1: mahalanobis is taken" in err[0]
