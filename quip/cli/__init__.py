"""The command line: `quip COMMAND ...`, one command a file."""

import sys
from collections.abc import Sequence
from functools import partial
from textwrap import indent

from quip.cli import (
    evaluate,
    export,
    finetune,
    generate,
    hessians,
    import_compressed_tensors,
    import_exl3,
    import_gptq,
    import_quip_sharp,
    inspect,
    plan,
    proxy,
    ranks,
    recipes,
    run,
    serve,
    summary,
    table,
)
from quip.cli.parse import Parser, Version, guarded
from quip.cli.theory import claims, counterexample, equivalence

COMMANDS = {
    "run": run,
    "plan": plan,
    "hessians": hessians,
    "proxy": proxy,
    "summary": summary,
    "counterexample": counterexample,
    "equivalence": equivalence,
    "theory": claims,
    "table": table,
    "finetune": finetune,
    "evaluate": evaluate,
    "generate": generate,
    "serve": serve,
    "inspect": inspect,
    "export": export,
    "import-quip-sharp": import_quip_sharp,
    "import-exl3": import_exl3,
    "import-gptq": import_gptq,
    "import-compressed-tensors": import_compressed_tensors,
    "recipes": recipes,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `quip` command. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and (command := COMMANDS.get(words[0])):
        return guarded(parser_of(words[0]), words[1:])
    parser = Parser(
        prog="quip",
        description="Compress language models to 2, 3 and 4 bits per weight.",
        epilog="`quip COMMAND --help` explains a command, its flags, and shows examples.",
    )
    parser.add_argument("--version", action=Version, help="print the version and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.HELP)
    return guarded(parser, words or ["--help"])


def parser_of(name: str) -> Parser:
    """The parser of one command, whose help ends with examples."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"quip {name}",
        usage=getattr(command, "USAGE", None),
        description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
        epilog=f"examples:\n{indent(command.EXAMPLES.strip(), '  ')}",
    )
    command.build(parser)
    if not ranks.can_share(name):
        parser.set_defaults(call=partial(ranks.refuse, name))
    return parser
