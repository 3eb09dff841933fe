"""What the page asks of the server, under ``/sepme``.

| route | does |
|---|---|
| ``GET /sepme/deltas`` | ``{"deltas": [facts]}``: every delta in models/sepme, one that several files hold once, with their names |
| ``POST /sepme/deltas?name=N&replace=true`` | installs the body as N; 409 if another file has the name, unless told to replace it |
| ``DELETE /sepme/deltas?name=N&content_hash=H`` | deletes N if it is the delta with this hash |
| ``POST /sepme/deltas/rename`` | ``{"from": N, "to": M}``; 409 if M is taken |
| ``GET /sepme/deltas/record?name=N&embed=true`` | ``{hash: record}``: what a workflow keeps of a delta, the file itself included if asked |
| ``GET /sepme/deltas/thumbnail?name=N`` | the small picture of N; 404 where it has none |
| ``GET /sepme/presets`` | ``{"presets": [{"title", "whole", "concepts": [{"name", "prompts", "anchor"}]}]}``: lists to choose from |
| ``POST /sepme/book`` | ``{"book": text}``: names in a concept book |
| ``GET /sepme/architecture?checkpoint=N`` | ``{"architecture": A, "fits": [A, B]}`` of a checkpoint and of deltas that fit it |

Errors are ``{"error": sentence}``. Requests from pages of other origins get 403, bodies over the limit 413.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any

from aiohttp import web

from ..sepme.concepts import MAX_BOOK_BYTES, Concept, ConceptBook
from ..sepme.delta.concept_delta import ConceptDelta
from ..sepme.delta.format import MAX_FILE
from ..sepme.errors import SepMEError
from ..sepme.presets import presets
from . import host, workflow
from .facts import thumbnail_of
from .library import Absent, Library, Taken, TooLarge

Handler = Callable[[web.Request], Awaitable[Any]]
STATUS: dict[type[SepMEError], int] = {Taken: 409, Absent: 404, TooLarge: 413}
MAX_JSON = 2 * MAX_BOOK_BYTES

library = Library(host.delta_library)
installing = asyncio.Semaphore(2)  # files of a gigabyte are checked in memory


class CrossOrigin(SepMEError):
    """A request from another origin's page."""


def check_origin(request: web.Request) -> None:
    """Refuse what a page of another origin sends: browsers say so themselves, older or insecure ones name the origin.

    Raises:
        CrossOrigin: it is one.
    """
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    own = (None, f"http://{request.host}", f"https://{request.host}")
    same = site in ("same-origin", "none") if site is not None else origin in own
    if not same:
        raise CrossOrigin("Only ComfyUI's own page may ask this.")


def route(handler: Handler) -> Handler:
    """A handler whose result is sent as JSON and whose errors are sentences."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.Response:
        try:
            check_origin(request)
            answer = await handler(request)
            return answer if isinstance(answer, web.Response) else web.json_response(answer, headers={"Cache-Control": "no-store"})
        except CrossOrigin as error:
            return web.json_response({"error": str(error)}, status=403)
        except SepMEError as error:
            return web.json_response({"error": str(error)}, status=STATUS.get(type(error), 400))

    return answer


async def pieces(request: web.Request, limit: int) -> AsyncIterator[bytes]:
    """The body, piece by piece, up to a limit.

    Raises:
        TooLarge: it is, or says that it is, larger.
        SepMEError: it does not arrive whole.
    """
    size = request.content_length or 0
    if size <= limit:
        size = 0
        try:
            async for piece in request.content.iter_chunked(1 << 16):
                size += len(piece)
                if size > limit:
                    break
                yield piece
        except web.RequestPayloadError:
            raise SepMEError("The request was cut short or is damaged; send it again.") from None
    if size > limit:
        raise TooLarge(f"The request has more than {limit >> 10} kB; this is no file or book of SepME.")


async def body(request: web.Request) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SepMEError: it is none. TooLarge.
    """
    if request.content_type != "application/json":
        raise SepMEError("The request is no JSON.")
    raw = b"".join([piece async for piece in pieces(request, MAX_JSON)])
    try:
        data = json.loads(raw, parse_constant=_no_json)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise SepMEError("The request is no JSON object.")
    return data


