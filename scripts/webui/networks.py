"""``<erase:...>`` and ``<keep:...>`` as the host knows tags, for those that other extensions add after ours were read."""

from __future__ import annotations

from typing import Any

from ...sepme.apply.toggles import merge, parse_tags
from ...sepme.errors import SepMEError
from . import host
from .generation import add_tags, say


class TagNetwork(host.ExtraNetwork):
    """Prompts are read in ``before_process_batch``, each for itself; what comes here later counts for the whole batch."""

    def activate(self, p: Any, params_list: list[Any]) -> None:
        tags: dict[str, float] = {}
        for params in params_list:
            try:
                tags = merge(tags, parse_tags(f"<{self.name}:{':'.join(params.items)}>")[1])
            except SepMEError as error:
                say(p, str(error))
        add_tags(p, tags)

    def deactivate(self, p: Any) -> None:
        pass


def register_tags() -> None:
    """Have the host read both tags wherever it reads those of LoRAs."""
    for name in ("erase", "keep"):
        host.register_extra_network(TagNetwork(name))
