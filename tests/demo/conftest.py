"""The embedded model, loaded once."""

from __future__ import annotations

import pytest

from sepme.hosts.diffusers import DiffusersHost


@pytest.fixture(scope="session")
def demo_host() -> DiffusersHost:
    return DiffusersHost.load("demo")
