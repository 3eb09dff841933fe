"""Against real hosts, when ``SEPME_WEBUI`` names checkouts: signatures of the test doubles; their own UNets, patchers and neighbours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from webui.conftest import CHECKOUTS, EXTENSIONS, ROOT, STUBS

NO_CHECKOUT = "SEPME_WEBUI names no checkout"
# what the extension uses, by the file that a host has it in; the doubles of these must take what the real ones take
USED = {
    "scripts.py": (
        "Script.title", "Script.show", "Script.ui", "Script.process", "Script.before_process_batch", "Script.process_batch",
        "Script.process_before_every_sampling", "Script.postprocess_batch", "Script.postprocess", "Script.elem_id",
    ),
    "script_callbacks.py": ("CFGDenoiserParams.__init__", "on_before_ui", "on_cfg_denoiser", "on_ui_tabs"),
    "extra_networks.py": (
        "ExtraNetworkParams.__init__", "ExtraNetwork.__init__", "ExtraNetwork.activate", "ExtraNetwork.deactivate",
        "register_extra_network", "activate", "parse_prompt", "parse_prompts",
    ),
    "prompt_parser.py": ("SdConditioning.__init__", "MulticondLearnedConditioning.__init__"),
    "processing.py": (
        "StableDiffusionProcessing.comment", "StableDiffusionProcessing.init", "StableDiffusionProcessing.setup_prompts",
        "StableDiffusionProcessing.setup_conds", "StableDiffusionProcessingTxt2Img.sample", "StableDiffusionProcessingImg2Img.sample",
        "StableDiffusionProcessingTxt2Img.get_conds", "StableDiffusionProcessingTxt2Img.parse_extra_network_prompts",
        "StableDiffusionProcessing.get_conds", "StableDiffusionProcessing.parse_extra_network_prompts",
    ),
    "devices.py": ("autocast",),
    "sd_samplers_common.py": ("single_sample_to_image",),
    "shared_state.py": ("State.begin", "State.end", "State.interrupt"),
    "infotext_utils.py": ("quote", "unquote"),
    "ui_components.py": ("InputAccordion",),
    "api/api.py": (
        "Api.__init__", "Api.get_script", "Api.init_default_script_args", "Api.init_script_args", "Api.text2imgapi", "encode_pil_to_base64",
    ),
    "../scripts/xyz_grid.py": ("AxisOption", "csv_string_to_list_strip", "list_to_csv_string"),
}  # fmt: skip
DOUBLES = {"shared_state.py": "shared.py", "../scripts/xyz_grid.py": "xyz_grid.py"}
NAMES = {  # plain names that the adapter reads
    "scripts.py": ("AlwaysVisible", "scripts_data"),
    "call_queue.py": ("queue_lock",),
    "devices.py": ("device",),
    "shared.py": ("opts", "state", "sd_model", "cmd_opts"),
}
# text that the adapter relies on and that no signature shows
PHRASES = {
    "processing.py": ("p.scripts.before_process_batch(", "p.parse_extra_network_prompts()", "scripts.process_before_every_sampling("),
    "scripts.py": ("issubclass(script_class, Script)", "infotext_fields"),
    "infotext_utils.py": ("valtype(v)",),
    "sd_samplers_cfg_denoiser.py": ("cfg_denoiser_callback(denoiser_params)",),
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def signatures(tree: ast.Module) -> dict[str, list[str]]:
    """Parameter names by qualified name, without self; ``*`` and ``**`` where they are. A class is called like its constructor."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
                if node.name == "__init__":
                    yield prefix.rstrip("."), node

    found = {}
    for name, node in walk(tree.body, ""):
        a = node.args
        names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg != "self"]
        found.setdefault(name, names + ["*"] * (a.vararg is not None) + ["**"] * (a.kwarg is not None))
    return found


PROCESSING = ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img", "StableDiffusionProcessingImg2Img")
OURS = ("sepme_run", "sepme_concepts", "sepme_strength", "sepme_hires")  # what the extension itself puts on p


