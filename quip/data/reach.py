"""Whether the hub answers: asked once, for seconds; where it does not, only what is cached counts.

Left to itself, the hub's client tries each of a model's or data set's files again and again, and is
silent for minutes where packets vanish.
"""

import logging
import sys
import time
from threading import Thread

from huggingface_hub import constants
from huggingface_hub.utils import get_session

log = logging.getLogger(__name__)

SECONDS = 6.0  # to answer in, however many names and redirects are looked up
SILENCE = 1.0  # after which is said what is waited for
ANSWERED: dict[str, bool] = {}  # by endpoint, of those that were asked


def reach_hub(what: str) -> None:
    """Ask the hub, about to be asked for `what`, whether it answers; go offline if it does not.

    Offline is what HF_HUB_OFFLINE=1 means, for this process: what is cached is found at once, and
    the rest refused at once.
    """
    if constants.HF_HUB_OFFLINE:
        return
    if constants.ENDPOINT not in ANSWERED:
        ANSWERED[constants.ENDPOINT] = _answers(what)
    if not ANSWERED[constants.ENDPOINT]:
        _go_offline()


def _answers(what: str) -> bool:
    answers: list[object] = []
    start = time.monotonic()
    # In a thread, since no timeout of the client's ends a look-up of a name.
    asking = Thread(target=lambda: answers.append(_ask()), daemon=True)
    log.info("asking %s for %s", constants.ENDPOINT, what)
    asking.start()
    asking.join(SILENCE)
    if asking.is_alive():
        log.warning("waiting for %s to answer (%s)", constants.ENDPOINT, what)
        asking.join(SECONDS - SILENCE)
    found = answers == [True]
    if not found:
        log.warning(
            "%s does not answer (asked for %.1f s): going on with what is cached on this machine",
            constants.ENDPOINT,
            time.monotonic() - start,
        )
    return found


def _ask() -> bool:
    """Whether anything comes back, be it a refusal."""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of a library that has changed its client, and so its errors, before
        return False
    return True


def _go_offline() -> None:
    constants.HF_HUB_OFFLINE = True
    if config := sys.modules.get("datasets.config"):  # otherwise it will read the line above
        vars(config).update(HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True)
