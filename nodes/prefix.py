"""File name prefixes as ComfyUI's save nodes take them: with the date and time filled in."""

from __future__ import annotations

import re
from datetime import datetime

from ..sepme.errors import SepMEError

PARTS = ("year", "month", "day", "hour", "minute", "second")
_DATE = re.compile(r"yyyy|yyy|yy|y|MM?|dd?|hh?|mm?|ss?")  # as ComfyUI's page writes dates
_FIELDS = {"y": "year", "M": "month", "d": "day", "h": "hour", "m": "minute", "s": "second"}


def filled(prefix: str, now: datetime | None = None) -> str:
    """A prefix with ``%date:yyyy-MM-dd%``, ``%year%``, ``%month%``, ``%day%``, ``%hour%``, ``%minute%``, ``%second%`` filled in.

    Raises:
        SepMEError: it asks for something else, such as another node's value.
    """
    if re.search("[\ud800-\udfff]", prefix):
        raise SepMEError("The prefix holds half a character, which is not valid text; type it again.")
    time = now or datetime.now()

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("date:"):
            return _DATE.sub(lambda part: _part(part[0], time), name[5:])
        if name in PARTS:
            return f"{getattr(time, name):02d}"
        raise SepMEError(
            f"The prefix asks for {match[0][:60]!r}, which cannot be filled in here; use %date:yyyy-MM-dd%, "
            f"{', '.join(f'%{part}%' for part in PARTS)} or plain text."
        )

    return re.sub(r"%([A-Za-z][^%/\\]*)%", value, prefix)


def _part(letters: str, time: datetime) -> str:
    number: int = getattr(time, _FIELDS[letters[0]])
    return f"{number % 100:02d}" if letters == "yy" else str(number).rjust(len(letters), "0")
