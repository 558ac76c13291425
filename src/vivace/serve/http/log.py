"""The server's log: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
import time


class Lines(logging.Formatter):
    """A record as a line of JSON: time, level, logger, message, the facts given as `extra={"facts": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str = "info") -> None:
    """Send the process's log to stderr as lines of JSON; uvicorn's own lines about requests are ours already."""
    # Not above: whoever starts a server first says that diffusers shall run no code of models.
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for library in (diffusers_log, transformers_log):  # they bring a handler of their own, and progress bars
        library.disable_progress_bar()
        library.disable_default_handler()
        library.enable_propagation()
    for name in ("vivace", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
