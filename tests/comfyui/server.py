"""A real ComfyUI server with this checkout as a custom node, and a client that speaks to it as a user's browser does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comfyui.environment import comfyui
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
QUIET = 60  # seconds in which a server that is alive says something while it starts
SILENCE = 150  # seconds in which a node that runs shows progress
Prompt = dict[str, dict[str, Any]]


@dataclass
class Run:
    """What became of a queued prompt.

    Attributes:
        images: of output nodes, by node id, uint8 arrays. executed: ids of nodes that ran (not cached). cached: those that did not.
        error: the execution error or the refusal, as the front end gets it; None when all went well. events: all messages.
    """

    prompt_id: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    error: Any = None
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0

    @property
    def message(self) -> str:
        """The error in the words that the user sees."""
        if self.error is None:
            return ""
        return str(self.error.get("exception_message") or json.dumps(self.error))


class Server:
    """``main.py --cpu`` in a folder of its own: ``base`` holds models, custom_nodes, input and output.

    Args:
        pack: folder of the custom node, linked. without: packages that this server cannot import.
        paths: what stands in an extra_model_paths.yaml.

    A server that is gone, or that does not answer any more, fails every later call at once, with the end of its log.
    """

    def __init__(self, base: Path, pack: Path = ROOT, without: tuple[str, ...] = (), paths: str = "") -> None:
        self.base, self.port, self.broken = base, _free_port(), ""
        for name in ("models/checkpoints", "models/loras", "models/controlnet", "custom_nodes", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "comfyui-sepme").symlink_to(pack)
        (base / "python").mkdir()
        (base / "python" / "sitecustomize.py").write_text(f"import sys\nfor name in {without!r}: sys.modules[name] = None\n")
        self.log = base / "server.log"
        more = os.environ.get("SEPME_COMFYUI_PACKAGES")  # packages that only another version of ComfyUI needs
        path = os.pathsep.join([str(base / "python"), *([more] if more else [])])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--disable-api-nodes", "--base-directory", str(base)]
        command += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
        if paths:
            (base / "paths.yaml").write_text(paths, encoding="utf-8")
            command += ["--extra-model-paths-config", str(base / "paths.yaml")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=comfyui(), env=env, stdout=log, stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self) -> None:
        size, heard = 0, time.monotonic()
        while self.process.poll() is None and time.monotonic() - heard < QUIET:
            if (now := self.log.stat().st_size) != size:
                size, heard = now, time.monotonic()
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout=5)
                return
            time.sleep(0.1)
        self.stop()
        raise self._failure("ComfyUI did not start")

    def _failure(self, what: str) -> RuntimeError:
        self.broken = f"{what}:\n{self.log.read_text(errors='replace')[-4000:]}"
        return RuntimeError(self.broken)

    def check(self) -> None:
        """Raise a :class:`RuntimeError` unless the server answers and its queue is worked off."""
        if self.broken:
            raise RuntimeError(self.broken)
        if self.process.poll() is not None:
            raise self._failure("ComfyUI is gone")
        if re.search(rb"Exception in thread .*prompt_worker", self.log.read_bytes()):
            raise self._failure("ComfyUI's queue is not worked off any more")
        try:
            self.get("/queue", timeout=30)
        except OSError:
            raise self._failure("ComfyUI does not answer") from None

    def silent(self) -> RuntimeError:
        """What to raise when a prompt has run for minutes without a message."""
        return self._failure("ComfyUI has not said anything for minutes")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, timeout: float = 60) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            data = answer.read()
        return json.loads(data) if "json" in answer.headers.get("Content-Type", "") else data

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def run(self, prompt: Prompt, workflow: dict[str, Any] | None = None, on_event: Callable[[dict[str, Any]], None] | None = None) -> Run:
        """Queue a prompt in API format and wait until it is done."""
        import asyncio

        self.check()
        return asyncio.run(self._run(prompt, workflow, on_event))

    async def _run(self, prompt: Prompt, workflow: dict[str, Any] | None, on_event: Callable[[dict[str, Any]], None] | None) -> Run:
        import aiohttp

        client, run = uuid.uuid4().hex, Run()
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as ws:
            extra = {"extra_pnginfo": {"workflow": workflow}} if workflow is not None else {}
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client, "extra_data": extra}) as answer:
                body = await answer.json()
                if answer.status != 200:
                    run.error = body
                    return run
                run.prompt_id = body["prompt_id"]
            while True:
                message = await self._message(ws)
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.previews += 1
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    raise self._failure("ComfyUI went away")
                event = json.loads(message.data)
                if event.get("data", {}).get("prompt_id", run.prompt_id) != run.prompt_id:
                    continue
                run.events.append(event)
                if on_event is not None:
                    on_event(event)
                kind, data = event["type"], event.get("data", {})
                if kind == "execution_cached":
                    run.cached = [str(n) for n in data["nodes"]]
                elif kind == "executing" and data.get("node") is not None:
                    run.executed.append(str(data["node"]))
                elif kind in ("execution_error", "execution_interrupted"):
                    run.error = data | {"type": kind}
                    break
                elif kind == "execution_success" or (kind == "executing" and data.get("node") is None):
                    break
        self._collect(run)
        return run

    async def _message(self, ws: Any) -> Any:
        import asyncio

        for _ in range(SILENCE // 5):
            with contextlib.suppress(asyncio.TimeoutError):
                return await ws.receive(timeout=5)
            self.check()
        raise self.silent()

    def _collect(self, run: Run) -> None:
        for _ in range(100):  # the history is written a moment after the last message
            history = self.get(f"/history/{run.prompt_id}")
            if history:
                break
            time.sleep(0.02)
        run.outputs = history[run.prompt_id]["outputs"] if history else {}
        for node, output in run.outputs.items():
            for image in output.get("images", []):
                run.images.setdefault(node, []).append(np.asarray(Image.open(io.BytesIO(self.view(image))).convert("RGB")))

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of an output file."""
        data: bytes = self.get(f"/view?{urllib.parse.urlencode({k: image[k] for k in ('filename', 'subfolder', 'type')})}")
        return data

    def memory(self) -> int:
        """Resident bytes of the server."""
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def serving(base: Path, **options: Any) -> Iterator[Server]:
    server = Server(base, **options)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(base, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
