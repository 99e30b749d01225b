"""`quip generate MODEL [PROMPT]`: text from a model or checkpoint, as it comes."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quip.cli.interrupts import INTERRUPTS
from quip.cli.machine import device_flags
from quip.cli.parse import Arguments, refuse_small
from quip.cli.streams import complain, say
from quip.cli.values import place, seed
from quip.errors import UsageError
from quip.serve.sampling import Sampling

if TYPE_CHECKING:
    from quip.serve.generate import Answer

    Message = dict[str, str]
    Ask = Callable[[str | list[Message]], Answer]

HELP = "write text with a model or checkpoint, or talk with it"
EXAMPLES = """
quip generate demo "The module" --max_new_tokens 20
quip generate demo "The module" --temperature 0.8 --top_p 0.9 --seed 1 --max_new_tokens 20
quip generate demo "The module" --max_new_tokens 20 --out answer.json
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    parser.add_argument(
        "model",
        type=place,
        help="a checkpoint written by --save, or a model as `quip run` takes it",
    )
    parser.add_argument(
        "prompt",
        type=str,  # of any length, and with a refusal of its own
        nargs="?",
        help="what to answer, or to continue where the model has no chat template; - or a pipe "
        "reads it from standard input, and without it on a terminal each line is answered: an "
        "empty line, Ctrl-D or Ctrl-C ends, and Ctrl-C during an answer stops that answer",
    )
    _text_flags(parser.add_argument_group("text"))
    _sampling_flags(parser.add_argument_group("choice of the next token"))
    group = parser.add_argument_group("machine and output")
    device_flags(group)
    group.add_argument(
        "--out",
        type=place,
        metavar="FILE",
        help="write the answer to one prompt, and what it took, there as JSON once it is complete",
    )
    group.add_argument("--overwrite", action="store_true", help="let --out be a file that exists")
    parser.set_defaults(call=call)


def _text_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--max_new_tokens",
        type=int,
        default=256,
        metavar="N",
        help="the longest answer (default 256); a stop token or the model's last position may end "
        "it before",
    )
    add("--system", metavar="TEXT", help="a system message, for the model's chat template")
    add("--no_chat", action="store_true", help="continue the prompt even where a model could chat")


def _sampling_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="draw from the model's distribution, sharper below 1 and flatter above (default 0: "
        "the likeliest token, whatever the model's generation_config says of sampling)",
    )
    add("--top_k", type=int, metavar="N", help="draw among the N likeliest tokens only")
    add(
        "--top_p",
        type=float,
        metavar="X",
        help="draw among the likeliest tokens only, whose probabilities sum to X",
    )
    add("--seed", type=seed, metavar="N", help="of drawing (default 0)")


def call(args: Arguments) -> None:
    """Check what can be checked, load the model, and answer one prompt or line after line."""
    refuse_small(args, max_new_tokens=1)
    sampling = _sampling(args)
    if args.no_chat and args.system is not None:
        raise UsageError("--system speaks of the chat template, which --no_chat leaves out")
    prompt, out = _prompt(args.prompt), args.out and Path(args.out)
    if out or args.overwrite:
        _check_out(out, prompt, overwrite=args.overwrite)

    import torch

    from quip.model.device import choose_device
    from quip.model.load import load_model
    from quip.serve.generate import generate

    device = choose_device(args.device)
    loaded = load_model(args.model, dtype=args.dtype)
    chat = bool(loaded.tokenizer.chat_template) and not args.no_chat
    if args.system is not None and not chat:
        raise UsageError(f"--system speaks of a chat template, and {args.model} has none")
    model: Any = loaded.model  # to() hides behind a wrapper without a type
    ask = partial(
        generate,
        model.to(device),
        loaded.tokenizer,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        rng=torch.Generator().manual_seed(args.seed or 0),
    )
    history = [] if args.system is None else [{"role": "system", "content": args.system}]
    if prompt is None:
        _converse(ask, history if chat else None)
    else:
        answer = ask([*history, _user(prompt)] if chat else prompt)
        _show(answer)
        if out:
            _write(out, args.model, prompt, answer)


def _check_out(out: Path | None, prompt: str | None, *, overwrite: bool) -> None:
    """Raise UsageError for a file that cannot be written, or that is not to be lost."""
    if out is None:
        raise UsageError("--overwrite speaks of a file: name it with --out FILE")
    if prompt is None:
        raise UsageError("--out holds the answer to one prompt: give it on the line")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: no file can be written there; name another")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: it exists; name another file or add --overwrite")


def _write(out: Path, model: str, prompt: str, answer: "Answer") -> None:
    from quip.files import replacing
    from quip.jobs.report.folder import as_json

    keys = ("text", "ended", "prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds")
    words = {"model": model, "prompt": prompt, **{key: getattr(answer, key) for key in keys}}
    with replacing(out) as partial_file:
        partial_file.write_text(as_json(words))


def _sampling(args: Arguments) -> Sampling:
    try:
        sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    except UsageError as error:
        raise UsageError(f"--{error}") from error
    if args.seed is not None and not sampling.draws:
        raise UsageError(
            f"--seed {args.seed} speaks of drawing at random: add a temperature above 0"
        )
    return sampling


def _prompt(given: str | None) -> str | None:
    """What to answer; None: lines from the terminal."""
    if given is None and sys.stdin.isatty():
        return None
    piped = given in (None, "-")
    text = _utf8(sys.stdin.read).removesuffix("\n") if piped else _utf8(partial(str, given))
    if not text.strip():
        raise UsageError("the prompt is empty: say what to answer or to continue")
    return text


def _utf8(read: Callable[[], str]) -> str:
    """The text that is read. Raises UsageError for bytes that are none."""
    try:
        text = read()
        text.encode()  # Python may keep bytes that are no characters as surrogates
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text: convert it first") from error
    return text


def _converse(ask: "Ask", history: "list[Message] | None") -> None:
    """Answer lines until one is empty; with a history (None: no chat), each sees those before."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  (arrows and past lines, for input())
    while line := _line():
        messages = None if history is None else [*history, _user(line)]
        answer = None
        try:
            answer = ask(line if messages is None else messages)
            _show(answer)
        except UsageError as error:  # too long, say: another line may be right
            complain(f"quip: {error}")
        except KeyboardInterrupt:
            INTERRUPTS.forget()
            complain("quip: this answer was stopped")
        if messages is not None and answer is not None and answer.text:
            history = [*messages, {"role": "assistant", "content": answer.text}]


def _line() -> str | None:
    try:
        return _utf8(partial(input, "> " if sys.stdout.isatty() else "")).strip() or None
    except (EOFError, KeyboardInterrupt):
        complain("")
        return None


def _user(text: str) -> "Message":
    return {"role": "user", "content": text}


def _show(answer: "Answer") -> None:
    """Text to standard output as it comes, what it took to the other."""
    try:
        for piece in answer:
            say(piece, end="")
    finally:
        say()
    complain(f"quip: {_words(answer)}")


def _words(answer: "Answer") -> str:
    parts = [_rate("prompt", answer.prompt_tokens, answer.prefill_seconds)]
    if answer.new_tokens > 1:  # the first came with the prompt
        parts.append(_rate("then", answer.new_tokens - 1, answer.decode_seconds))
    if answer.ended == "positions":
        parts.append("stopped at the model's last position")
    elif answer.ended == "max_new_tokens":
        parts.append(f"stopped at --max_new_tokens {answer.new_tokens}")
    return "; ".join(parts)


def _rate(name: str, tokens: int, seconds: float) -> str:
    return f"{name} {tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} a second)"