def initial_values(tree: ast.Module, name: str) -> dict[str, str]:
    """The fields of a class and what they are at first, as text; ``field(default=x)`` is x."""
    values = {}
    for node in next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            value = node.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
                value = next(k.value for k in value.keywords if k.arg == "default")
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                values[ast.unparse(target)] = ast.unparse(value)
    return values


def read_of_p() -> set[str]:
    """Attributes of the host's processing object that the extension reads or sets."""
    found = set()
    for path in (ROOT / "scripts" / "webui").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("p", "self.p", "run.attached.p"):
                found.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr") and ast.unparse(node.args[0]) == "p":
                found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    return found - set(OURS)


def attributes(tree: ast.Module, names: tuple[str, ...]) -> set[str]:
    """Fields, methods and properties of classes."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in names]
    return {n.name for c in classes for n in c.body if isinstance(n, ast.FunctionDef)} | {
        field for name in names for field in initial_values(tree, name)
    }


def options(tree: ast.Module) -> dict[str, str]:
    """Settings of a host and what they are at first, as text."""
    pairs = [p for n in ast.walk(tree) if isinstance(n, ast.Dict) for p in zip(n.keys, n.values, strict=True)]
    calls = [(k.value, innermost(v)) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Call)]
    return {name: ast.unparse(call.args[0]) for name, call in calls if ast.unparse(call.func) == "OptionInfo" and call.args}


def innermost(call: ast.Call) -> ast.Call:
    """``OptionInfo(...)`` of ``OptionInfo(...).info("...").link("...")``."""
    while isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
        call = call.func.value
    return call


def assigned(tree: ast.Module) -> set[str]:
    targets = [
        t for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
    ]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def run(script: str, *arguments: Path, cwd: Path | None = None) -> None:
    """One of the scripts beside this file, in a process of its own: of a checkout's environment where it has one."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    own = None if cwd is None else cwd / "venv" / "bin" / "python"
    command = [str(own) if own is not None and own.exists() else sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    print(result.stdout[-3000:], result.stderr[-3000:])
    assert result.returncode == 0


@pytest.mark.parametrize("checkout", CHECKOUTS or [None], ids=str)
def test_doubles_take_what_the_hosts_take(checkout: Path | None) -> None:
    if checkout is None:
        pytest.skip(NO_CHECKOUT)
    problems = []
    for file, names in USED.items():
        real = [checkout / "modules" / file]
        if not real[0].exists():  # Classic has the plot in parts
            real = [checkout / "extensions-builtin" / "xyz" / "lib_xyz" / f"{part}.py" for part in ("classes", "utils")]
        theirs = {name: taken for path in real for name, taken in signatures(parsed(path)).items()}
        ours = signatures(parsed(STUBS / "modules" / DOUBLES.get(file, file)))
        for name in names:
            if name not in theirs:
                problems.append(f"{file}: {name} is gone")
            elif [n for n in theirs[name] if n in ours[name]] != ours[name]:
                problems.append(f"{file}: {name}{tuple(theirs[name])}, double {tuple(ours[name])}")
    without_backend = {} if (checkout / "backend").is_dir() else {"sd_hijack.py": ("model_hijack",)}  # Forge's engines count tokens
    for file, names in (NAMES | without_backend).items():
        gone = set(names) - assigned(parsed(checkout / "modules" / file))
        problems += [f"{file}: {name} is gone" for name in sorted(gone)]
    for file, phrases in PHRASES.items():
        text = (checkout / "modules" / file).read_text(encoding="utf-8")
        problems += [f"{file}: no {phrase!r}" for phrase in phrases if phrase not in text]
    samplers = ("modules/sd_samplers_cfg_denoiser.py", "backend/sampling/sampling_function.py", "modules_forge/forge_sampler.py")
    texts = [(checkout / file).read_text(encoding="utf-8") for file in samplers if (checkout / file).is_file()]
    for name in ("text_cond", "text_uncond"):  # what callbacks put there is what is drawn with
        problems += [f"no sampler takes denoiser_params.{name}"] if not any(f"denoiser_params.{name}" in text for text in texts) else []
    if not (checkout / "modules_forge").is_dir():  # Forge recomputes nothing in the backward pass
        tree = parsed(checkout / "modules" / "sd_hijack_checkpoint.py")
        problems += sorted({"add", "remove", "stored"} - set(signatures(tree)) - assigned(tree))
    assert not problems, "\n".join(problems)


def test_the_double_has_what_is_read_of_p() -> None:
    assert read_of_p() >= {"all_prompts", "enable_hr", "extra_generation_params", "iteration", "is_hr_pass"}
    assert read_of_p() - attributes(parsed(STUBS / "modules" / "processing.py"), PROCESSING) == set()


@pytest.mark.parametrize("checkout", CHECKOUTS or [None], ids=str)
def test_the_double_begins_as_the_real_one(checkout: Path | None) -> None:
    """Of txt2img and img2img: what the extension reads is there, in the class where it is, and is at first what it is there."""
    if checkout is None:
        pytest.skip(NO_CHECKOUT)
    double, real = parsed(STUBS / "modules" / "processing.py"), parsed(checkout / "modules" / "processing.py")
    for name in PROCESSING:
        ours, theirs = initial_values(double, name), initial_values(real, name)
        assert {k: theirs.get(k, "nothing") for k in ours} == ours, name
    assert read_of_p() - attributes(real, PROCESSING) == set()
    defaults = next(n.value for n in parsed(STUBS / "modules" / "shared.py").body if ast.unparse(n).startswith("DEFAULTS ="))
    real_options = options(parsed(checkout / "modules" / "shared_options.py"))
    assert "CLIP_stop_at_last_layers" in real_options
    for name, value in ast.literal_eval(defaults).items():
        found = real_options.get(name, str(value))  # an extension's own, or one that this host has not, is not there
        assert found == str(value) or (name, found) == ("CLIP_stop_at_last_layers", "2"), name  # Neo's is 2
    ours, theirs = (initial_values(parsed(p / "modules" / f), "State") for p, f in ((STUBS, "shared.py"), (checkout, "shared_state.py")))
    assert {k: theirs.get(k, "nothing") for k in ours} == ours


@pytest.mark.parametrize("checkout", [c for c in CHECKOUTS if (c / "backend").is_dir()] or [None], ids=str)
def test_forges_own_backend(checkout: Path | None) -> None:
    if checkout is None:
        pytest.skip(NO_CHECKOUT)
    run("real_forge.py", *filter(None, [extension("negpip.py")]), cwd=checkout)


LDM = "repositories/stable-diffusion-stability-ai/ldm"


@pytest.mark.parametrize("checkout", [c for c in CHECKOUTS if (c / LDM).is_dir() and find_spec("einops")] or [None], ids=str)
def test_the_unet_that_automatic1111_runs(checkout: Path | None) -> None:
    if checkout is None:
        pytest.skip(f"{NO_CHECKOUT} with {LDM}, or einops is not installed")
    run("real_a1111.py", checkout)


def extension(file: str) -> Path | None:
    """The checkout of an extension that has this script, of those that ``SEPME_WEBUI_EXTENSIONS`` names."""
    return next((e for e in EXTENSIONS if (e / "scripts" / file).is_file()), None)


@pytest.mark.parametrize("checkout", [c for c in CHECKOUTS if (c / LDM).is_dir() and find_spec("einops")] or [None], ids=str)
def test_the_neighbours_own_code(checkout: Path | None) -> None:
    negpip, controlnet = extension("negpip.py"), extension("controlnet.py")
    if checkout is None or negpip is None or controlnet is None:
        pytest.skip(f"{NO_CHECKOUT} with {LDM}, or SEPME_WEBUI_EXTENSIONS none of sd-webui-negpip and sd-webui-controlnet")
    run("real_neighbours.py", checkout, negpip, controlnet)
