"""lm-eval kept to itself: what it logs, prints, draws and forks."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def quiet(progress: bool) -> Iterator[list[str]]:
    """Keep what lm-eval logs, and what it prints or draws unless progress is asked for, to itself.

    Yields its warnings. Bootstraps stay in this process: lm-eval would fork one for every core.
    """
    logger, handler = logging.getLogger("lm_eval"), _Lines()
    level, propagate = logger.level, logger.propagate
    with ExitStack() as stack:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        if "DISABLE_MULTIPROC" not in os.environ:
            os.environ["DISABLE_MULTIPROC"] = "1"
            stack.callback(os.environ.pop, "DISABLE_MULTIPROC")
        stack.callback(random.setstate, random.getstate())  # lm-eval draws names from it
        stack.callback(logger.removeHandler, handler)
        stack.callback(logger.setLevel, level)
        stack.callback(setattr, logger, "propagate", propagate)
        stack.enter_context(redirect_stdout(StringIO()))
        if not progress:
            stack.enter_context(redirect_stderr(StringIO()))
        yield handler.lines
