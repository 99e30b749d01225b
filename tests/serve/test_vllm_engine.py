"""Text from vLLM's engine and server: that of transformers, token by token."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

import quip
from tests.support.checkpoints import ROOT, fresh
from tests.support.engines import save_wide

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

PROMPT, MORE = [5, 6, 7, 8, 9], 12
KINDS = ("opt", "llama of stacks", "llama of trellis codes", "llama of learned codebooks", "mixed")
ASK = """
import json, os, sys
from vllm import LLM, SamplingParams

folders, eager = sys.argv[1].split(), sys.argv[2] == "eager"
prompt, more = map(json.loads, sys.argv[3:])
greedy = SamplingParams(temperature=0, max_tokens=more, ignore_eos=True)


def say(folder):  # an engine ends with its call, for there is one at a time
    llm = LLM(folder, dtype="float32", enforce_eager=eager, max_model_len=64, max_num_seqs=4)
    [answer] = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


print(json.dumps([say(folder) for folder in folders]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return [save_wide(root / str(i), kind) for i, kind in enumerate(KINDS)]


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
    """An engine of the process that asks for it, with little memory, and nothing compiled yet."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def spoken(folder: Path) -> list[int]:
    """What transformers says greedily."""
    model = quip.load(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=MORE, do_sample=False)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_greedy_text_is_that_of_transformers(how, folders):
    said = fresh(ASK, " ".join(map(str, folders)), how, json.dumps(PROMPT), MORE)
    assert dict(zip(KINDS, said, strict=True)) == dict(
        zip(KINDS, map(spoken, folders), strict=True)
    )


@pytest.fixture
def server(folders):
    """The address of vLLM's server with the Llama of stacks."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folders[1]), "--port"]
    words += [str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "64", "--served-model-name", "llama"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/health", process)
            yield address
        finally:
            process.terminate()


def wait_for(address: str, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise AssertionError("the server never answered")


def test_the_server_completes_as_transformers_does(server, folders):
    words = {"model": "llama", "prompt": PROMPT, "max_tokens": MORE, "temperature": 0}
    words |= {"ignore_eos": True, "return_token_ids": True}
    request = Request(
        f"{server}/v1/completions",
        data=json.dumps(words).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=120) as answer:
        [choice] = json.loads(answer.read())["choices"]
    assert choice["token_ids"] == spoken(folders[1])
