"""`quip serve MODEL`: an endpoint that OpenAI's clients talk to, by transformers' own server."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quip.cli.machine import device_flags
from quip.cli.parse import Arguments
from quip.cli.streams import complain, say
from quip.cli.values import place
from quip.errors import UsageError, shown
from quip.reading import read_text

if TYPE_CHECKING:
    from quip.serve.served import Served

HELP = "serve a model or checkpoint to clients of OpenAI's API"
EXAMPLES = """
quip serve demo --port 8000
quip serve runs/demo-2bit --api_key_file key.txt --host 0.0.0.0
quip serve runs/demo-2bit --lora terse=adapters/terse
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TEMPLATE_BYTES = 1 << 18
KEY_BYTES = 4096
MOST_PORT = 65535


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    parser.add_argument(
        "model",
        type=place,
        help="a checkpoint written by --save, or a model as `quip run` takes it; no other is "
        "loaded, whatever a request names",
    )
    _door_flags(parser.add_argument_group("who may ask"))
    _answer_flags(parser.add_argument_group("answers"))
    device_flags(parser.add_argument_group("machine"))
    parser.set_defaults(call=call)


def _door_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--host",
        default=LOOPBACK[0],
        metavar="HOST",
        help="where to listen (default 127.0.0.1: this machine alone); another one needs a key",
    )
    add("--port", type=int, default=8000, metavar="N", help="default 8000; 0 is any that is free")
    add(
        "--api_key",
        metavar="KEY",
        help="what clients have to send as their key; others on this machine can see it on the "
        "line, unlike --api_key_file or the environment's QUIP_API_KEY",
    )
    add("--api_key_file", type=Path, metavar="FILE", help="a file whose first line is the key")
    add(
        "--without_key",
        action="store_true",
        help="let anybody ask who reaches --host, where that is not this machine alone",
    )


def _answer_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter that peft saved, as a model of its own name; may be given several times",
    )
    add(
        "--chat_template",
        type=Path,
        metavar="FILE",
        help="a Jinja template of conversations, for a model without one or in place of its own",
    )
    add(
        "--continuous_batching",
        action="store_true",
        help="compute requests together, by transformers' continuous batching: more of them a "
        "second, without logprobs, seeds and adapters",
    )


def call(args: Arguments) -> None:
    """Check what can be checked, load the model, and answer until a signal says to end."""
    from quip.serve.server import build_app, check_installed, listen, run

    if not 0 <= args.port <= MOST_PORT:
        raise UsageError(f"--port {args.port}: from 0 to {MOST_PORT}")
    key, folders = _key(args), _adapters(args)
    check_installed()
    template = args.chat_template and read_text(args.chat_template, limit=TEMPLATE_BYTES)
    with listen(args.host, args.port) as found:
        served, adapters = _load(args, folders, template)
        app, engine = build_app(
            served,
            adapters=adapters,
            continuous_batching=args.continuous_batching,
            key=key,
            host=args.host,
            say=complain,
        )
        found.listen()  # who asks from here on waits, if only for a moment
        _announce(args, served, found.getsockname()[1], key)
        run(app, engine, found)


def _load(args: Arguments, folders: dict[str, Path], template: str | None) -> tuple["Served", Any]:
    from quip.model.device import choose_device
    from quip.model.load import load_model
    from quip.serve.adapters import check_adapter, load_adapters
    from quip.serve.served import Served

    device = choose_device(args.device)
    where = Path(args.model).expanduser()
    name = where.resolve().name if os.path.exists(where) else args.model
    if name in folders:
        raise UsageError(f"--lora {name}: the model itself has that name; choose another")
    for adapter, folder in folders.items():
        check_adapter(adapter, folder)
    loaded = load_model(args.model, dtype=args.dtype)
    if template is not None:
        loaded.tokenizer.chat_template = template
    model: Any = loaded.model  # to() hides behind a wrapper without a type
    model = model.to(device)
    adapters = load_adapters(model, folders) if folders else None
    return Served(name, model, loaded.tokenizer, tuple(folders)), adapters


def _key(args: Arguments) -> str | None:
    """The key that clients have to send. Raises UsageError for a door that is open by accident."""
    if args.api_key is not None and args.api_key_file is not None:
        raise UsageError("--api_key and --api_key_file both say the key: leave one out")
    key = args.api_key if args.api_key is not None else os.environ.get("QUIP_API_KEY")
    if args.api_key_file is not None:
        key = (read_text(args.api_key_file, limit=KEY_BYTES).splitlines() or [""])[0].strip()
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UsageError("the API key is empty, or holds more than printable ASCII: choose another")
    if key is None and args.host not in LOOPBACK and not args.without_key:
        raise UsageError(
            f"--host {shown(args.host)} lets others ask: give --api_key_file FILE, or say "
            "--without_key"
        )
    if key is not None and args.without_key:
        raise UsageError("--without_key speaks of no key, and there is one: leave one out")
    return key


def _adapters(args: Arguments) -> dict[str, Path]:
    """Folders by the names that they are served under."""
    found: dict[str, Path] = {}
    for word in args.lora:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--lora {shown(word)}: NAME=DIR is expected")
        if name in found:
            raise UsageError(f"--lora {name}: the name is given twice")
        found[name] = Path(place(folder)).expanduser()
    if found and args.continuous_batching:
        raise UsageError("--lora: adapters take turns, and --continuous_batching knows none")
    return found


def _announce(args: Arguments, served: "Served", port: int, key: str | None) -> None:
    from quip.serve.served import NO_TEMPLATE

    host = f"[{args.host}]" if ":" in args.host else args.host
    if key is None and args.host not in LOOPBACK:
        complain(f"quip: anybody who reaches {host} can use this model: it asks for no key")
    if not served.chats:
        complain(f"quip: no chat: {NO_TEMPLATE}")
    say(f"{', '.join(served.names)} at http://{host}:{port}/v1 (Ctrl-C ends)")
