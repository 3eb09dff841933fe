"""install.py in an empty environment, with real pip, by every host's launcher; packages come from a folder, not from the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from webui.conftest import CHECKOUTS, ROOT, STUBS

PACKAGES = {"numpy": "1.26.2", "safetensors": "0.4.2", "pyyaml": "6.0.1"}
LAUNCHERS = {"plain": None, "stub": STUBS} | {path.name: path for path in CHECKOUTS}


def make_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (f"Requires-Dist: {requires}\n" if requires else "")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package folder in which safetensors would pull torch, as it would if a release of it ever asked for torch."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, version in PACKAGES.items():
        make_wheel(folder, name, version, "torch" if name == "safetensors" else "")
    make_wheel(folder, "torch", "9.9")
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    return folder


class Host:
    """An environment with nothing but pip, in which a launcher runs the extension's install.py."""

    def __init__(self, folder: Path, launcher: Path | None, wheels: Path) -> None:
        self.folder, self.launcher = folder, launcher
        self.extension = folder / "extensions with spaces" / "sepme"
        self.extension.mkdir(parents=True)
        for name in ("install.py", "requirements.txt"):
            shutil.copy(ROOT / name, self.extension)
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = {} if self.launcher is None else {"PYTHONPATH": str(self.launcher)}
        python = self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        env = self.environment | path | environment
        return subprocess.run([python, *arguments], env=env, cwd=self.folder, capture_output=True, text=True, timeout=120)

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python(str(self.extension / "install.py"), **environment)

    @property
    def packages(self) -> dict[str, str]:
        code = "import importlib.metadata as m; print(*(f'{d.name}={d.version}' for d in m.distributions()))"
        found = dict(line.split("=") for line in self.python("-c", code).stdout.split())
        return {k.lower(): v for k, v in found.items() if k not in ("pip", "setuptools")}


@pytest.fixture(params=list(LAUNCHERS))
def host(request: pytest.FixtureRequest, empty: Path, wheels: Path, tmp_path: Path) -> Host:
    shutil.copytree(empty, tmp_path / "env", symlinks=True)
    return Host(tmp_path / "env", LAUNCHERS[request.param], wheels)


def test_installs_what_is_missing_and_never_torch(host: Host) -> None:
    first = host.install()
    assert (first.returncode, first.stderr) == (0, ""), first
    assert host.packages == PACKAGES
    second = host.install()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_leaves_newer_packages_alone_and_replaces_older(host: Host, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name, version in (("numpy", "2.4.1"), ("pyyaml", "5.4"), ("torch", "2.1.0+cu121")):
        make_wheel(own, name, version)
    host.python("-m", "pip", "install", "-q", "--no-deps", "numpy", "pyyaml", "torch", PIP_FIND_LINKS=str(own))
    assert host.install().returncode == 0
    assert host.packages == PACKAGES | {"numpy": "2.4.1", "torch": "2.1.0+cu121"}


def test_without_network_the_host_starts_and_the_user_is_told(host: Host, tmp_path: Path) -> None:
    result = host.install(PIP_FIND_LINKS=str(tmp_path))
    assert result.returncode == 0
    assert re.search(r"SepME lacks .*safetensors.*python -m pip install .*\"numpy>=1.26\"", result.stdout), result
    assert "Traceback" not in result.stdout + result.stderr
    assert host.packages == {}


@pytest.mark.parametrize("host", [n for n in LAUNCHERS if n != "plain"], indirect=True)
def test_the_hosts_wish_to_install_nothing_counts(host: Host) -> None:
    result = host.install(COMMANDLINE_ARGS="--skip-install")
    assert result.returncode == 0
    assert host.packages == {}


def test_importing_it_does_nothing(host: Host) -> None:
    code = f"import sys; sys.path.insert(0, {str(host.extension)!r}); import install; print(install.missing())"
    assert host.python("-c", code).stdout.count(">=") == len(PACKAGES)
    assert host.packages == {}


def test_requirements_are_those_of_the_package_but_for_torch() -> None:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    found = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    declared = re.findall(r'"([^"]+)"', found[1])
    assert sorted(line for line in lines if line) == sorted(d for d in declared if not d.startswith("torch"))
