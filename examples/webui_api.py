"""Draw with concepts erased through the API of Automatic1111 or Forge (started with ``--api``); standard library only.

python examples/webui_api.py "a golf ball in the style of van gogh" --erase "van gogh" --erase "golf ball:0.5" -o out.png
"""

from __future__ import annotations

import argparse
import base64
import json
import urllib.request
from pathlib import Path
from typing import Any


def request(prompt: str, strengths: dict[str, float], gate: bool = True, backend: str = "auto", **more: Any) -> dict[str, Any]:
    """The body of ``/sdapi/v1/txt2img``. The arguments are positional: enabled, concepts, strengths (JSON), gate, backend."""
    args = [bool(strengths), list(strengths), json.dumps(strengths), gate, backend]
    return {"prompt": prompt, "steps": 20, "alwayson_scripts": {"sepme concepts": {"args": args}}} | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--erase", action="append", default=[], metavar="NAME[:STRENGTH]")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"))
    given = parser.parse_args()
    strengths = {}
    for item in given.erase:
        name, _, strength = item.partition(":")
        strengths[name] = float(strength or 1)
    body = json.dumps(request(given.prompt, strengths, seed=given.seed)).encode()
    call = urllib.request.Request(f"{given.url}/sdapi/v1/txt2img", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as answer:
        data = json.load(answer)
    given.out.write_bytes(base64.b64decode(data["images"][0]))
    print(json.loads(data["info"])["infotexts"][0])


if __name__ == "__main__":
    main()
