"""Where the files of a model are, by the name that it is asked for with."""

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quip.data.reach import reach_hub
from quip.errors import Unavailable, how_to_install, short
from quip.reading import check_regular


@dataclass(frozen=True)
class Source:
    """Where a model's weights are, as from_pretrained is asked for them."""

    where: str  # a hub id or a folder
    gguf: str | None = None  # a file of that folder

    @property
    def keywords(self) -> dict[str, Any]:
        # Without the explicit False, transformers asks on the terminal.
        return {"gguf_file": self.gguf, "trust_remote_code": False}


def locate(name: str) -> Source:
    """Where the weights of a model are: a hub id, a folder, a .gguf file, or `demo`.

    Raises Unavailable for a name that is none of these, and for a file that nothing here reads.
    """
    path = Path(str(files("quip.model") / "demo")) if name == "demo" else Path(name).expanduser()
    check_regular(path)
    if os.path.isdir(path):  # which takes any name, where Path.is_dir raises for a long one
        if not (path / "config.json").is_file():
            raise Unavailable(
                f"{name}: no config.json in the folder {path}; "
                "give a folder written by save_pretrained, or a .gguf file"
            )
        return Source(str(path))
    is_file = os.path.isfile(path)
    if path.suffix == ".gguf" and is_file:
        missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
        if missing:
            raise Unavailable(
                f"{name}: GGUF files need the package {missing[0]}; "
                f"install it with: {how_to_install('gguf')}"
            )
        return Source(str(path.parent), path.name)
    if is_file:
        raise Unavailable(f"{name} is a file other than .gguf; give the folder it is in")
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
        raise Unavailable(
            f"{short(name)}: no such file or folder, and not of the form of a hub id; "
            "give a folder, a .gguf file, an id such as facebook/opt-125m, or `demo`"
        )
    reach_hub(name)
    return Source(name)
