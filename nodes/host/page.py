"""What the page needs of ComfyUI: its web server, kinds of nodes, and architectures without loading a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open

from ...sepme.errors import SepMEError
from ...sepme.files import refuse_pickle
from ...sepme.model.families import find, labels
from ...sepme.model.layers import fitting
from .demo import FOLDER as DEMO


def web_routes() -> Any:
    """The table that routes are added to; None where no server runs (tests, other programs that import the nodes)."""
    return getattr(_server(), "routes", None)


def tell_page(event: str, data: dict[str, Any], client: str | None = None) -> None:
    """Send a message to a page, or to the one whose prompt is running."""
    server = _server()
    if server is not None:
        server.send_sync(event, data, client or server.client_id)


def notice(text: str, node: str | None = None, client: str | None = None) -> None:
    """Have the page show a sentence that is no error, about a node or about the one that runs."""
    server = _server()
    if server is not None:
        tell_page("sepme.notice", {"node": node or server.last_node_id, "text": text}, client)


def watch_prompts(handler: Callable[[Any], Any]) -> None:
    """Have every prompt that is queued pass through ``handler``, which may change it; nothing where no server runs."""
    server = _server()
    if server is not None:
        server.add_on_prompt_handler(handler)


def outputs_of(kind: str) -> tuple[str, ...]:
    """Types of the outputs of a kind of node; none of a kind that is not installed."""
    return tuple(map(str, getattr(_kinds().get(kind), "RETURN_TYPES", None) or ()))


def saves(kind: str) -> bool:
    """Whether a kind of node hands nothing on, as those that write files do."""
    return bool(getattr(_kinds().get(kind), "OUTPUT_NODE", False)) and not outputs_of(kind)


def _kinds() -> dict[str, Any]:
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def _server() -> Any:
    """ComfyUI's server; None where none runs. Importing its module where none is would start half of it, so it is only looked up."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def architectures_of(checkpoint: str) -> tuple[str, ...]:
    """Architectures of the deltas that fit a checkpoint in ComfyUI's folders, its own first, by the shapes in its header.

    An empty name is the embedded model.

    Raises:
        SepMEError: no such checkpoint, a pickle, or no UNet of Stable Diffusion in it.
    """
    refuse_pickle(Path(checkpoint))
    path = folder_paths.get_full_path("checkpoints", checkpoint) if checkpoint else str(next((DEMO / "unet").glob("*.safetensors")))
    if path is None:
        raise SepMEError(f"There is no checkpoint {checkpoint[:60]!r}; choose one that is installed.")
    stat = Path(path).stat()
    return _file_architectures(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _file_architectures(path: str, mtime: int, size: int) -> tuple[str, ...]:
    shapes = _shapes(path)
    sites = find(shapes)
    if not sites:
        raise SepMEError(f"{Path(path).name} is no {labels()} checkpoint; SepME edits the text layers of those only.")
    return fitting({site: shapes[name] for site, name in sites.items()})


def _shapes(path: str) -> dict[str, tuple[int, int]]:
    """Shapes of the weights by module, from the header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.endswith(".weight")]  # noqa: SIM118 (not a dict)
            return {key.removesuffix(".weight"): tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError, ValueError, RuntimeError):
        raise SepMEError(f"{Path(path).name} is no safetensors file or is cut short; get it again.") from None
