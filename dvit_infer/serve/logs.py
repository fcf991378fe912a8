"""Structured logs: one JSON object a line on stderr."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

FIELDS = "fields"  # of a record: a dict whose items stand in its line
log = logging.getLogger("dvit.serve")
requests_log = logging.getLogger("dvit.serve.requests")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextlib.contextmanager
def json_logs(requests: bool) -> Iterator[None]:
    """Send the logs of this process, warnings of Python included, to stderr as JSON, with or without each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    requests_log.setLevel(logging.INFO if requests else logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(before)
        root.removeHandler(handler)
