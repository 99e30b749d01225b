"""`quip export --compressed-tensors` and `--gptq`: packed matrices as other engines hold them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quip.codebooks import RmsGrid
from quip.errors import UsageError
from quip.jobs.export import export_compressed_tensors, export_gptq
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import load
from quip.packed.compressed_tensors.write import compressed_tensors
from quip.packed.gptq.write import gptq_tensors
from quip.packed.linear import quantized_layers
from tests.support import mixtures, tiny
from tests.support.checkpoints import damage, quantized, save
from tests.support.matrices import plain
from tests.support.published_layouts import read_compressed, read_gptq

pytestmark = pytest.mark.usefixtures("command")

WIDE = {**tiny.GQA, "hidden_size": 64, "intermediate_size": 96}
SYM = {"wbits": 4, "quant": "gptq", "groupsize": 32, "sym": True}
LAYER = "model.layers.0."


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A Llama whose matrices have multiples of 32 rows and columns."""
    monkeypatch.setitem(tiny.CONFIGS, "wide", lambda: hf.LlamaConfig(**WIDE))


def made(flags: dict[str, object] = SYM, **options: object) -> PreTrainedModel:
    return quantized("wide", flags, blocks=1, **options)


def half_integers(bits: int, group: int | None = None) -> PreTrainedModel:
    """A model of grid b without a rotation, which no command line makes."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**WIDE, "num_hidden_layers": 1}))
    recipe = plain(codebook=RmsGrid(bits=bits, rhos=(2.0,)), group=group)
    quantize_model(model.eval(), tiny.tokens(), recipe, device="cpu", seed=0)
    return model


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.dequantize() for name, x in quantized_layers(model).items()}


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}


def schemes(words: dict) -> dict[str, dict]:
    """The words of each target."""
    groups = words["config_groups"].values()
    return {target: group["weights"] for group in groups for target in group["targets"]}


def words_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_equal(found: np.ndarray, wanted: Tensor) -> None:
    """Bit for bit: codes of 8 bits times steps of 8 are exact in float32."""
    assert np.array_equal(found, wanted.double().numpy())


KINDS = [
    *({**SYM, "wbits": bits} for bits in (2, 3, 4, 5, 8)),
    {**SYM, "groupsize": None},
    {**SYM, "groupsize": 16, "quant": "nearest"},
    {**SYM, "groupsize": 500},
    {**SYM, "sym": False, "wbits": 3},
    {**SYM, "sym": False, "groupsize": None},
]


@pytest.mark.parametrize("flags", KINDS, ids=str)
def test_compressed_tensors_have_every_weight_as_it_is(flags):
    model = made(flags)
    tensors, words = compressed_tensors(model, asymmetric=not flags["sym"])
    kinds = schemes(words)
    assert [*kinds] == ["Linear"]
    assert kinds["Linear"]["symmetric"] is flags["sym"]
    assert words["ignore"] == ["lm_head"]
    for name, W in weights(model).items():
        own = part(tensors, name)
        bits = flags["wbits"]
        assert own["weight_packed"].shape == (len(W), -(-W.shape[1] * bits // 32))
        assert own["weight_scale"].dtype == model.dtype
        assert ("weight_zero_point" in own) == (not flags["sym"])
        assert_equal(read_compressed(own, kinds["Linear"]), W)


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 32), (7, 16)])
def test_grids_of_half_integers_take_one_bit_more(bits, group):
    model = half_integers(bits, group)
    tensors, words = compressed_tensors(model)
    kind = schemes(words)["Linear"]
    assert (kind["num_bits"], kind["symmetric"]) == (bits + 1, True)
    for name, W in weights(model).items():
        assert_equal(read_compressed(part(tensors, name), kind), W)
    if bits in (3, 7):
        tensors, words = gptq_tensors(model)
        for name, W in weights(model).items():
            assert_equal(read_gptq(part(tensors, name), words), W)


def test_matrices_of_several_recipes_are_targets_by_name():
    model, other = made(), made({**SYM, "wbits": 8, "groupsize": None})
    model.model.layers[0].mlp = other.model.layers[0].mlp
    tensors, words = compressed_tensors(model)
    kinds = schemes(words)
    assert {*kinds} == {*weights(model)}
    assert kinds[f"{LAYER}mlp.down_proj"]["num_bits"] == 8
    assert kinds[f"{LAYER}self_attn.q_proj"]["num_bits"] == 4
    for name, W in weights(model).items():
        assert_equal(read_compressed(part(tensors, name), kinds[name]), W)
    with pytest.raises(UsageError, match=r"of 4 bits in groups of 32 and of 8 bits in .* one kind"):
        gptq_tensors(model)


@pytest.mark.parametrize("flags", [SYM, {**SYM, "wbits": 8, "groupsize": None}], ids=str)
def test_gptq_has_every_weight_as_it_is(flags):
    model = made(flags)
    tensors, words = gptq_tensors(model)
    others, _ = compressed_tensors(model)
    bits = flags["wbits"]
    assert (words["bits"], words["group_size"]) == (bits, flags["groupsize"] or -1)
    assert (words["sym"], words["desc_act"], words["checkpoint_format"]) == (True, False, "gptq")
    for name, W in weights(model).items():
        own = part(tensors, name)
        assert own["scales"].dtype == torch.float16
        assert {hex(x % 2**32) for x in own["qzeros"].flatten().tolist()} == {
            {4: "0x77777777", 8: "0x7f7f7f7f"}[bits]
        }
        assert_equal(read_gptq(own, words), W)
        assert torch.equal(own["qweight"].T, others[f"{name}.weight_packed"])


FORMATS = pytest.mark.parametrize("export", [export_compressed_tensors, export_gptq])


@FORMATS
def test_a_folder_has_all_that_the_checkpoint_has(export, tmp_path):
    saved, out = save(made(), tmp_path / "saved"), tmp_path / "out"
    texts = json.loads((saved / "tokenizer_config.json").read_text())
    texts["chat_template"] = "{{ messages }}"
    (saved / "tokenizer_config.json").write_text(json.dumps(texts))
    assert export(saved, out) == (out / "model.safetensors").stat().st_size
    tensors, model = load_file(out / "model.safetensors"), load(saved)
    packed = quantized_layers(model)
    ours = {f"{name}.{key}" for name, layer in packed.items() for key in layer.stored()}
    for name, x in model.state_dict().items():
        if name not in ours:
            assert torch.equal(tensors.pop(name), x), name
    assert {name.rpartition(".")[0] for name in tensors} == {*packed}
    words = words_of(out)
    if export is export_gptq:
        assert json.loads((out / "quantize_config.json").read_text()) == words
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{{ messages }}"
    wanted = AutoTokenizer.from_pretrained(saved)("hello")
    assert tokenizer("hello")["input_ids"] == wanted["input_ids"]
    assert (out / "generation_config.json").exists()


@pytest.mark.parametrize(
    "flags",
    [SYM, {**SYM, "wbits": 3}, {**SYM, "wbits": 8, "groupsize": None}],
    ids=["4 bits", "3 bits", "8 bits, rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_same_weights(flags, dtype, tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.18")
    saved = save(made(flags, dtype=dtype), tmp_path / "saved")
    export_compressed_tensors(saved, tmp_path / "out")
    ours, theirs = load(saved), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype
    with torch.no_grad():
        found, wanted = theirs(tiny.tokens()).logits, ours(tiny.tokens()).logits
    for name, W in weights(ours).items():
        assert torch.equal(theirs.get_submodule(name).weight, W.to(dtype)), name
    noise = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # sums in another order
    torch.testing.assert_close(found, wanted, rtol=0, atol=noise * float(wanted.abs().max()))


def test_transformers_loads_matrices_of_several_recipes(tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.18")
    model = made()
    model.model.layers[0].mlp = made({**SYM, "wbits": 8, "groupsize": None}).model.layers[0].mlp
    saved = save(model, tmp_path / "saved")
    export_compressed_tensors(saved, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs(tiny.tokens())  # decompresses them
    for name, W in weights(load(saved)).items():
        assert torch.equal(theirs.get_submodule(name).weight, W), name


# What has no place

AGAIN = "quantize the model again with --quant gptq --wbits 4 --groupsize 128 --sym"
REFUSED = {
    "rotated": ({"wbits": 2, "incoh_processing": True}, r"transformed \(rescale, kronecker\)"),
    "rescaled": ({**SYM, "pre_rescale": True}, r"transformed \(rescale\)"),
    "lattice": ({"codebook": "E8P12"}, r"transformed \(hadamard\)"),
    "plain lattice": ({"codebook": "E8P12", "rotation": "none", "no_fuse": True}, "lattice codes"),
}
WRITERS = pytest.mark.parametrize("write", [compressed_tensors, gptq_tensors])


@WRITERS
@pytest.mark.parametrize(("flags", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_is_refused_by_name_with_the_remedy(flags, reason, write):
    with pytest.raises(UsageError, match=rf"^{LAYER}\S+ .*{reason}") as caught:
        write(made(flags))
    assert str(caught.value).endswith(f"; {AGAIN}, or export it with --dense")
    assert "\n" not in str(caught.value)


@WRITERS
@pytest.mark.parametrize(
    ("hidden", "remedy"), [(64, "with --groupsize 32"), (48, "without --groupsize")]
)
def test_groups_that_end_short_have_no_place(monkeypatch, write, hidden, remedy):
    config = hf.LlamaConfig(**{**WIDE, "hidden_size": hidden})
    monkeypatch.setitem(tiny.CONFIGS, "wide", lambda: config)
    with pytest.raises(UsageError, match=rf"of 40 columns, of which its 96 .* {remedy}, or"):
        write(made({**SYM, "groupsize": 40}))


@WRITERS
def test_experts_have_no_place(write):
    model = mixtures.packed(mixtures.mixture("mixtral"), {**SYM, "groupsize": None})
    with pytest.raises(UsageError, match="of a mixture of experts, for which"):
        write(model)


@WRITERS
def test_a_conv1d_has_no_place(write):
    model = made()
    model.get_submodule(f"{LAYER}mlp.down_proj").is_conv1d = True
    with pytest.raises(UsageError, match=r"mlp\.down_proj is a Conv1D of transformers"):
        write(model)


def test_zeros_are_written_only_where_they_are_asked_for():
    model = made({**SYM, "sym": False})
    with pytest.raises(UsageError, match=r"has zeros, which vLLM reads .* or add --asymmetric$"):
        compressed_tensors(model)
    with pytest.raises(UsageError, match="has zeros, which readers of GPTQ do not take"):
        gptq_tensors(model)


def test_half_integers_of_8_bits_have_no_bits_left():
    with pytest.raises(UsageError, match=r"needs 9 bits in compressed-tensors, .* up to 8"):
        compressed_tensors(half_integers(8))


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_has_4_and_8_bits(bits):
    with pytest.raises(UsageError, match=f"needs {bits} bits, and readers of GPTQ take 4 and 8; "):
        gptq_tensors(made({**SYM, "wbits": bits}))


def test_gptq_has_multiples_of_32(monkeypatch):
    monkeypatch.setitem(
        tiny.CONFIGS, "wide", lambda: hf.LlamaConfig(**{**WIDE, "intermediate_size": 80})
    )
    with pytest.raises(UsageError, match=r"down_proj has 80 inputs, no multiple of 32"):
        gptq_tensors(made({**SYM, "groupsize": 16}))


def test_gptq_has_no_matrix_of_a_block_unpacked():
    model = made()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    with pytest.raises(UsageError, match=r"mlp\.up_proj is not quantized"):
        gptq_tensors(model)
    assert compressed_tensors(model)[1]["ignore"] == [f"{LAYER}mlp.up_proj", "lm_head"]


def test_steps_that_float16_does_not_hold_are_refused_unless_their_weights_are_zeros(tmp_path):
    saved, name = save(made(), tmp_path / "saved"), f"{LAYER}mlp.up_proj"

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.step"][3, 1] = 1e-38

    damage(saved, shrink)
    with pytest.raises(UsageError, match=rf"{saved}: {name}: float16, in which GPTQ has scales"):
        export_gptq(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = load(saved)
    layer = model.get_submodule(name)
    nothing = torch.tensor(-0x77777778, dtype=torch.int32)  # eight codes of 8
    layer.codes[3] = nothing
    tensors, words = gptq_tensors(model)
    assert_equal(read_gptq(part(tensors, name), words), layer.dequantize())


# The command


def test_the_command_says_what_it_wrote(quip, tmp_path):
    saved = save(made(), tmp_path / "saved")
    for flag, what in (("--compressed-tensors", "pack-quantized"), ("--gptq", "layout of GPTQ")):
        status, out, err = quip("export", saved, tmp_path / f"out{flag}", flag)
        assert (status, err) == (0, [])
        assert what in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--gptq --compressed-tensors", "--compressed-tensors and --gptq are two formats"),
        ("--gptq --asymmetric", "--asymmetric is for --compressed-tensors"),
        ("--compressed-tensors --dtype float16", "--dtype float16 is for --dense"),
        ("--gptq", r"transformed \(rescale, kronecker\), for which GPTQ has no place"),
        ("--compressed-tensors", "for which compressed-tensors has no place"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(quip, packed, tmp_path, words, reason):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    status, out, [line] = quip("export", folder, tmp_path / "out", *words.split())
    assert (status, out) == (2, "")
    assert re.search(reason, line)
    assert not (tmp_path / "out").exists()
