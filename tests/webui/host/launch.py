"""What an extension's install.py finds of the WebUI's launcher (``modules/launch_utils.py``)."""

import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace

python, index_url = sys.executable, os.environ.get("INDEX_URL", "")
args = SimpleNamespace(skip_install="--skip-install" in os.environ.get("COMMANDLINE_ARGS", ""))


def is_installed(package):
    try:
        return importlib.metadata.distribution(package) is not None
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(package) is not None


def run(command, desc=None, errdesc=None, custom_env=None, live=False):
    print(desc)
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=custom_env)
    if result.returncode:
        raise RuntimeError(f"{errdesc}.\nCommand: {command}\nError code: {result.returncode}\nstderr: {result.stderr}")
    return result.stdout


def run_pip(command, desc=None, live=False):
    if args.skip_install:
        return None
    index_url_line = f" --index-url {index_url}" if index_url else ""
    return run(
        f'"{python}" -m pip {command} --prefer-binary{index_url_line}', desc=f"Installing {desc}", errdesc=f"Couldn't install {desc}"
    )
