"""What the hosts offer to extensions: scripts, callbacks, folders, the queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import call_queue, extra_networks, paths, script_callbacks, scripts, shared, ui_components

from ....sepme.delta.library import DeltaLibrary
from ....sepme.errors import Interrupted
from ....sepme.train.erasures import Erasures

Script, AlwaysVisible = scripts.Script, scripts.AlwaysVisible
InputAccordion = ui_components.InputAccordion
ExtraNetwork, register_extra_network = extra_networks.ExtraNetwork, extra_networks.register_extra_network
on_before_ui, on_cfg_denoiser = script_callbacks.on_before_ui, script_callbacks.on_cfg_denoiser
on_ui_tabs = script_callbacks.on_ui_tabs

library = DeltaLibrary(lambda: [Path(paths.models_path) / "sepme"])
erasures = Erasures(lambda: library.folder / ".cache")


def lora_folder() -> Path:
    """The host's folder of LoRAs."""
    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(paths.models_path) / "Lora")


def checkpoint_folder() -> Path:
    """The host's folder of checkpoints."""
    return Path(getattr(shared.cmd_opts, "ckpt_dir", None) or Path(paths.models_path) / "Stable-diffusion")


def script_modules() -> list[Any]:
    """The modules of all scripts that the host has loaded."""
    return [data.module for data in scripts.scripts_data]


_JOB = "sepme"
_presses = 0  # of our interrupt button


@contextmanager
def job() -> Iterator[None]:
    """The host's queue for as long as the block runs.

    Raises:
        Interrupted: the user interrupted while it was waited for; the host forgets that when a job begins.
    """
    before = _presses
    with call_queue.queue_lock:
        if _presses != before:
            raise Interrupted
        shared.state.begin(_JOB)
        try:
            yield
        finally:
            shared.state.end()


def check_interrupted() -> None:
    """Raise :class:`Interrupted` once the user interrupts."""
    if shared.state.interrupted or shared.state.stopping_generation:
        raise Interrupted


def interrupt() -> None:
    """Interrupt our job, or take it out of the queue; a picture that is being made meanwhile goes on."""
    global _presses
    _presses += 1
    if shared.state.job == _JOB:
        shared.state.interrupt()
