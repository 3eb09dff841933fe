"""The HTTP interface (``modules/api/api.py``): requests are read, scripts found and their positional arguments filled as the host does."""

import base64
import io
import json

import gradio as gr
from fastapi import HTTPException
from PIL import Image, PngImagePlugin
from pydantic import BaseModel

from modules import scripts, shared
from modules.processing import StableDiffusionProcessingTxt2Img, process_images


class StableDiffusionTxt2ImgProcessingAPI(BaseModel):
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    steps: int = 3
    batch_size: int = 1
    alwayson_scripts: dict = {}


def encode_pil_to_base64(image):
    metadata, data = PngImagePlugin.PngInfo(), io.BytesIO()
    metadata.add_text("parameters", image.info["parameters"])
    image.save(data, format="PNG", pnginfo=metadata)
    return base64.b64encode(data.getvalue())


def picture(latents, infotext):
    """Latents as a picture."""
    pixels = (latents[:3].clamp(-3, 3) * 40 + 128).byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image.info["parameters"] = infotext
    return image


class Api:
    def __init__(self, app, queue_lock):
        self.queue_lock = queue_lock
        app.add_api_route("/sdapi/v1/txt2img", self.text2imgapi, methods=["POST"])
        self.runner = scripts.ScriptRunner()
        self.default_script_arg_txt2img = self.init_default_script_args(self.runner)

    def get_script(self, script_name, script_runner):
        return next((s for s in script_runner.scripts if s.title().lower() == script_name.lower()), None)

    def init_default_script_args(self, script_runner):
        values = [0]
        with gr.Blocks():
            for script in script_runner.scripts:
                script.args_from = len(values)
                values += [control.value for control in script.ui(script.is_img2img)]
                script.args_to = len(values)
        return values

    def init_script_args(self, request, default_script_args, selectable_scripts, selectable_idx, script_runner):
        script_args = default_script_args.copy()
        for name, given in request.alwayson_scripts.items():
            script = self.get_script(name, script_runner)
            if script is None:
                raise HTTPException(status_code=422, detail=f"always on script {name} not found")
            for i, value in enumerate(given.get("args", [])[: script.args_to - script.args_from]):
                script_args[script.args_from + i] = value
        return script_args

    def text2imgapi(self, txt2imgreq: StableDiffusionTxt2ImgProcessingAPI):
        args = vars(txt2imgreq).copy()
        args.pop("alwayson_scripts")
        script_args = self.init_script_args(txt2imgreq, self.default_script_arg_txt2img, None, None, self.runner)
        with self.queue_lock:
            p = StableDiffusionProcessingTxt2Img(sd_model=shared.sd_model, **args)
            p.is_api = True
            p.scripts = self.runner
            p.script_args = tuple(script_args)
            latents, infotexts = process_images(p)
        images = [encode_pil_to_base64(picture(x, text)) for x, text in zip(latents, infotexts, strict=True)]
        info = {"prompt": p.prompt, "extra_generation_params": p.extra_generation_params, "infotexts": infotexts}
        return {"images": images, "parameters": vars(txt2imgreq), "info": json.dumps(info, default=lambda o: None)}
