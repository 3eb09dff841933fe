"""The page as a host builds it: tabs with prompt, the extension's panel and a paste button; the extension's own tab; its script and style.

``PYTHONPATH=.:tests python -m webui.inside.page MODELS PORT`` serves it for looking at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from webui.conftest import ROOT

# what javascript/inputAccordion.js of the hosts does: an accordion that is open is a checkbox that is on
OPEN_IS_ON = """<script>document.addEventListener("click", (event) => {
    const wrap = event.target.closest?.(".label-wrap"), accordion = wrap?.closest("[id$=_enabled]");
    if (accordion) setTimeout(() => {
        const box = document.querySelector(`#${accordion.id}-checkbox input`);
        box.checked = wrap.classList.contains("open");
        for (const type of ["input", "change"]) box.dispatchEvent(new Event(type, { bubbles: true }));
    }, 50);
});</script>"""


def build(ui: Any) -> Any:
    """Blocks whose events have names: ``<tab>_generate`` (latents' sum and infotext) and ``<tab>_paste``."""
    import modules.infotext_utils
    import modules.processing
    import modules.script_callbacks
    import modules.scripts

    from .conftest import make

    extra_tabs = [tab for callback in modules.script_callbacks.callbacks["ui_tabs"] for tab in callback()]
    script = OPEN_IS_ON + "".join(f"<script>{p.read_text(encoding='utf-8')}</script>" for p in sorted((ROOT / "javascript").glob("*.js")))
    head = {"head": script} if gr.__version__.startswith("4") else {}
    with gr.Blocks(css=(ROOT / "style.css").read_text(encoding="utf-8"), analytics_enabled=False, title="WebUI", **head) as page, gr.Tabs():
        for tab in ("txt2img", "img2img"):
            with gr.Tab(tab):
                runner = modules.scripts.ScriptRunner(is_img2img=tab == "img2img")
                prompt = gr.Textbox("a golf ball in the style of van gogh", label="Prompt", elem_id=f"{tab}_prompt")
                (extension,) = runner.alwayson_scripts
                controls = extension.ui(tab == "img2img")

                def generate(prompt: str, *args: Any, runner: Any = runner, tab: str = tab) -> tuple[str, str]:
                    p = make(prompt, **({"init_images": [torch.zeros(1, 4, 8, 8)]} if tab == "img2img" else {}))
                    p.scripts, p.script_args = runner, args
                    latents, infotexts = modules.processing.process_images(p)
                    return json.dumps({"sum": float(latents.double().sum()), "comments": list(p.comments)}), infotexts[0]

                def paste(text: str, fields: Any = extension.infotext_fields) -> Any:
                    return modules.infotext_utils.paste(fields, text)

                with gr.Row():
                    button, paste_button = (
                        gr.Button("Generate", variant="primary", elem_id=f"{tab}_generate"),
                        gr.Button("Paste infotext", elem_id=f"{tab}_paste"),
                    )
                result, info = gr.Textbox(label="Result", elem_id=f"{tab}_result"), gr.Textbox(label="Infotext", elem_id=f"{tab}_infotext")
                button.click(generate, [prompt, *controls], [result, info], api_name=f"{tab}_generate")
                paste_button.click(paste, [info], [field for field, _ in extension.infotext_fields], api_name=f"{tab}_paste")
        for blocks, title, elem_id in extra_tabs:
            with gr.Tab(title, elem_id=elem_id):
                blocks.render()
    if not head:
        page.queue()
        return _with_script(page, script)
    return page.queue()


def _with_script(page: Any, script: str) -> Any:
    """Gradio 3 has no place for scripts; Automatic1111 writes them into the page that is sent, and so does this."""
    import gradio.routes

    original = getattr(gradio.routes.templates, "_sepme_original", gradio.routes.templates.TemplateResponse)

    def response(*args: Any, **kwargs: Any) -> Any:
        sent = original(*args, **kwargs)
        sent.body = sent.body.replace(b"</head>", f"{script}</head>".encode())
        sent.init_headers()
        return sent

    gradio.routes.templates._sepme_original = original
    gradio.routes.templates.TemplateResponse = response
    return page


if __name__ == "__main__":
    from .conftest import WebUI

    build(WebUI("a1111", Path(sys.argv[1]))).launch(server_name="127.0.0.1", server_port=int(sys.argv[2]))
