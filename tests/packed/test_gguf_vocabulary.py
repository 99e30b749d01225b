"""Tokenizers as .gguf files name them: the same tokens come back, or none is written."""

import json
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from quip.errors import UnsupportedModel
from quip.model.gguf.returned import SAMPLE, check_returned
from quip.packed.gguf.vocabulary import vocabulary_of
from quip.packed.gguf.write import write_gguf
from tests.support.grids import grid_model

pytestmark = pytest.mark.usefixtures("command")
ENDS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_level(before: pre_tokenizers.PreTokenizer | None = None) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of bytes trained on the sample; `before` splits it first."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [plain] if before is None else [before, plain]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*ENDS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ENDS)


def sentence_piece() -> hf.PreTrainedTokenizerBase:
    """A Llama's tokenizer, which has a token of each byte, trained on the sample."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = [*ENDS.values(), *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE.split(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return hf.LlamaTokenizer(vocab=model["vocab"], merges=[tuple(x) for x in model["merges"]])


def check_same(folder: Path, tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """Written and read again, it makes the same tokens, of the sample and in the model's size."""
    model = grid_model(vocab_size=len(tokenizer) + 5, num_hidden_layers=1)
    write_gguf(model, tokenizer, folder / "out.gguf", name="x")
    check_returned(folder / "out.gguf", model.config, tokenizer)


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_tokenizer_of_bytes_comes_back(tmp_path, add_bos):
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.add_bos_token = add_bos
    assert vocabulary_of(tokenizer, 400)["tokenizer.ggml.pre"] == "smollm"
    check_same(tmp_path, tokenizer)


def test_a_tokenizer_of_sentence_pieces_comes_back(tmp_path):
    check_same(tmp_path, sentence_piece())
    words = vocabulary_of(sentence_piece(), 420)
    assert words["tokenizer.ggml.model"] == "llama"
    assert words["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 6, 6]


def test_a_template_of_conversations_goes_along():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert vocabulary_of(tokenizer, 400)["tokenizer.chat_template"] == tokenizer.chat_template


def test_each_row_of_the_embedding_has_a_token():
    count = len(byte_level())
    words = vocabulary_of(byte_level(), count + 2)
    assert words["tokenizer.ggml.tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert words["tokenizer.ggml.token_type"][count - 1 :] == [1, 5, 5]


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (pre_tokenizers.Digits(individual_digits=False), "in a way that GGUF has no name for"),
        (pre_tokenizers.Whitespace(), "in a way that GGUF has no name for"),
        (pre_tokenizers.Split(".", "removed"), "in a way that GGUF has no name for"),
    ],
)
def test_a_way_of_splitting_without_a_name_is_refused(before, name):
    with pytest.raises(UnsupportedModel, match=name):
        vocabulary_of(byte_level(before), 400)


def test_other_kinds_of_tokenizers_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModel, match="of the type WordLevel"):
        vocabulary_of(hf.PreTrainedTokenizerFast(tokenizer_object=words), 2)


def test_another_tokenizer_than_the_file_has_is_noticed(tmp_path):
    tokenizer = byte_level()
    model = grid_model(vocab_size=400, num_hidden_layers=1)
    write_gguf(model, tokenizer, tmp_path / "out.gguf", name="x")
    other = byte_level(pre_tokenizers.Digits(individual_digits=True))
    with pytest.raises(UnsupportedModel, match=r"its tokenizer makes .* and that of a GGUF file"):
        check_returned(tmp_path / "out.gguf", model.config, other)
