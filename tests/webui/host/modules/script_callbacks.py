callbacks = {"before_ui": [], "cfg_denoiser": [], "ui_tabs": []}


class CFGDenoiserParams:
    def __init__(self, x, image_cond, sigma, sampling_step, total_sampling_steps, text_cond, text_uncond, denoiser=None):
        self.x, self.image_cond, self.sigma = x, image_cond, sigma
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps
        self.text_cond, self.text_uncond, self.denoiser = text_cond, text_uncond, denoiser


def on_before_ui(callback):
    callbacks["before_ui"].append(callback)


def on_cfg_denoiser(callback):
    callbacks["cfg_denoiser"].append(callback)


def on_ui_tabs(callback):
    callbacks["ui_tabs"].append(callback)


def clear_callbacks():
    for registered in callbacks.values():
        registered.clear()


def remove_callbacks_for_function(callback_func):
    for registered in callbacks.values():
        registered[:] = [c for c in registered if c != callback_func]
