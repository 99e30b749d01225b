"""Text from a model: transformers' own tokens, one at a time, in whole characters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quip
from quip.errors import NonFinite, UsageError
from quip.model.load import load_model
from quip.packed.step import CAPTURES
from quip.serve.generate import generate
from quip.serve.sampling import Sampling
from quip.serve.text import HALF, IncrementalDecoder
from tests.support.checkpoints import quantized
from tests.support.speaking import TEMPLATE, byte_level, numbers, saying, spaced
from tests.support.tiny import tiny

NAMES = ["opt", "llama", "gemma2", "mistral", "qwen2", "gpt-neox", "bloom", "gptj"]


NUMBERS = numbers()
WORDS = "5 9 33 2 61 7 40"


def ids_of(answer) -> list[int]:
    return [int(word) for word in "".join(answer).split()]


def theirs(model, count: int, prompt: str = WORDS, **options) -> list[int]:
    ids = torch.tensor([[int(word) for word in prompt.split()]])
    out = model.generate(ids, max_new_tokens=count, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def fluent(model):
    """The model with no stop token, no biases, and an output apart from its input: with these it
    would repeat one token."""
    model.generation_config.eos_token_id = None
    head = model.get_output_embeddings()
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7))
    head.weight = torch.nn.Parameter(0.3 * noise)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name, cache):
    model = fluent(tiny(name))  # sliding windows are of 5 positions here, and the text of 27
    found = ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=20))
    assert found == theirs(model, 20, do_sample=False, use_cache=cache)
    assert len(set(found)) > 3


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_packed_model_writes_what_transformers_writes_with_it(name):
    model = fluent(quantized(name))
    found = ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=20))
    assert found == theirs(model, 20, do_sample=False)
    assert len(set(found)) > 3


def test_steps_of_fixed_size_write_the_same_text(monkeypatch):
    model = fluent(tiny("llama", "sdpa"))
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, words: seen.append(type(words["past_key_values"]).__name__),
        with_kwargs=True,
    )
    expected = theirs(model, 20, do_sample=False)
    monkeypatch.setitem(CAPTURES, "cpu", lambda compute, device: compute)  # as on a CUDA device
    seen.clear()
    assert ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=20)) == expected
    assert seen == ["DynamicCache", *["StaticCache"] * 19]


def test_the_demo_goes_on_as_transformers_lets_it():
    loaded = load_model("demo")
    answer = generate(loaded.model, loaded.tokenizer, "The following", max_new_tokens=30)
    text = "".join(answer)
    ids = loaded.tokenizer("The following", return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, max_new_tokens=30, do_sample=False)
    assert "The following" + text == loaded.tokenizer.decode(out[0], skip_special_tokens=True)
    assert answer.text == text
    assert answer.prompt_tokens == ids.shape[1]
    assert answer.new_tokens == out.shape[1] - ids.shape[1]
    assert answer.prefill_seconds > 0
    assert answer.decode_seconds > 0


def test_each_token_is_computed_once_and_without_gradients():
    model = tiny("llama").requires_grad_(True)
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, out: seen.append((inputs[0].shape[1], out.requires_grad))
    )
    for _ in generate(model, NUMBERS, WORDS, max_new_tokens=5):
        assert torch.is_grad_enabled()  # the caller's own work is not touched
    assert seen == [(7, False), *[(1, False)] * 4]


def test_nothing_is_computed_before_it_is_asked_for():
    model = tiny("llama")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    answer = generate(model, NUMBERS, WORDS, max_new_tokens=9)
    assert not calls
    pieces = iter(answer)
    next(pieces)
    next(pieces)
    assert len(calls) == 2
    assert answer.ended is None


@pytest.mark.parametrize("ends", [int, lambda end: [63, end], lambda end: [end, end]])
def test_any_stop_token_of_the_model_ends_the_text_and_is_not_in_it(ends):
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    path = theirs(model, 20, do_sample=False)
    end = path[6]
    model.generation_config.eos_token_id = ends(end)
    answer = generate(model, NUMBERS, WORDS, max_new_tokens=20)
    assert ids_of(answer) == path[: path.index(end)]
    assert answer.ended == "stop"
    assert answer.new_tokens == path.index(end) + 1


def test_the_stop_token_of_the_tokenizer_ends_the_text_too():
    model = tiny("llama")
    model.generation_config.eos_token_id = [63]
    path = theirs(model, 20, do_sample=False, eos_token_id=None)
    answer = generate(model, numbers(end=path[6]), WORDS, max_new_tokens=20)
    assert ids_of(answer) == path[: path.index(path[6])]


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_last_position_ends_the_text(name):
    model = tiny(name)  # of 32 positions; OPT has learned no others
    model.generation_config.eos_token_id = None
    answer = generate(model, NUMBERS, WORDS, max_new_tokens=1000)
    assert len(ids_of(answer)) == 32 - 7 + 1  # the last one predicts a token as well
    assert answer.ended == "positions"
    answer = generate(model, NUMBERS, WORDS, max_new_tokens=26)
    assert len(ids_of(answer)) == 26
    assert answer.ended == "max_new_tokens"


def test_positions_without_limit_end_nothing():
    model = tiny("bloom")
    model.generation_config.eos_token_id = None
    assert len(ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=60))) == 60


def test_a_prompt_of_all_positions_is_answered_and_a_longer_one_refused():
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("nothing should be computed"))
    generate(model, NUMBERS, "1 " * 32)
    with pytest.raises(UsageError, match="33 tokens, above the model's 32 positions; shorten it"):
        generate(model, NUMBERS, "1 " * 33)


def test_an_empty_prompt_and_numbers_that_mean_nothing_are_refused():
    model = tiny("llama")
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(model, NUMBERS, "")
    with pytest.raises(UsageError, match="max_new_tokens 0: at least 1"):
        generate(model, NUMBERS, WORDS, max_new_tokens=0)
    with pytest.raises(UsageError, match="needs rng"):
        generate(model, NUMBERS, WORDS, sampling=Sampling(temperature=1.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 1e-9}, "temperature 1e-09"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0: at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0: above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p 1.5: above 0"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p nan"),
        ({"top_p": 0.9}, "add a temperature above 0"),
        ({"top_k": 5}, "add a temperature above 0"),
    ],
)
def test_a_sampling_that_means_nothing_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**words)


def drawn(model, seed: int, count: int = 20, **words: float) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    sampling = Sampling(**{"temperature": 1.0, **words})
    return ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=count, sampling=sampling, rng=rng))


@pytest.fixture(scope="module")
def flat():
    """A model of which several tokens are likely at each step."""
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    return model


@pytest.mark.parametrize(
    "words", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6, "temperature": 2.0}]
)
def test_draws_are_those_of_transformers(flat, words):
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **words}
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = theirs(flat, 20, do_sample=True, **full)
        assert drawn(flat, seed, **words) == expected


def test_a_seed_says_which_text_is_drawn(flat):
    assert drawn(flat, 1) == drawn(flat, 1)
    assert len({tuple(drawn(flat, seed)) for seed in range(5)}) == 5


def test_what_the_model_says_of_drawing_is_left_out():
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    plain = drawn(model, 0, temperature=2.0)
    model.generation_config.update(min_p=0.9, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5)
    assert drawn(model, 0, temperature=2.0) == plain


def test_a_generator_moves_on_and_the_global_one_stays(flat):
    rng, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    texts = [
        ids_of(
            generate(
                *(flat, NUMBERS, WORDS),
                sampling=Sampling(temperature=1.0),
                rng=rng,
                max_new_tokens=20,
            )
        )
        for _ in range(2)
    ]
    assert texts[0] != texts[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("words", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_draws_among_one_token_are_greedy(flat, words):
    assert drawn(flat, 0, **words) == theirs(flat, 20, do_sample=False)


def test_what_the_model_says_of_sampling_is_left_out_and_of_repetition_kept():
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    plain = theirs(model, 20, do_sample=False)
    assert len(set(plain)) < 20
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    assert ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=20)) == plain
    model.generation_config.update(repetition_penalty=3.0)
    found = ids_of(generate(model, NUMBERS, WORDS, max_new_tokens=20))
    assert found == theirs(model, 20, do_sample=False)
    assert found != plain


def test_a_model_that_predicts_nan_is_not_let_speak():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(NonFinite, match=r"LlamaForCausalLM computes NaN or infinity in torch"):
        list(generate(model, NUMBERS, WORDS))


def pieces_of(tokenizer, ids: list[int], before: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, before)
    return [*filter(None, map(decoder.add, ids)), decoder.rest()]


BYTE_LEVEL, SPACED = byte_level(), spaced()
TEXT = st.text(st.sampled_from("ab c anéâ€日本😀\n") | st.characters(codec="utf-8"), max_size=30)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPACED], ids=["byte level", "spaced"])
@given(before=TEXT, text=TEXT)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, before, text):
    ids = tokenizer(before + text)["input_ids"]
    for split in (0, len(tokenizer(before)["input_ids"])):
        whole, start = tokenizer.decode(ids), tokenizer.decode(ids[:split])
        if HALF in before + text or not whole.startswith(start) or start.endswith(HALF):
            continue  # the split is in a character
        pieces = pieces_of(tokenizer, ids[split:], ids[:split])
        assert "".join(pieces) == whole[len(start) :]
        assert not any(HALF in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    text = "é€日😀."
    ids = BYTE_LEVEL(text)["input_ids"]
    assert len(ids) == len(text.encode()) - 1  # a token lies across é and the euro
    decoder = IncrementalDecoder(BYTE_LEVEL, [])
    assert list(filter(None, map(decoder.add, ids))) == ["é€", "日", "😀", "."]


def test_bytes_that_never_become_a_character_are_said_at_the_end():
    ids = BYTE_LEVEL("a😀")["input_ids"][:3]
    assert pieces_of(BYTE_LEVEL, ids, []) == ["a", HALF]


def test_a_model_streams_whole_characters_and_then_stops():
    ids = BYTE_LEVEL(">日é😀 go")["input_ids"]
    answer = generate(saying([*ids, 0]), BYTE_LEVEL, "say>")
    assert list(answer) == ["日", "é", "😀", " ", "g", "o"]
    assert (answer.text, answer.ended) == ("日é😀 go", "stop")


def test_a_text_goes_on_with_the_space_of_its_first_word():
    a, b = SPACED.convert_tokens_to_ids(["▁a", "▁b"])
    answer = generate(saying([a, b, 0], vocab=272), SPACED, "a")
    assert "".join(answer) == " b"


CHAT = byte_level(TEMPLATE)
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Go on"},
]


def test_messages_go_through_the_chat_template():
    ids = CHAT(">Hi!")["input_ids"]
    answer = generate(saying([*ids, 0]), CHAT, TALK)
    assert "".join(answer) == "Hi!"
    expected = CHAT.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert answer.prompt_tokens == len(expected)


def test_what_the_template_refuses_and_what_is_too_long_is_said():
    model = saying([1, 2], positions=50)
    with pytest.raises(UsageError, match="refuses messages of the roles system, user: no Swedish"):
        generate(model, CHAT, [{"role": "system", "content": "Swedish"}, TALK[1]])
    with pytest.raises(UsageError, match="50 positions; say less, or begin a new conversation"):
        generate(model, CHAT, TALK)
    with pytest.raises(UsageError, match="the chat template refuses messages of the roles user"):
        generate(model, BYTE_LEVEL, TALK[1:2])  # it has none


def test_the_public_name_is_this_function():
    assert quip.generate is generate
    assert quip.Sampling is Sampling
