"""ComfyUI's T5 and language models as text encoder: lengths, templates, and what is kept on disk."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.inside import Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


@pytest.fixture(scope="module")
def clip(inside: Inside) -> Any:
    """Z-Image's: a template, no padding, no end token."""
    tiny = import_module("comfyui.tiny_families")
    with torch.inference_mode():
        return tiny.clip(tiny.FAMILIES["z_image"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path / "sepme" / "encodings"


def node(clip: Any, text: str) -> torch.Tensor:
    """What CLIPTextEncode makes of a prompt."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0][0].clone()


def test_prompts_are_read_as_the_node_reads_them(inside: Inside, clip: Any) -> None:
    """Each at its own length, with the template; zeros stand for what the shorter ones lack; parentheses are plain text."""
    encoder = inside.host.text_encoder(clip)
    prompts = ["", "a cat", "a painting of a house by the sea, oil on canvas"]
    encoding = encoder.encode(prompts)
    for row, mask, prompt in zip(encoding.context, encoding.mask, prompts, strict=True):
        expected = node(clip, prompt)
        assert torch.equal(row[: len(expected)], expected)
        assert not row[len(expected) :].any()
        assert int(mask.sum()) == len(expected)
    assert torch.equal(encoder.encode(["a (cat) here"]).context[0], node(clip, "a \\(cat\\) here"))
    assert len(node(clip, "a \\(cat\\) here")) > len(node(clip, "a cat here"))


def test_ordinary_prompts_are_read_once_and_stored(inside: Inside, clip: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another encoder of the same weights reads none of them; one with a patch reads them anew. A damaged file is made again."""
    language = import_module(f"{inside.host.__name__}.language")
    prompts = import_module(f"{inside.sepme.__name__}.plan.gate").ordinary_prompts()[:40]
    read: list[str] = []
    own = language.LanguageEncoder._read
    monkeypatch.setattr(language.LanguageEncoder, "_read", lambda self, prompt: read.append(prompt) or own(self, prompt))

    def encode(which: Any) -> tuple[torch.Tensor, int]:
        before = len(read)
        found = inside.host.text_encoder(which).encode(prompts).context
        return found, len(read) - before - 1  # one prompt tells encoders apart

    first, count = encode(clip)
    assert count == 40
    again, count = encode(clip.clone())
    assert count == 0
    assert torch.equal(again, first)
    plain = torch.stack([torch.nn.functional.pad(c, (0, 0, 0, first.shape[1] - len(c))) for c in (node(clip, p) for p in prompts)])
    assert (first - plain).norm(dim=-1).max() < 1e-3 * plain.norm(dim=-1).max()
    changed = clip.clone()
    changed.patcher.add_patches({k: (torch.ones_like(v),) for k, v in clip.cond_stage_model.state_dict().items() if "o_proj" in k}, 0.1)
    assert encode(changed)[1] == 40
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 6  # 16, 16 and 8 prompts each
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert encode(clip)[1] == 40
    assert torch.equal(encode(clip)[0], first)
