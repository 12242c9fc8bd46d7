"""Whether the Hugging Face hub can be reached, found out in seconds.

The hub's own client tries six times with growing pauses, which takes most of a minute on a machine without a
network and prints a line per attempt.
"""

from __future__ import annotations

import re

from megatron_amd.errors import InputError, first_line

PROBE_SECONDS = 5.0


def is_hub_name(name: str) -> bool:
    """`name` or `owner/name`, as the hub spells them."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None


def check_hub_reachable(name: str, setting: str) -> None:
    """Raise InputError when the hub, asked once, does not answer. Passes at once when HF_HUB_OFFLINE is set.

    Args:
        name: what is wanted from the hub.
        setting: the setting that names it, for the message.
    """
    import huggingface_hub

    quieten_hub()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception as error:  # the client's exceptions differ between versions (requests, then httpx)
        raise InputError(
            f"{setting}: {name!r} is no file or folder here, and the hub at {endpoint} cannot be reached "
            f"({first_line(error)}); give a local path, or set HF_HUB_OFFLINE=1 to use a copy downloaded before"
        ) from error


def quieten_hub() -> None:
    """No progress bars and no warnings from the hub's client."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
