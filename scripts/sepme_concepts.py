"""SepME in Automatic1111, Forge and their kin: they load this file; what it shows and does is in ``scripts/webui/``."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "sepme_extension"  # the checkout as a package, under a name that nobody else has


def _load() -> ModuleType:
    """Import afresh, so that "Reload UI" runs what an update brought."""
    for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    package = ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.scripts.webui")


_extension = _load()
_extension.register()
SepMEScript = _extension.SepMEScript
