"""Draw with concepts erased through the API of Automatic1111 or Forge (started with ``--api``); standard library only.

python examples/webui_api.py "a golf ball in the style of van gogh" --erase "van gogh" --erase "golf ball:0.5" -o out.png
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def request(prompt: str, strengths: dict[str, float], gate: bool = True, backend: str = "auto", **more: Any) -> dict[str, Any]:
    """The body of ``/sdapi/v1/txt2img``. The arguments are positional: enabled, concepts, strengths (JSON), gate, backend."""
    args = [bool(strengths), list(strengths), json.dumps(strengths), gate, backend]
    return {"prompt": prompt, "steps": 20, "alwayson_scripts": {"sepme concepts": {"args": args}}} | more


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer.

    Raises:
        SystemExit: it cannot be reached, or refuses.
    """
    call = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call) as answer:
            return json.load(answer)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:  # 422 where the extension is not installed, 404 without --api
        raise SystemExit(f"{url} refuses: {error.code} {error.read().decode(errors='replace')[:300]}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"{url} cannot be reached ({error.reason}); start the WebUI with --api.") from None


def strength_of(item: str) -> tuple[str, float]:
    """``NAME`` or ``NAME:STRENGTH``; names have no colon.

    Raises:
        SystemExit: it is neither.
    """
    name, _, strength = item.partition(":")
    try:
        return name, float(strength or 1)
    except ValueError:
        raise SystemExit(f"--erase {item!r} is not NAME or NAME:STRENGTH, like star:0.7.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--erase", action="append", default=[], metavar="NAME[:STRENGTH]")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"))
    given = parser.parse_args()
    strengths = dict(map(strength_of, given.erase))
    answer = post(f"{given.url}/sdapi/v1/txt2img", request(given.prompt, strengths, seed=given.seed))
    given.out.write_bytes(base64.b64decode(answer["images"][0]))
    info = json.loads(answer["info"])
    print(info["infotexts"][0])
    note = info["extra_generation_params"].get("SepME note")  # what went wrong, if anything did
    if note:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    main()
