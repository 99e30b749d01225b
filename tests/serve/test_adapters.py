"""Adapters beside a checkpoint, each behind its own name: what peft computes, and nothing left."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

import quip
from quip.errors import QuipError
from quip.serve.adapters import check_adapter, load_adapters
from quip.serve.generate import generate
from tests.support.checkpoints import quantized, save
from tests.support.tiny import logits

peft = pytest.importorskip("peft")

from quip.packed.peft import register  # noqa: E402

PROMPT = "abcab"


def adapt(folder: Path, out: Path, seed: int, **options: object) -> Path:
    """An adapter of random matrices, in a folder."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": r".*\.(q_proj|down_proj)", "init_lora_weights": False}
    model = peft.get_peft_model(quip.load(folder), register(peft.LoraConfig(**config | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(seed), std=0.5)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with adapters beside it; its q, k and v are one stack of lattice codes."""
    base = tmp_path_factory.mktemp("adapters")
    found = save(quantized("llama", {"codebook": "E8P12"}, blocks=2), base / "model")
    adapt(found, base / "terse", 1)
    adapt(found, base / "other", 2)
    return found


def alone(folder: Path, name: str):
    """The model with one adapter, as peft reads it."""
    where = folder.parent / name
    config = register(peft.LoraConfig.from_pretrained(where))
    return peft.PeftModel.from_pretrained(quip.load(folder), where, config=config)


def test_each_adapter_computes_what_peft_computes_with_it_alone(folder):
    model = quip.load(folder)
    before = logits(model)
    names = ("terse", "other")
    adapters = load_adapters(model, {name: folder.parent / name for name in names})
    assert adapters.names == names
    for name in (*names, None, "terse", None):
        with adapters.active(name):
            expected = before if name is None else logits(alone(folder, name))
            assert torch.equal(logits(model), expected)
            assert name is None or not torch.allclose(expected, before, atol=1e-2)
    assert not any(x.requires_grad for x in model.parameters())


def test_an_adapter_is_served_under_its_own_name(folder):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from quip.serve.served import Served
    from tests.support.serving import serving

    model, tokenizer = quip.load(folder), quip.packed.checkpoint.read_tokenizer(str(folder))
    names = ("terse", "other")
    adapters = load_adapters(model, {name: folder.parent / name for name in names})
    expected = {"base": "".join(generate(quip.load(folder), tokenizer, PROMPT, max_new_tokens=9))}
    for name in names:
        base = alone(folder, name).get_base_model()
        expected[name] = "".join(generate(base, tokenizer, PROMPT, max_new_tokens=9))
    assert len(set(expected.values())) == 3
    served = Served("base", model, tokenizer, names)
    with serving(served, adapters=adapters) as door, door.client() as client:
        assert [x.id for x in client.models.list()] == ["base", *names]

        async def ask(name: str) -> str:
            words = {"model": name, "prompt": PROMPT, "max_tokens": 9}
            answer = await asyncio.to_thread(client.completions.create, **words)
            assert answer.model == name
            return answer.choices[0].text

        async def ask_all(asked: list[str]) -> list[str]:
            return await asyncio.gather(*map(ask, asked))

        asked = ["terse", "base", "other", "base", "terse", "other"]
        assert asyncio.run(ask_all(asked)) == [expected[name] for name in asked]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_config.json": None}, "has no adapter_config.json; name a folder that peft's"),
        ({"adapter_config.json": b"{"}, "is damaged"),
        ({"adapter_config.json": b'{"peft_type": "IA3"}'}, "holds 'IA3', not LORA"),
        ({"adapter_model.safetensors": None}, "has no adapter_model.safetensors"),
        ({"adapter_model.safetensors": b"no"}, "does not fit the model"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line(folder, tmp_path, change, message):
    for source in (folder.parent / "terse").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    for name, content in change.items():
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)

    def load() -> None:
        check_adapter("x", tmp_path)
        load_adapters(quip.load(folder), {"x": tmp_path})

    with pytest.raises(QuipError) as caught:
        load()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    other = adapt(folder, tmp_path / "wide", 3, r=8)
    config = json.loads((other / "adapter_config.json").read_text())
    for words in ({"r": 4}, {"target_modules": ["q_proj", "o_proj"]}, {"target_modules": ["z"]}):
        (other / "adapter_config.json").write_text(json.dumps(config | words))
        with pytest.raises(QuipError, match="does not fit the model") as caught:
            load_adapters(quip.load(folder), {"x": other})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.b", "a/b", "../a", "", "a" * 101, "a b"])
def test_a_name_that_cannot_be_one_is_refused(name, tmp_path):
    with pytest.raises(QuipError, match="a name has letters, digits"):
        check_adapter(name, tmp_path)
