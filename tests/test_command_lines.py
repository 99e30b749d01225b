"""Every command line of the documents runs, with a tiny model and text in place of its own."""

import re
import shlex
from pathlib import Path

import pytest

from quip.cli import COMMANDS
from quip.cli.parse import Parser
from tests.support.runs import save_model, write_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("README.md", "commands.md", "usage.md")  # the others' lines hold places to fill in
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?:python -m quip\.run|quip run|quip) [^\n]+", re.MULTILINE)
# What stands for what needs a download or minutes.
MODELS = ("demo", "facebook/opt-125m", "meta-llama/Llama-2-7b-hf", "model.gguf")
MODELS += ("mistralai/Mixtral-8x7B-v0.1",)
TINY = dict.fromkeys(MODELS, "tiny") | dict.fromkeys(("pydoc", "c4"), "train.txt")
# These need rows of 32, 64 or 128 weights, or another tokenizer: test_cli_quip_sharp.py,
# test_cli_exl3.py and test_cli_exchange.py run them.
WIDE = {"--quip-sharp", "import-quip-sharp", "import-exl3"}
WIDE |= {"--gguf", "import-gptq", "import-compressed-tensors"}
WIDE |= {"serve"}  # which ends when it is told to: test_cli_serve.py
WIDE |= {"--all_experts"}  # of a mixture of experts: test_mixtures.py
# Appended where the command has the flag: the last one counts.
SMALL = {
    "--nsamples": "4",
    "--seqlen": "12",
    "--eval_nsamples": "2",
    "--eval_datasets": "test.txt",
    "--limit": "2",
    "--agreement": "2",
    "--device": "cpu",
    "--n": "16",
    "--samples": "2",
}
FEW = {
    "counterexample": {"--n": "16,32"},
    "generate": {"--max_new_tokens": "8"},
    "plan": {"--bits": "4"},  # small matrices take more beside their codes
    "proxy": {"--quant": "ldlq", "--layers": "layers.0.*.q_proj"},
    "table": {"--rows": "QuIP", "--columns": "2 bits", "--dataset": "train.txt"},
    "theory": {"--only": "theorem1", "--rows": "1000"},
}


def lines(path: Path) -> list[list[str]]:
    """The words of each line, from the name of the command on."""
    found = []
    for language, block in FENCE.findall(path.read_text()):
        for line in () if language else LINE.findall(block):
            words = shlex.split(line, comments=True)
            found.append(["run", *words[3:]] if words[0] == "python" else words[1:])
    return found


def parser(command: str) -> Parser:
    made = Parser()
    COMMANDS[command].build(made)
    return made


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_is_one(path):
    for command, *words in lines(path):
        parser(command).parse_args(words)


@pytest.mark.parametrize("name", RUN)
def test_every_command_line_runs(quip, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "tiny", "llama", positions=512)
    for text in ("train.txt", "test.txt"):
        write_text(tmp_path / text)
    for command, *words in lines(ROOT / name if name == "README.md" else ROOT / "docs" / name):
        if WIDE & {command, *words}:
            continue
        words = [TINY.get(word, word) for word in words]
        known = parser(command)._option_string_actions
        small = SMALL | FEW.get(command, {})
        if "--hessians" in words:  # that calibrates nothing
            small = {flag: value for flag, value in small.items() if flag != "--nsamples"}
        for flag, of in (("--limit", "--tasks"), ("--agreement", "--reference")):
            if of not in words:
                small = {name: value for name, value in small.items() if name != flag}
        extra = [word for flag, value in small.items() if flag in known for word in (flag, value)]
        status, _, err = quip(command, *words, *extra)
        assert status == 0, (command, words, err[-1:])
