"""The example client and bad arguments against a real HTTP server, whose requests are read as the hosts read them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modules.api.api
import modules.call_queue
import modules.infotext_utils
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from webui.conftest import ROOT


class Server:
    """A host with ``--api``."""

    def __init__(self, ui: Any) -> None:
        self.ui, app = ui, FastAPI()
        modules.api.api.Api(app, modules.call_queue.queue_lock)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.uvicorn.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()

    def post(self, args: Any, **more: Any) -> dict[str, Any]:
        body = {"prompt": "a star", "seed": 0, "alwayson_scripts": {"SepME concepts": {"args": args}}} | more
        data = json.dumps(body).encode()
        call = urllib.request.Request(f"{self.url}/sdapi/v1/txt2img", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def server(make_webui: Any, delta_files: Path) -> Iterator[Server]:
    running = Server(make_webui("a1111", delta_files))
    yield running
    running.stop()


def sampled(answer: dict[str, Any]) -> list[bytes]:
    """The pictures themselves; their infotexts may differ."""
    return [Image.open(io.BytesIO(base64.b64decode(image))).tobytes() for image in answer["images"]]


def example(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "webui_api.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_example(server: Server, tmp_path: Path) -> None:
    def sampled(name: str, *arguments: str) -> np.ndarray:
        result = example("a star", *arguments, "--seed", "0", "--url", server.url, "-o", tmp_path / name)
        assert (result.returncode, result.stderr) == (0, ""), result
        assert Image.open(tmp_path / name).info["parameters"] == result.stdout.rstrip("\n")
        return pixels(tmp_path / name)

    def expected(latents: Any) -> np.ndarray:
        return np.asarray(modules.api.api.picture(latents[0], ""))

    steps = {"steps": 20}  # the example's
    assert np.array_equal(sampled("stock.png"), expected(server.ui.draw(script=False, **steps)))
    half = sampled("half.png", "--erase", "star:0.5", "--erase", "moon")
    assert np.array_equal(half, expected(server.ui.erase("star", "moon", strengths='{"star": 0.5}', **steps)))
    assert not np.array_equal(half, pixels(tmp_path / "stock.png"))
    params = modules.infotext_utils.parse_generation_parameters(Image.open(tmp_path / "half.png").info["parameters"])
    records = server.ui.part("scripts.webui.infotext").read(params)
    assert [(r.name, r.strength) for r in records] == [("star", 0.5), ("moon", 1.0)]


def test_the_example_says_what_went_wrong(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = example("a star", "--erase", "nobody", "--url", server.url, "-o", out)
    assert result.returncode == 0
    assert "There is no delta 'nobody'" in result.stderr
    for item in ("star:0.5:1", "star:much"):
        unread = example("a star", "--erase", item, "--url", server.url, "-o", out)
        assert unread.returncode == 1
        assert unread.stderr == f"--erase {item!r} is not NAME or NAME:STRENGTH, like star:0.7.\n"
    nowhere = example("a star", "--url", "http://127.0.0.1:9", "-o", out)
    assert nowhere.returncode == 1
    assert "start the WebUI with --api" in nowhere.stderr
    refused = example("a star", "--url", f"{server.url}/elsewhere", "-o", out)
    assert refused.returncode == 1
    assert "404" in refused.stderr
    assert all("Traceback" not in r.stderr for r in (result, nowhere, refused))


def test_arguments_left_out_take_the_panels_values(server: Server) -> None:
    def post(args: Any, **more: Any) -> list[bytes]:
        answer = server.post(args, **more)
        assert "SepME note" not in answer["info"]
        return sampled(answer)

    stock, erased = post([]), post([True, ["star"], "", True, "auto"])
    assert erased != stock
    assert post([True, ["star"]]) == post([True, "star"]) == post([], prompt="a <erase:star> star") == erased
    assert post([True, ["star"], {"star": 0.25}]) == post([1, ["star"], '{"star": 0.25}']) != erased
    assert post([False, ["star"]]) == post([None] * 5) == post([True, ["star"]], alwayson_scripts={}) == stock


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["false", ["star"]], "first argument is true or false, not 'false'"),
        ([True, ["nobody"]], "There is no delta 'nobody'"),
        ([True, 7], "list of concepts"),
        ([True, [["star"]]], "list of concepts"),
        ([True, {"star": 1}], "list of concepts"),
        ([True, ["star"], {"star": "nan"}], "'nan' of 'star' is no number"),
        ([True, ["star"], '{"star": NaN}'], "'nan' of 'star' is no number"),
        ([True, ["star"], {"star": "strong"}], "'strong' of 'star' is no number"),
        ([True, ["star"], {"star": 1e9}], "between -100 and 100"),
        ([True, ["star"], {"satr": 0.5}], "The strengths name 'satr'"),
        ([True, ["star"], "NaN"], "one JSON object"),
        ([True, ["star"], [1, 2]], "one JSON object"),
        ([True, ["star"], "{"], "not JSON"),
        ([True, ["star"], "", "yes"], "fourth argument is true or false, not 'yes'"),
        ([True, ["star"], "", True, "cuda"], "no backend 'cuda'"),
        ([True, ["star"], "", True, ["fused"] * 10000], "no backend"),
        ([True, [f"concept {i}" for i in range(100_000)]], "There is no delta 'concept 0'"),
        ([True, ["x" * 1_000_000]], "There is no delta 'xxxxx"),
        ([True, ["star"], "[" * 100_000], "not JSON"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_sentence_and_change_nothing(server: Server, args: Any, sentence: str) -> None:
    answer = server.post(args)
    note = json.loads(answer["info"])["extra_generation_params"]["SepME note"]
    assert sentence in note
    assert note.startswith("nothing is erased. ")
    assert len(note) < 300
    assert str(server.ui.folder) not in json.dumps(answer)  # pictures are shared
    assert sampled(answer) == sampled(server.post([]))


def test_a_bare_nan(server: Server) -> None:
    """JSON has no NaN: where a request brings one all the same, the hosts cannot send it back with their answer, and we draw as stock."""
    stock = server.ui.draw()
    assert torch.equal(server.ui.draw("a star", True, ["star"], {"star": float("nan")}), stock)
    assert "'nan' of 'star' is no number" in server.ui.infotexts[0]
