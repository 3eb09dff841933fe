"""The embedded model, loaded once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sepme.hosts.diffusers import DiffusersHost
from sepme.hosts.loading import LoadOptions


@pytest.fixture(scope="session")
def demo_host() -> DiffusersHost:
    return DiffusersHost.load("demo", options=LoadOptions(cache=Path(os.environ["SEPME_CACHE"])))
