"""The demo in 2 bits, with a chat template, behind a door."""

import pytest

import quip
from quip.model.load import load_model
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import save_checkpoint
from tests.support.checkpoints import QUIP
from tests.support.speaking import TEMPLATE
from tests.support.tiny import tokens


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A checkpoint of the demo whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("served") / "demo"
    loaded = load_model("demo")
    quantize_model(loaded.model, tokens(), QUIP, device="cpu", seed=0)
    loaded.tokenizer.chat_template = TEMPLATE
    save_checkpoint(loaded.model, loaded.tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def served(demo):
    from quip.serve.served import Served

    loaded = load_model(str(demo))
    return Served("demo", loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def door(served):
    """A server, whose threads end with the file's tests: others fork, and count threads."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from tests.support.serving import serving

    with serving(served) as door:
        yield door


@pytest.fixture(scope="module")
def client(door):
    return door.client()


@pytest.fixture(scope="session")
def theirs(served):
    """theirs(prompt, count): the text that transformers' generate() goes on with."""

    def write(prompt: str, count: int = 16, *, special: bool = True) -> str:
        ids = served.tokenizer(prompt, return_tensors="pt", add_special_tokens=special)
        out = served.model.generate(**ids, max_new_tokens=count, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        return served.tokenizer.decode(new, skip_special_tokens=True)

    return write


@pytest.fixture(scope="session")
def ours(served):
    """ours(prompt, seed): what quip.generate draws."""
    import torch

    def write(prompt: str, seed: int, count: int = 16, **sampling: float) -> str:
        rng = torch.Generator().manual_seed(seed)
        answer = quip.generate(
            served.model,
            served.tokenizer,
            prompt,
            max_new_tokens=count,
            sampling=quip.Sampling(**sampling),
            rng=rng,
        )
        return "".join(answer)

    return write
