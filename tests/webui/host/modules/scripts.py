import importlib.util
import inspect
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

from . import script_callbacks

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data = []
scripts_txt2img = SimpleNamespace(alwayson_scripts=[])


class Script:
    infotext_fields = paste_field_names = None
    is_txt2img = is_img2img = False
    args_from = args_to = None

    def title(self):
        raise NotImplementedError

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        pass

    def process(self, p, *args):
        pass

    def before_process_batch(self, p, *args, **kwargs):
        pass

    def process_batch(self, p, *args, **kwargs):
        pass

    def process_before_every_sampling(self, p, *args, **kwargs):
        pass

    def postprocess_batch(self, p, *args, **kwargs):
        pass

    def postprocess(self, p, processed, *args):
        pass

    def elem_id(self, item_id):
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{title}_{item_id}"


def load_scripts(folder):
    """Every .py file of a folder; what a module holds of Script's subclasses is a script."""
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    basedir = str(Path(folder).parent)
    if basedir not in sys.path:
        sys.path = [basedir, *sys.path]
    syspath = sys.path
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file() and p.suffix == ".py"):
        spec = importlib.util.spec_from_file_location(path.name, path)
        module = importlib.util.module_from_spec(spec)
        sys.path = [basedir, *sys.path]
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path = syspath
        for found in module.__dict__.values():
            if inspect.isclass(found) and issubclass(found, Script):
                scripts_data.append(ScriptClassData(found, str(path), str(path.parent.parent), module))


class ScriptRunner:
    """The scripts of one tab. Errors of scripts are raised here; the real one prints them and goes on."""

    def __init__(self, is_img2img=False):
        self.scripts = self.alwayson_scripts = [data.script_class() for data in scripts_data]
        for script in self.alwayson_scripts:
            script.is_img2img, script.is_txt2img = is_img2img, not is_img2img
            assert script.show(is_img2img) is AlwaysVisible

    def call(self, name, p, *args, **kwargs):
        for script in self.alwayson_scripts:
            getattr(script, name)(p, *args, *p.script_args[script.args_from : script.args_to], **kwargs)
