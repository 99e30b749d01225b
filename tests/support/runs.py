"""Models and texts in files, small enough that a whole run takes a second."""

import random
from pathlib import Path

import torch

from tests.support.tiny import tiny
from tests.support.tokenizer import save_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_model(folder: Path, name: str = "opt", positions: int = 32, **parameters: float) -> str:
    """A tiny model with its tokenizer, one token a letter; `parameters` are filled with a value."""
    model = tiny(name, positions=positions)
    with torch.no_grad():
        for parameter, value in parameters.items():
            model.get_parameter(parameter.replace("__", ".")).fill_(value)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def write_text(path: Path, letters: int = 600) -> str:
    """A file of random letters, different ones for each name."""
    path.write_text("".join(random.Random(path.name).choices(LETTERS, k=letters)))
    return str(path)
