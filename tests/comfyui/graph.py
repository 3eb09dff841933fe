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


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def from_workflow(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The prompt that the front end makes of a saved workflow.

    Args:
        info: the server's ``/object_info``.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in info:  # notes
            continue
        spec, values = info[node["type"]], list(node["widgets_values"])
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        sockets = {i["name"] for i in node["inputs"] if "widget" not in i}
        inputs: dict[str, Any] = {}
        for part in ("required", "optional"):
            for name in spec["input_order"].get(part, []):
                kind, options = spec["input"][part][name][0], (*spec["input"][part][name], {})[1]
                if name not in sockets and (isinstance(kind, list) or kind in WIDGETS):  # later versions have more inputs than were saved
                    inputs[name] = values.pop(0) if values else options["default"]
                    after = options.get("control_after_generate")
                    if after if after is not None else name in ("seed", "noise_seed"):
                        assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        assert not values, f"{node['type']} has widgets left over: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


class Node(str):
    """A node's id; ``node[i]`` links to its i-th output."""

    def __getitem__(self, output: Any) -> Any:
        return [str(self), output]
