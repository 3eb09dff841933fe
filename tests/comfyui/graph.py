"""Prompts in ComfyUI's API format, built link by link."""

from __future__ import annotations

from typing import Any

Link = list[Any]


class Graph:
    """``graph.add("CLIPTextEncode", clip=model[1], text="a star")`` returns a node whose outputs are ``node[0]``, ``node[1]`` ..."""

    def __init__(self) -> None:
        self.prompt: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, **inputs: Any) -> Node:
        name = f"{kind}{sum(k.startswith(kind) for k in self.prompt)}"
        self.prompt[name] = {"class_type": kind, "inputs": {k: v[0] if isinstance(v, Node) else v for k, v in inputs.items()}}
        return Node(name)

    def text(self, clip: Link, text: str) -> Node:
        return self.add("CLIPTextEncode", clip=clip, text=text)

    def sample(self, model: Any, positive: Any, negative: Any, *, batch: int = 1, seed: int = 1, steps: int = 8, size: int = 64) -> Node:
        latent = self.add("EmptyLatentImage", width=size, height=size, batch_size=batch)
        return self.add(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=seed, steps=steps, cfg=3.0,
            sampler_name="ddim", scheduler="normal", denoise=1.0,
        )  # fmt: skip

    def show(self, samples: Any, vae: Link) -> Node:
        image = self.add("VAEDecode", samples=samples, vae=vae)
        return self.add("PreviewImage", images=image)


class Node(str):
    """A node's id; ``node[i]`` links to its i-th output."""

    def __getitem__(self, output: Any) -> Any:
        return [str(self), output]
