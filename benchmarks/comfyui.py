"""Overhead and toggling in a real ComfyUI, on the CPU; started by ``sepme bench overhead|toggle --comfyui FOLDER``.

``python benchmarks/comfyui.py JOB`` writes one line of JSON, JOB being like
``{"comfyui": FOLDER, "bench": "overhead", "model": "demo", "concepts": [0, 10], "steps": 20, "rounds": 7, "sides": [], "threads": 1}`` or
``{"comfyui": FOLDER, "bench": "toggle", "model": "demo", "pairs": 7, "threads": 1}``.
Packages that a newer ComfyUI wants may lie in the folder named by ``SEPME_COMFYUI_PACKAGES``.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PACK = "sepme_pack"
PLACES = [0, 9, 4, 7, 2, 5, 8, 1, 6, 3]  # in the chain, of the LoRA that is changed
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
    "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
    "use_spatial_transformer": True, "legacy": False, "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None,
    "num_heads": 8, "num_head_channels": -1,
}  # fmt: skip


def start(folder: str, base: str) -> None:
    """Make ``comfy`` importable and this checkout a package beside it, as ComfyUI makes custom nodes."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks")]
    sys.path[:0] = [p for p in (folder, os.environ.get("SEPME_COMFYUI_PACKAGES")) if p]
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import utils.extra_config  # noqa: F401  as main.py does, before nodes.py puts another 'utils' in the way

    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    logging.getLogger().setLevel(logging.ERROR)


