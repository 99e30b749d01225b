"""The command line: `quip COMMAND ...`, one command a file."""

from collections.abc import Sequence

from quip.cli import (
    counterexample,
    equivalence,
    evaluate,
    export,
    finetune,
    hessians,
    import_quip_sharp,
    inspect,
    proxy,
    recipes,
    run,
    summary,
    table,
    theory,
)
from quip.cli.door import Parser, guarded

COMMANDS = {
    "run": run,
    "hessians": hessians,
    "proxy": proxy,
    "summary": summary,
    "counterexample": counterexample,
    "equivalence": equivalence,
    "theory": theory,
    "table": table,
    "finetune": finetune,
    "evaluate": evaluate,
    "inspect": inspect,
    "export": export,
    "import-quip-sharp": import_quip_sharp,
    "recipes": recipes,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `quip` command. Returns the exit status."""
    parser = Parser(
        prog="quip", description="Compress language models to 2, 3 and 4 bits per weight."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.build(commands.add_parser(name, help=command.SUMMARY))
    return guarded(parser, argv, commands=1)
