"""One small file of a hub model, fetched in one try, so that a wrong name is told at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vivace.errors import InputError, first_line


def fetch(model: str, file: str) -> Path:
    """A file of the hub model `owner/name`, from the hub or, where that does not answer, from its cache.

    Raises InputError that says why there is none.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    known = {
        errors.GatedRepoError: "it is gated: accept its terms on the hub and log in there first",
        errors.RepositoryNotFoundError: "the hub has no model of that name that you may read",
        errors.EntryNotFoundError: f"it has no {file}",
        errors.OfflineModeIsEnabled: "the hub is switched off here, and it was never fetched",
    }
    with _silent():
        try:
            if not isinstance(try_to_load_from_cache(model, file), str):
                # The download would ask a hub that does not answer for half a minute; this asks it once.
                get_hf_file_metadata(hf_hub_url(model, file))
            return Path(hf_hub_download(model, file))
        except Exception as error:  # of the hub's own kinds, or of the HTTP library's that it happens to use
            reason = next((text for kind, text in known.items() if isinstance(error, kind)), None)
            raise InputError(reason or f"the hub does not answer: {first_line(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """The hub's library notes every try; what came of them is told once, by us."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
