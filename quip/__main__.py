"""`python -m quip COMMAND ...`, and the command `quip`."""

import sys


def main() -> int:
    """The command line, of which also the imports may be interrupted. Returns the exit status."""
    try:
        from quip.cli import main as command
    except KeyboardInterrupt:
        print("quip: interrupted", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
