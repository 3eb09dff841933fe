"""Checkpoints that can be chosen. Forge loads the chosen one when a picture is asked for: ``waiting`` is it until then."""

from . import shared

checkpoints_list = {"toy.safetensors": None}
waiting = None


class SdModelData:
    @property
    def sd_model(self):
        return shared.sd_model


model_data = SdModelData()


def __getattr__(name):
    if name == "forge_model_reload" and shared.kind == "forge":
        return _reload
    raise AttributeError(name)


def _reload():
    global waiting
    if waiting is not None:
        shared.sd_model, waiting = waiting, None
