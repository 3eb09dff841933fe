"""What loading the pack does to the host."""

from __future__ import annotations

import sys

import pytest
from comfyui.environment import comfyui
from comfyui.inside import PACK, Inside

pytestmark = pytest.mark.xdist_group("comfyui inside")


def test_only_the_library_is_loaded(inside: Inside) -> None:
    """No command line, no plots, no diffusers host, no training data: those come when they are used, if ever."""
    loaded = {name.removeprefix(f"{PACK}.") for name in sys.modules if name.startswith(PACK)}
    unwanted = ("sepme.cli", "sepme.bench", "sepme.hosts", "sepme.demo.run", "sepme.evaluate", "scripts", "install", "tests")
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_hosts_own_modules_are_found(inside: Inside) -> None:
    """``nodes`` is ComfyUI's, with the checkout as one of its packages."""
    import nodes

    assert str(nodes.__file__).startswith(str(comfyui()))
