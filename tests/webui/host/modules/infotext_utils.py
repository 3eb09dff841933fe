import json
import re

re_param = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def quote(text):
    return json.dumps(text, ensure_ascii=False) if any(c in str(text) for c in ",\n:") else text


def unquote(text):
    return json.loads(text) if len(text) > 1 and text[0] == text[-1] == '"' else text


def parse_generation_parameters(x):
    *lines, last = x.strip().split("\n")
    return {"Prompt": "\n".join(lines)} | {k: unquote(v) for k, v in re_param.findall(last)}


def paste(fields, text):
    """What the paste button does with a script's ``infotext_fields``: values are cast to the type of the control's first value."""
    import gradio as gr

    params, result = parse_generation_parameters(text), []
    for output, key in fields:
        value = key(params) if callable(key) else params.get(key)
        result.append(gr.update() if value is None else gr.update(value=type(output.value)(value)))
    return result
