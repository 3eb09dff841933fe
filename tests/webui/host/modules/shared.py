"""``shared.kind`` chooses the host: ``a1111`` or ``forge``."""

import os
from types import SimpleNamespace


class State:
    interrupted = stopping_generation = skipped = False
    job = ""

    def begin(self, job="(unknown)"):
        self.job, self.interrupted, self.stopping_generation = job, False, False

    def end(self):
        self.job = ""

    def interrupt(self):
        self.interrupted = True


kind = os.environ.get("TOY_HOST", "a1111")
cmd_opts = SimpleNamespace(lora_dir=None, ckpt_dir=None)
DEFAULTS = {
    "batch_cond_uncond": True, "pad_cond_uncond": False, "lora_functional": False, "CLIP_stop_at_last_layers": 1, "sdxl_clip_l_skip": False,
}  # fmt: skip
opts = SimpleNamespace(**DEFAULTS)
state = State()
sd_model = None
