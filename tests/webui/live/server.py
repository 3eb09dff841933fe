"""A WebUI as its user starts it, on the loopback, with a data folder of its own; and its API."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUIET = (
    "--skip-prepare-environment", "--skip-install", "--skip-torch-cuda-test", "--skip-version-check", "--skip-python-version-check",
    "--no-half", "--no-hashing", "--no-download-sd-model", "--api",
)  # fmt: skip
VARIABLES = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1",
    "IGNORE_CMD_ARGS_ERRORS": "1",  # Neo lacks some of these flags
}  # fmt: skip
DRAWN = {"steps": 2, "width": 64, "height": 64, "seed": 1, "sampler_name": "Euler", "cfg_scale": 7.0}


@dataclass
class Pictures:
    """What one request gave: PNG files, and the infotext of the first; equal where the pixels are."""

    files: list[bytes]
    infotext: str

    @property
    def arrays(self) -> list[np.ndarray]:
        """``(height, width, 3)`` each."""
        return [pixels(file) for file in self.files]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pictures) and len(self.files) == len(other.files) and all(map(np.array_equal, self.arrays, other.arrays))

    def dumps(self) -> list[str]:
        """As text that can be kept."""
        return [self.infotext, *(base64.b64encode(file).decode() for file in self.files)]

    @staticmethod
    def loads(texts: list[str]) -> Pictures:
        return Pictures([base64.b64decode(text) for text in texts[1:]], texts[0])


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


class Server:
    """A running WebUI; ``log`` is all that it has printed."""

    def __init__(self, checkout: Path, data: Path, models: Path, loras: Path) -> None:
        self.checkout, self.data, self.log_file = checkout, data, data / "log.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        data.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"samples_format": "png", "live_previews_enable": False, "CLIP_stop_at_last_layers": 1}  # 2 is Neo's own
        if known := re.search(r'VERSION_UID\b.* = "(\w+)"', (checkout / "modules" / "launch_utils.py").read_text(encoding="utf-8")):
            settings["VERSION_UID"] = known[1]  # Neo waits for a key where its settings have another
        (data / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        neo, forge = (checkout / "modules_forge" / "packages").is_dir(), (checkout / "modules_forge").is_dir()
        cpu = ("--cpu",) if neo else ("--always-cpu",) if forge else ("--use-cpu", "all")
        several = "s" if neo else ""
        folders = ("--data-dir", str(data), f"--ckpt-dir{several}", str(models), f"--lora-dir{several}", str(loras))
        folders += ("--gradio-allowed-path", str(checkout))  # Forge's page gets its own scripts only from there
        self.command = [
            str(checkout / "venv" / "bin" / "python"),
            "launch.py",
            *QUIET,
            *cpu,
            *folders,
            "--port",
            self.url.rsplit(":", 1)[1],
        ]
        self.start()

    def start(self) -> None:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | VARIABLES
        with self.log_file.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, cwd=self.checkout, env=variables, stdout=log, stderr=subprocess.STDOUT)
        self.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait(self, minutes: float = 10) -> None:
        """Until it answers.

        Raises:
            SystemExit: it ended, or does not come up.
        """
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            if self.process.poll() is not None:
                sys.exit(f"{self.checkout} ended:\n{self.log[-3000:]}")
            try:
                self.get("/sdapi/v1/options")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        sys.exit(f"{self.checkout} does not answer:\n{self.log[-3000:]}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Its answer.

        Raises:
            AssertionError: it refuses.
        """
        call = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(call, timeout=900) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode(errors='replace')[:500]}") from None

    def draw(self, prompt: str, *panel: Any, path: str = "txt2img", **more: Any) -> Pictures:
        """Pictures of a request with the panel's arguments, if any."""
        body = {"prompt": prompt, **DRAWN, **more}
        if panel:
            body["alwayson_scripts"] = {"sepme concepts": {"args": list(panel)}}
        answer = self.post(f"/sdapi/v1/{path}", body)
        return Pictures.loads([json.loads(answer["info"])["infotexts"][0], *answer["images"]])

    def load(self, checkpoint: str) -> None:
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": checkpoint})


@contextmanager
def started(*arguments: Any) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()
