"""OpenAI's own client, and worse ones, ask a server."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import replace

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.support.serving import KEY, serving, until  # noqa: E402

PROMPT = "The list is"
MESSAGES = [{"role": "user", "content": "What is a list?"}]
CHAT = "[user]What is a list?\n[assistant]>"  # by the template


def streamed(events) -> tuple[str, list[str], object]:
    """The text of a stream, why it ended, and its last event."""
    text, reasons, event = "", [], None
    for event in events:
        for choice in event.choices:
            text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, reasons, event


def test_greedy_text_is_that_of_generate_whole_and_streamed(client, theirs):
    words = {"model": "demo", "prompt": PROMPT, "max_tokens": 16}
    answer = client.completions.create(**words)
    expected = theirs(PROMPT)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 16)
    usage = {"include_usage": True}
    text, reasons, last = streamed(
        client.completions.create(**words, stream=True, stream_options=usage)
    )
    assert (text, reasons) == (expected, ["length"])
    assert last.usage == answer.usage


def test_chat_is_the_text_after_the_template_whole_and_streamed(client, theirs):
    words = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**words)
    expected = theirs(CHAT, 12, special=False)
    assert answer.choices[0].message.content.strip() == expected.strip()
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 12
    text, reasons, _ = streamed(client.chat.completions.create(**words, stream=True))
    assert text == answer.choices[0].message.content
    assert reasons == ["length"]
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert client.chat.completions.create(**words | {"messages": parts}).choices == answer.choices


def test_sixteen_clients_at_once_each_get_their_own_answer(door, theirs):
    prompts = [f"The {word} is" for word in ("list", "module", "value", "name")] * 4
    expected = {prompt: theirs(prompt, 5) for prompt in set(prompts)}

    def ask(prompt: str) -> str:
        with door.client() as client:
            answer = client.completions.create(model="demo", prompt=prompt, max_tokens=5)
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == [expected[prompt] for prompt in prompts]


def test_a_seed_says_which_text_is_drawn_whoever_else_draws(door, client, ours):
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=8, temperature=0.8, top_p=0.9, seed=seed
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, [1, 2, 3, 4]))
    assert found == [ours(PROMPT, seed, 8, temperature=0.8, top_p=0.9) for seed in (1, 2, 3, 4)]
    assert len(set(found)) == 4


def test_a_stop_is_no_part_of_the_text(client, theirs):
    expected = theirs(PROMPT, 24)
    stop = expected[20:23]
    words = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "stop": ["never so", stop]}
    answer = client.completions.create(**words)
    assert answer.choices[0].text == expected[: expected.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    text, reasons, _ = streamed(client.completions.create(**words, stream=True))
    assert (text, reasons) == (answer.choices[0].text, ["stop"])


def test_probabilities_are_those_of_the_model(served, client):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=3, echo=True
    )
    [choice] = answer.choices
    ids = served.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    log_p = served.model(ids).logits[0].log_softmax(-1)
    found = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(found.tokens) == ids.shape[1] + 1
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    own = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found.token_logprobs[1:-1] == pytest.approx(own.tolist(), abs=1e-4)  # float32 sums
    likely = log_p.topk(3).values
    for row, top in zip(likely, found.top_logprobs[1:], strict=True):
        assert sorted(top.values())[-3:] == pytest.approx(sorted(row.tolist()), abs=1e-4)
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
    offsets = zip(found.tokens, found.text_offset, strict=True)
    assert all(choice.text[at:].startswith(token) for token, at in offsets if token != "</s>")


def test_probabilities_of_chat_and_streams_are_those_of_the_whole_text(client):
    words = {"model": "demo", "messages": MESSAGES, "max_tokens": 6}
    probable = {"logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**words, **probable)
    whole = answer.choices[0].logprobs.content
    assert len(whole) == 6
    assert all(x.logprob == x.top_logprobs[0].logprob for x in whole)  # greedy
    parts = client.chat.completions.create(**words, **probable, stream=True)
    found = [x for part in parts for c in part.choices if c.logprobs for x in c.logprobs.content]
    assert found == whole


def test_several_prompts_and_tokens_are_answered_in_their_order(served, client, theirs):
    prompts = [PROMPT, "The module"]
    ids = [served.tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = [theirs(prompt, 5) for prompt in prompts]
    for given in (prompts, ids):
        answer = client.completions.create(model="demo", prompt=given, max_tokens=5)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1]
        parts = client.completions.create(model="demo", prompt=given, max_tokens=5, stream=True)
        texts = ["", ""]
        for part in parts:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == expected
    one = client.completions.create(model="demo", prompt=ids[0], max_tokens=5)
    assert one.choices[0].text == expected[0]


def test_a_prompt_is_only_scored_where_no_token_is_asked_for(client):
    words = {"model": "demo", "prompt": PROMPT, "echo": True}
    answer = client.completions.create(**words, max_tokens=0, logprobs=0)
    more = client.completions.create(**words, max_tokens=1, logprobs=0)
    assert answer.choices[0].text == PROMPT
    assert answer.usage.completion_tokens == 0
    found = answer.choices[0].logprobs
    assert found.token_logprobs == more.choices[0].logprobs.token_logprobs[:-1]
    assert client.completions.create(**words, max_tokens=0).choices[0].text == PROMPT


def test_the_model_is_listed_under_its_name(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("facebook/opt-125m")


def test_text_ends_at_the_last_position(client):
    answer = client.completions.create(model="demo", prompt="a " * 500, max_tokens=512)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 513  # the last position predicts one as well


TEXT, TALK = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (TEXT, {"prompt": "a " * 600}, "400: the prompt has 602 tokens, above the model's 512 pos"),
        (TALK, {"messages": [{"role": "user", "content": "a " * 600}]}, "shorten it"),
        (TEXT, {"prompt": "a", "max_tokens": 513}, "400: max_tokens 513: from 1 to the 512 pos"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "400: max_tokens 0: from 1"),
        (TEXT, {"prompt": ""}, None),
        (TEXT, {"prompt": []}, "400: prompt holds 0 prompts"),
        (TEXT, {"prompt": ["a"] * 257}, "400: prompt holds 257 prompts, not 1 to 256"),
        (TEXT, {"prompt": [-1]}, "400: token -1 is none of the model's"),
        (TEXT, {"prompt": {"a": 1}}, "prompt is {'a': 1}, not text or a list"),
        (TEXT, {}, "400: the request is no valid JSON of its kind: prompt is missing"),
        (TEXT, {"prompt": "a", "temperature": -1}, "400: temperature -1"),
        (TEXT, {"prompt": "a", "temperature": "hot"}, "temperature is 'hot', not a number or null"),
        (TEXT, {"prompt": "a", "temperature": 1, "top_p": 2}, "400: top_p 2.0: above 0"),
        (TEXT, {"prompt": "a", "seed": 2**63}, "400: seed 9223372036854775808: a seed has at"),
        (TEXT, {"prompt": "a", "stop": [""]}, "400: stop holds an empty text"),
        (TEXT, {"prompt": "a", "stop": ["b"] * 17}, "stop is"),
        (TEXT, {"prompt": "a", "n": 2}, "400: 'n' 2 is not served here; leave it out"),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs is 21, not a whole number from 0 to 20"),
        (TEXT, {"prompt": "a", "model": "../etc"}, "404: model '../etc' is not served here; name"),
        (TALK, {"messages": []}, "messages is [], not from 1"),
        (TALK, {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (TALK, {"messages": MESSAGES, "tools": [{}]}, "400: 'tools' [{}] is not served here"),
        (TALK, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs 2 needs logprobs"),
        (
            TALK,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "400: a message holds a part of type 'image_url'; only text is served",
        ),
        (
            TALK,
            {"messages": [{"role": "system", "content": "Swedish"}]},
            "400: the chat template refuses messages of the roles system: no Swedish",
        ),
        (TEXT, b'{"prompt": "a"', "400: the request is no valid JSON of its kind: Expecting"),
        (TEXT, b"\xff", "400: the request is no valid JSON of its kind"),
        (TEXT, b"[]", "it is [], not a mapping"),
        (TEXT, b"[" * 100_000, "lists or mappings more than"),
        (TEXT, b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (TEXT, b"a" * ((4 << 20) + 1), "413: the request has more than 4194304 bytes; send less"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(door, path, body, message):
    if message is None:  # a text without words is the token that begins all texts
        assert door.ask(path, body)[0] == 200
    else:
        assert message in door.refusal(path, body)


def test_a_wrong_or_missing_key_is_refused_before_anything_is_read(door):
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        door.client("another").completions.create(model="demo", prompt="a")
    for header in ("", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", f"Bearer {KEY[:-1]}"):
        assert door.refusal(TEXT, b"{", authorization=header).startswith("401: the API key")
        assert door.refusal("/v1/models", method="GET", authorization=header).startswith("401")
    assert door.ask("/health", method="GET", authorization="") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "path", ["/load_model", "/reset", "/v1/responses", "/v1/systemone", "/docs", "/openapi.json"]
)
def test_other_doors_of_the_server_are_closed(door, path, monkeypatch):
    import transformers.cli.serving.model_manager as theirs

    def fail(*args: object) -> None:
        pytest.fail("nothing is loaded that a request names")

    monkeypatch.setattr(theirs.ModelManager, "load_model_and_processor", fail)
    assert door.refusal(path, {"model": "demo"}).startswith("404")
    assert door.refusal(TEXT, method="GET").startswith("405")


def test_pages_of_other_sites_are_kept_out(served, door):
    message = "415: the content type is not application/json; send JSON"
    assert door.refusal(TEXT, {"prompt": "a"}, content_type="text/plain") == message
    with serving(served, key=None) as open_door:
        assert open_door.ask("/v1/models", method="GET", host="localhost:80")[0] == 200
        refusal = open_door.refusal("/v1/models", method="GET", host="evil.example:80")
        assert refusal.startswith("403: the host 'evil.example:80' is not how this server is")


def test_who_leaves_is_written_for_no_longer(door, client):
    before = len(door.lines)
    words = {"model": "demo", "prompt": PROMPT, "max_tokens": 500}
    with client.completions.create(**words, stream=True) as events:
        next(iter(events))
    until(lambda: door.engine.waiting == 0 and len(door.lines) > before)
    assert " 499, 4 + 0 tokens" in door.lines[-1]

    seen = []
    hook = door.served.model.register_forward_pre_hook(lambda *_: seen.append(1))
    body = b'{"prompt": "The list is", "max_tokens": 500}'
    with closing(socket.create_connection(("127.0.0.1", door.port))) as raw:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until(lambda: seen)
    until(lambda: door.engine.waiting == 0)
    hook.remove()
    assert len(seen) < 400
    assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=1).usage.total_tokens


def test_a_line_of_the_log_says_nothing_of_what_was_asked(door, client):
    client.completions.create(model="demo", prompt="a secret of mine", max_tokens=3)
    door.ask("/v1/a%0asecret%0apath", method="GET")
    until(lambda: "404" in door.lines[-1])
    assert "POST /v1/completions 200, " in door.lines[-2]
    assert " + 3 tokens, " in door.lines[-2]
    assert not any("\n" in line or "mine" in line for line in door.lines)


def test_a_failure_is_an_error_without_its_details(door, client, monkeypatch, caplog):
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a path of this machine")

    monkeypatch.setattr("quip.serve.engine.write", fail)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="demo", prompt="a")
    assert "the server failed; its log says why" in str(caught.value)
    with pytest.raises(openai.APIError, match="its log says why"):
        streamed(client.completions.create(model="demo", prompt="a", stream=True))
    assert "a path of this machine" in caplog.text


def test_a_model_without_a_template_says_how_to_chat(served):
    plain = replace(served, tokenizer=copy(served.tokenizer))
    plain.tokenizer.chat_template = None
    with serving(plain) as door:
        refusal = door.refusal(TALK, {"messages": MESSAGES})
    assert refusal.startswith("400: the model has no chat template: use /v1/completions, or start")


def test_the_models_own_sampling_is_what_is_done_where_nothing_is_said(served, monkeypatch):
    from quip.serve.requests import read_text

    def sampling(**words: object) -> object:
        body = json.dumps({"prompt": "a"} | words).encode()
        return served.asks(read_text(body))[0].sampling

    assert not sampling().draws
    assert sampling(top_p=0.5).temperature == 1
    monkeypatch.setattr(served.model.generation_config, "do_sample", True)
    monkeypatch.setattr(served.model.generation_config, "temperature", 0.3)
    assert sampling().temperature == 0.3
    assert sampling(temperature=0.7).temperature == 0.7
    assert not sampling(temperature=0, top_p=0.5).draws


def test_requests_computed_together_have_their_own_answers(demo, theirs):
    from quip.model.load import load_model
    from quip.serve.served import Served

    loaded = load_model(str(demo))
    prompts = ["The list is", "The module", "The name of the"] * 3
    expected = {prompt: theirs(prompt, 8) for prompt in prompts}
    served = Served("demo", loaded.model, loaded.tokenizer)
    with serving(served, continuous_batching=True) as door, door.client() as client:

        def ask(prompt: str) -> str:
            answer = client.completions.create(model="demo", prompt=prompt, max_tokens=8)
            return answer.choices[0].text

        with ThreadPoolExecutor(9) as pool:
            assert list(pool.map(ask, prompts)) == [expected[prompt] for prompt in prompts]
        words = {"model": "demo", "prompt": PROMPT, "max_tokens": 20}
        drawn = {client.completions.create(**words, temperature=1.5).choices[0].text for _ in "ab"}
        assert len(drawn) == 2
        stop = theirs(PROMPT, 20)[10:12]
        answer = client.completions.create(**words, stop=stop)
        assert answer.choices[0].text == theirs(PROMPT, 20).partition(stop)[0]
        with client.completions.create(**words | {"max_tokens": 500}, stream=True) as events:
            next(iter(events))
        until(lambda: door.engine.waiting == 0)
        without = "start the server without --continuous_batching"
        assert without in door.refusal(TEXT, {"prompt": "a", "logprobs": 1})
        assert without in door.refusal(TEXT, {"prompt": "a", "temperature": 1, "seed": 1})
        assert door.ask("/health", method="GET") == (200, {"status": "ok"})
