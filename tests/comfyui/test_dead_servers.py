"""Servers that do not come up, die or fall silent are said at once, with the end of their log; nothing waits for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from comfyui import server as servers
from comfyui.server import Server

ANSWERING = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
print("starting", flush=True)
web = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
threading.Thread(target=web.serve_forever).start()
"""
QUEUE = """
import threading
def prompt_worker(): "\\ud800".encode()
thread = threading.Thread(target=prompt_worker); thread.start(); thread.join()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Server]:
    """``start(text)``: a server whose main.py is this."""

    def build(text: str) -> Server:
        (tmp_path / "main.py").write_text(text, encoding="utf-8")
        monkeypatch.setenv("SEPME_COMFYUI", str(tmp_path))
        monkeypatch.setattr(servers, "QUIET", 2)
        return Server(tmp_path / "base")

    return build


@pytest.mark.parametrize("main", ["print('a', 'reason', flush=True); import time; time.sleep(99)", "raise ValueError('a reason')"])
def test_one_that_does_not_come_up(start: Callable[[str], Server], main: str) -> None:
    with pytest.raises(RuntimeError, match=r"did not start:\n(.*\n)*.*a reason"):
        start(main)


def test_one_whose_queue_is_not_worked_off(start: Callable[[str], Server]) -> None:
    server = start(QUEUE + ANSWERING)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"queue is not worked off(.*\n)*.*UnicodeEncodeError"):
                server.run({})
    finally:
        server.stop()


def test_one_that_went_away(start: Callable[[str], Server]) -> None:
    server = start(ANSWERING)
    server.check()
    server.stop()
    with pytest.raises(RuntimeError, match=r"is gone:\nstarting"):
        server.run({})