def _no_json(constant: str) -> None:
    """``NaN`` and ``Infinity``, which Python reads and JSON does not know."""
    raise ValueError(constant)


@route
async def list_deltas(request: web.Request) -> Any:
    """``GET``: facts of all deltas of the library."""
    return {"deltas": await asyncio.to_thread(library.list)}


@route
async def install(request: web.Request) -> Any:
    """``POST``: put the delta in the body into the library, as ``name``; over another one only with ``replace=true``."""
    if request.content_type != "application/octet-stream":
        raise SepMEError("Send the file as application/octet-stream.")
    async with installing:
        replace = request.query.get("replace") == "true"
        return await library.receive(request.query.get("name"), pieces(request, MAX_FILE), replace)


@route
async def delete(request: web.Request) -> Any:
    """``DELETE``: delete the delta ``name`` if its content hash is still the one that is given."""
    return {"deleted": await asyncio.to_thread(library.delete, request.query.get("name"), request.query.get("content_hash"))}


@route
async def rename(request: web.Request) -> Any:
    """``POST {from, to}``: rename a delta."""
    data = await body(request)
    return await asyncio.to_thread(library.rename, data.get("from"), data.get("to"))


@route
async def record(request: web.Request) -> Any:
    """``GET``: what a workflow stores of the delta ``name``; with ``embed=true`` the file itself too."""
    entry = await asyncio.to_thread(library.get, request.query.get("name"))
    delta = await asyncio.to_thread(ConceptDelta.load, entry.path)
    return {delta.content_hash(): workflow.record(delta, entry.name, request.query.get("embed") == "true")}


@route
async def thumbnail(request: web.Request) -> Any:
    """``GET``: the small picture of the delta ``name``, as its header has it."""
    entry = await asyncio.to_thread(library.get, request.query.get("name"))
    shown = await asyncio.to_thread(thumbnail_of, entry)
    if shown is None:
        raise Absent(f"The delta {entry.name!r} has no picture.")
    return web.Response(body=shown.data, content_type=shown.kind, headers={"X-Content-Type-Options": "nosniff"})


@route
async def book(request: web.Request) -> Any:
    """``POST {book}``: the concepts of a book written as YAML or JSON."""
    text = (await body(request)).get("book")
    if not isinstance(text, str):
        raise SepMEError("The book is missing.")
    parsed = await asyncio.to_thread(ConceptBook.loads, text)
    return {"concepts": [{"name": c.name, "prompts": c.prompts, "anchor": c.anchor} for c in parsed.concepts]}


@route
async def list_presets(request: web.Request) -> Any:
    return {
        "presets": [
            {"title": p.title, "whole": p.whole, "concepts": [_row(c) for c in p.book.concepts]} for p in await asyncio.to_thread(presets)
        ]
    }


def _row(concept: Concept) -> dict[str, Any]:
    """A concept as a row of SepME Erase: prompts only where they are more than its name in the usual phrases."""
    own = concept.prompts != Concept(concept.name).prompts
    return {"name": concept.name, "anchor": concept.anchor} | ({"prompts": concept.prompts} if own else {})


@route
async def architecture(request: web.Request) -> Any:
    """``GET``: architectures whose deltas fit ``checkpoint``."""
    found = await asyncio.to_thread(host.architectures_of, request.query.get("checkpoint", ""))
    return {"architecture": found[0], "fits": found}


def register() -> None:
    """Add the routes to ComfyUI's server, if one runs."""
    table = host.web_routes()
    if table is None:
        return
    table.get("/sepme/deltas")(list_deltas)
    table.post("/sepme/deltas")(install)
    table.delete("/sepme/deltas")(delete)
    table.post("/sepme/deltas/rename")(rename)
    table.get("/sepme/deltas/record")(record)
    table.get("/sepme/deltas/thumbnail")(thumbnail)
    table.get("/sepme/presets")(list_presets)
    table.post("/sepme/book")(book)
    table.get("/sepme/architecture")(architecture)
