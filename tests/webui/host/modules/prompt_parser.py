"""``A AND B`` and ``[from:to:step]``; a word is a token."""

import re
from collections import namedtuple

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])
_EDIT = re.compile(r"\[([^:\[\]]*):([^:\[\]]*):(\d+)\]")


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)


def words(text):
    return re.findall(r"\w+", text)


def _schedules(model, text, steps):
    match = _EDIT.search(text)
    if not match:
        return [ScheduledPromptConditioning(steps, _one(model, text))]
    before, after = (_EDIT.sub(lambda m, i=i: m[i], text) for i in (1, 2))
    return [ScheduledPromptConditioning(int(match[3]) - 1, _one(model, before)), ScheduledPromptConditioning(steps, _one(model, after))]


def _one(model, text):
    cond = model.get_learned_conditioning(SdConditioning([text]))
    return {k: v[0] for k, v in cond.items()} if isinstance(cond, dict) else cond[0]


def get_learned_conditioning_prompt_schedules(prompts, base_steps):
    return [[[base_steps, p]] for p in prompts]  # no editing: for those that read prompts themselves


def get_learned_conditioning(model, prompts, steps):
    return [_schedules(model, p, steps) for p in prompts]


def get_multicond_learned_conditioning(model, prompts, steps):
    batch = [[ComposableScheduledPromptConditioning(_schedules(model, part, steps), 1.0) for part in p.split(" AND ")] for p in prompts]
    return MulticondLearnedConditioning((len(prompts),), batch)