class Workload:
    """A MODEL, a prompt and its negative, and deltas as random LoRAs."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.host = importlib.import_module(f"{PACK}.nodes.host")
        self.denoiser = importlib.import_module(f"{PACK}.nodes.host.denoiser")
        self.models = importlib.import_module(f"{PACK}.sepme.bench.models")
        if name == "demo":
            self.model, clip, _ = self.host.demo_model()
            self.positive, self.negative = (
                [[c, d] for c, d in clip.encode_from_tokens_scheduled(clip.tokenize(t))] for t in ("a red star", "")
            )
        else:
            self.model = _sd15()
            generator = torch.Generator().manual_seed(0)
            self.positive, self.negative = ([[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2))
        self.layers = self.denoiser.attention_layers(self.model.model)
        self.deltas = self.models.random_deltas(self.layers, max(count, 1))
        self.loras = [_lora(d) for d in self.deltas]

    def load(self, model: Any) -> None:
        """Have a MODEL whole on the device, as before sampling."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([model], force_full_load=True)

    def sample(self, model: Any, steps: int, negative: Any = None) -> Tensor:
        """Latents ``(1, 4, 8, 8)`` after these steps."""
        import comfy.sample

        start = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(start, 5)
        prompts = self.positive, negative or self.negative
        return comfy.sample.sample(model, noise, steps, 7.5, "ddim", "normal", *prompts, start, disable_pbar=True, seed=5)

    def off(self, count: int) -> dict[str, float]:
        """Toggles that switch the first concepts off."""
        return dict.fromkeys((d.concept.name for d in self.deltas[:count]), 0.0)

    def ours(self, count: int) -> tuple[Any, Any]:
        """MODEL with ``count`` concepts switched on (for none: one, switched off), and the negative prompt, which keeps all of them."""
        loaded = max(count, 1)
        model = self.host.apply_deltas(self.model, self.deltas[:loaded], {} if count else self.off(1))
        return model, self.host.toggled(self.negative, self.off(loaded))

    def lora_chain(self, count: int) -> Any:
        """What ``count`` LoraLoader nodes in a row make."""
        import comfy.sd

        model = self.model
        for lora in self.loras[:count]:
            model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        return model

    def lora_bypass(self, count: int) -> Any:
        """What LoraLoaderBypass makes of all in one file: of several such nodes in a row only the last one acts."""
        import comfy.sd

        joined = {}
        for key in self.loras[0]:
            parts = [lora[key] for lora in self.loras[:count]]
            joined[key] = torch.stack(parts).sum(0) if key.endswith("alpha") else torch.cat(parts, dim=1 if "lora_up" in key else 0)
        return comfy.sd.load_bypass_lora_for_models(self.model, None, joined, 1.0, 0.0)[0]

    def overhead(self, concepts: tuple[int, ...], steps: int, number: int, only: tuple[str, ...]) -> dict[str, Any]:
        """Seconds of sampling by side, all sides by turns."""
        import comfy.sd

        overhead = importlib.import_module(f"{PACK}.sepme.bench.overhead")
        models: dict[str, Any] = {"stock": self.model, "stock_kept": self.model}
        negatives: dict[str, Any] = {}
        for count in concepts:
            models[f"ours_{count}"], negatives[f"ours_{count}"] = self.ours(count)
            if count:
                models[f"lora_merged_{count}"] = self.lora_chain(count)
                if hasattr(comfy.sd, "load_bypass_lora_for_models"):
                    models[f"lora_bypass_{count}"] = self.lora_bypass(count)

        def side(name: str, model: Any) -> Callable[[int], Any]:
            if name == "stock_kept":

                def cached(steps: int) -> Any:
                    with self.models.barely_cached(self.layers):
                        return self.sample(model, steps)

                return cached
            return lambda steps: self.sample(model, steps, negatives.get(name))

        most = max(concepts)
        sides = overhead.chosen({name: side(name, model) for name, model in models.items()}, only, most)
        counts = {}
        for name, run in sides.items():
            self.load(models[name])
            counts |= overhead.second_step({name: run})
        timed = overhead.rounds(
            {n: (lambda run=run: run(steps)) for n, run in sides.items()}, number, lambda *_: None, lambda name: self.load(models[name])
        )
        return overhead.summary(timed, counts, most) | overhead.cached_bytes(self.layers, self.positive[0][0].repeat(2, 1, 1), most)

    def toggle(self, pairs: int) -> dict[str, Any]:
        """One of ten, by turns each of the chain: ComfyUI runs its loader and those after it again, and patches all weights anew. LoRAs
        act on a model of their own: else either side would have to undo the other's work."""
        bench = importlib.import_module(f"{PACK}.sepme.bench")
        toggle = importlib.import_module(f"{PACK}.sepme.bench.toggle")
        count = toggle.CONCEPTS
        theirs = Workload(self.name, count)
        loaded = [theirs.lora_chain(n) for n in range(count)]  # what the loaders before the changed one made stays cached
        context = torch.cat([self.negative[0][0], self.positive[0][0]]).to(self.model.model.get_dtype())

        def lora(steps: int, places: list[int], turns: Iterator[int]) -> None:
            import comfy.sd

            n = next(turns)
            place = places[n % len(places)]
            model = loaded[place]
            for i in range(place, count):
                strength = 0.5 + n % 2 / 2 if i == place else 1.0
                model = comfy.sd.load_lora_for_models(model, None, self.loras[i], strength, 0.0)[0]
            self.load(model)
            if steps:
                self.sample(model, steps)

        def ours(steps: int, deltas: Any, work: Callable[[float], None], turns: Iterator[int]) -> None:
            strength = 0.5 + next(turns) % 2 / 2
            model = self.host.apply_deltas(self.model, deltas, {deltas[0].concept.name: strength})
            negative = self.host.toggled(self.negative, self.off(count))
            self.load(model)
            if steps:
                self.sample(model, steps, negative)
            else:
                work(strength)

        def timed(first_step: bool, all_touch: bool, places: list[int]) -> Any:
            steps, deltas = int(first_step), self.deltas[:count] if all_touch else self.models.only(self.deltas[:count], 0)
            work = toggle.stubbed(self.layers, deltas, context)
            sides = partial(lora, steps, places, itertools.count()), partial(ours, steps, deltas, work, itertools.count())
            for side in sides * 2:
                side()
            return bench.alternate(*sides, pairs, time.process_time)

        timings = [timed(*case, PLACES) for case in toggle.CASES]
        last = timed(False, False, [count - 1])
        return toggle.summary(*timings) | {
            "toggle_speedup_vs_lora_last": last.ratio,
            "seconds_work_last": {"lora": last.first, "ours": last.second},
            "lora": "LoraLoader, each of ten in a row by turns: its loader and those after it run again, weights are patched again",
            "pairs": pairs,
        }


def _sd15() -> Any:
    """A random MODEL of Stable Diffusion 1.5's size in bfloat16."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(SD15))
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.to(torch.bfloat16).parameters():
        parameter.requires_grad_(False)
        parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(0.1)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    cpu = torch.device("cpu")
    return patcher(model, load_device=cpu, offload_device=cpu)


def _lora(delta: Any) -> dict[str, Tensor]:
    """The state dict of a LoRA file with the same increment."""
    state = {}
    for name in delta.up:
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_up.weight": delta.up_factor(name), f"{key}.lora_down.weight": delta.down.clone()}
        state[f"{key}.alpha"] = torch.tensor(float(delta.rank))
    return state


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fresh ComfyUI."""
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as base, torch.inference_mode():
        start(job["comfyui"], base)
        version = importlib.import_module("comfyui_version").__version__
        facts = {"host": f"ComfyUI {version}", "model": job["model"], "threads": job["threads"]}
        if job["bench"] == "toggle":
            return facts | Workload(job["model"], 10).toggle(job["pairs"])
        result = Workload(job["model"], max(job["concepts"])).overhead(
            tuple(job["concepts"]), job["steps"], job["rounds"], tuple(job["sides"])
        )
        return facts | result | {"steps": job["steps"], "rounds": job["rounds"]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
