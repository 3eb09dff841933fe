"""Deltas on the loaded model, or on the conditioning that it gets, while one batch is sampled.

Where all deltas edit the context the model is left alone: the hosts tell callbacks of every step's conditioning and use what they put
there, prompt editing, AND and the hires pass included. Prompts that other extensions bring into the model past that are not seen then.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ....sepme.apply.kv_cache import room
from ....sepme.apply.projector import KVProjector
from ....sepme.apply.row_strengths import Match, chunked, row_strengths
from ..settings import Settings, Tables
from .checkpoint import CHUNK, attention_layers, check_contexts, crossattn, is_forge, load_forge, unet_of
from .hook import ClassForward, Hook, previous

MARK = 1024
SEEN = 8  # edited conditionings that are cached: prompt editing goes to and fro between some
UNKNOWN_ROWS = (
    "another extension adds prompts of its own to the batch; they get the panel's strengths, so tags of single prompts may not reach them"
)


def _loras() -> tuple[Any, ...]:
    """What the host's LoRAs are at the moment; extensions change their weights between steps. Neo's have no rank to choose."""
    networks = sys.modules.get("networks")
    loaded = getattr(networks, "loaded_networks", ())
    return tuple((n.name, n.te_multiplier, n.unet_multiplier, getattr(n, "dyn_dim", None)) for n in loaded)


class ModelPatch:
    """Deltas on the loaded model while one batch is sampled.

    Args:
        p: the host's processing object.
        say: told, in a sentence, what the user should know of this run; maybe at every step.
    """

    def __init__(self, p: Any, tables: Tables, settings: Settings, say: Callable[[str], None]) -> None:
        self.p, self.model, self.tables, self.settings, self.say = p, p.sd_model, tables, settings, say
        self.projector: KVProjector | None = None  # None too where only the conditioning is edited
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] = []  # contexts, strengths, and the edited contexts if any row is touched
        self._step: tuple[list[Tensor], Tensor] | None = None  # contexts and strengths of the rows of this denoising step, in order
        self._next = 0  # of these rows, the one that the next call is likely to begin with
        self.unet = unet_of(self.model)
        self._found: list[tuple[nn.Module, Hook, Any]] = []
        self._patcher: Any = None
        if not tables.composition.columns:
            check_contexts(self.model, tables.composition.deltas)
            return
        layers = attention_layers(self.model)
        self.projector = KVProjector(layers, tables.composition, settings.gate, max_bytes=room(self.unet), backend=settings.backend)
        if is_forge(self.model):
            self._patch_forge()
        else:
            self._patch_modules()

    @property
    def current(self) -> bool:
        """Whether the model is still the one that is patched; a refiner may have taken its place."""
        return unet_of(self.p.sd_model) is self.unet

    def _patch_modules(self) -> None:
        whole = self.model.model  # ControlNet replaces the UNet's own forward, so the pass begins one level above
        for name, module in self._projector.modules.items():
            before = previous(module, module.__dict__.get("forward"))
            self._put(module, Hook(before, self._projection(name, module, before)))
        before = previous(whole, whole.__dict__.get("forward"))
        self._put(whole, Hook(before, self._forward(before, _split_a1111, self._rows_a1111)))

    def _put(self, module: nn.Module, hook: Hook) -> None:
        self._found.append((module, hook, module.__dict__.get("forward")))
        module.forward = hook

    def _patch_forge(self) -> None:
        self._patcher = self.model.forge_objects.unet.clone()
        for name, module in self._projector.modules.items():
            path = f"diffusion_model.{name}.forward"
            before = previous(module, self._patcher.object_patches.get(path) or module.__dict__.get("forward"))
            self._patcher.add_object_patch(path, Hook(before, self._projection(name, module, before)))
        path = "diffusion_model.forward"
        before = previous(self.unet, self._patcher.object_patches.get(path) or self.unet.__dict__.get("forward"))
        self._patcher.add_object_patch(path, Hook(before, self._forward(before, _split_forge, self._rows_forge)))
        self._before_clone, self.model.forge_objects.unet = self.model.forge_objects.unet, self._patcher

    @property
    def _projector(self) -> KVProjector:
        assert self.projector is not None
        return self.projector

    def _projection(self, name: str, module: nn.Module, before: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        weight = before.plain_weight if isinstance(before, ClassForward) else lambda: None
        patched = self._projector.wrap(name, module, before, weight)
        return lambda context: patched(context) if self.projector is not None else before(context)

    def _forward(self, before: Callable[..., Any], split: Callable[..., Any], rows: Callable[..., Tensor]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = split(args, kwargs)
            if self.projector is None or call is None:
                return before(*args, **kwargs)
            given, vector, again = call
            plain = _unmarked(given)
            table = self.tables.base if self.tables.uniform else rows(plain, kwargs)
            whole = self._edited(given, table)
            context, unedited = _unmarked(whole), None if whole is given else plain
            if vector is not None:
                vector = self._replace_pooled(vector, plain, table)
            args, kwargs = again(whole, vector)
            with self.projector.forward_pass(table, context, self.tables.base, self._say_unknown, _loras(), unedited):
                if self.settings.backend == "fused":
                    self._say_why_not_fused(context)
                return before(*args, **kwargs)

        return forward

    def _say_unknown(self) -> None:
        self.say(UNKNOWN_ROWS)

    def _say_why_not_fused(self, context: Tensor) -> None:
        reason = self._projector.why_not_fused(context)
        if reason is not None:
            self.say(f"backend fused: {reason}.")

    def _replace_pooled(self, vector: Tensor, context: Tensor, table: Tensor) -> Tensor:
        widths = {d.pooled.down.shape[1] for d in self.tables.composition.deltas if d.pooled is not None}
        if not widths:
            return vector
        width = widths.pop()
        pooled = self.tables.composition.replace_pooled(vector[:, :width], context, table, self.settings.gate)
        return torch.cat([pooled, vector[:, width:]], dim=1)

    def _edited(self, given: Tensor, table: Tensor) -> Tensor:
        """Contexts as the edit leaves them, themselves where no row is touched."""
        if not any(d.edits_context for d in self.tables.composition.deltas):
            return given
        context = _unmarked(given)
        edited = self._edit_once(context, table)
        return given if edited is None else torch.cat([given[:, : given.shape[1] - context.shape[1]], edited], dim=1)

    def _edit_once(self, context: Tensor, table: Tensor) -> Tensor | None:
        """The edited contexts, computed once for all steps with the same; None where no row is touched."""
        for known, strengths, edited in self._seen:
            alike = known.dtype == context.dtype and known.device == context.device
            if alike and torch.equal(strengths, table) and torch.equal(known, context):
                return edited
        result = self.tables.composition.edit_context(context, table, self.settings.gate)
        edited = None if result is context else result
        self._seen = [(context.clone(), table.clone(), edited), *self._seen[: SEEN - 1]]
        return edited

    def _edited_cond(self, cond: Any, table: Tensor) -> Any:
        """What the hosts call a cond, edited; of SDXL a mapping, in which the pooled vector is replaced too."""
        if not isinstance(cond, Mapping):
            return self._edited(cond, table)
        changed: Any = copy.copy(cond)
        changed["crossattn"] = self._edited(cond["crossattn"], table)
        if "vector" in cond:
            changed["vector"] = self._replace_pooled(cond["vector"], _unmarked(cond["crossattn"]), table)
        return changed

    def expect(self, params: Any) -> None:
        """A denoising step begins; ``params`` are what the host tells its callbacks of it, and takes back from them."""
        cond, uncond = (_unmarked(crossattn(c)) for c in (params.text_cond, params.text_uncond))
        negatives = () if uncond is None else uncond
        self._step, self._next = self._rows_of_step(cond, negatives), 0
        if self.projector is not None:  # then the context is edited where the model gets it, beside what its layers need of it
            return
        if self._step is None and not self.tables.uniform:
            self._say_unknown()
        rows = (self.tables.base,) * 2 if self._step is None else self._step[1].split([len(cond), len(negatives)])
        params.text_cond = self._edited_cond(params.text_cond, rows[0])
        if uncond is not None:
            params.text_uncond = self._edited_cond(params.text_uncond, rows[1])

    def _rows_of_step(self, cond: Tensor, negatives: Sequence[Tensor] | Tensor) -> tuple[list[Tensor], Tensor] | None:
        """The prompts of a step, then the negative prompts, and their strengths; None where their number is not the host's."""
        images, parts = len(self.tables.positive), [1] * len(cond)
        with suppress(AttributeError, TypeError, IndexError):
            parts = [len(prompts) for prompts in self.p.get_conds()[0].batch]
        if len(parts) != images or sum(parts) != len(cond) or len(negatives) not in (0, images):
            return None
        owner = [image for image, count in enumerate(parts) for _ in range(count)]
        return [*cond, *negatives], torch.cat([self.tables.positive[owner], self.tables.negative[: len(negatives)]])

    def _rows_a1111(self, context: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Prompts (with AND several an image), then negative prompts, in one call or in several; extensions leave calls out."""
        if self._step is None:
            self._say_unknown()
            return self.tables.base
        match = row_strengths(context, self._step[1], self.tables.base, self._step[0], order=(), start=self._next)
        self._next = match.next
        return self._known(match)

    def _rows_forge(self, context: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        kinds = (kwargs.get("transformer_options") or {}).get("cond_or_uncond") or ()
        order = chunked(len(context), kinds, len(self.tables.positive))
        return self._known(row_strengths(context, torch.cat([self.tables.positive, self.tables.negative]), self.tables.base, order=order))

    def _known(self, match: Match) -> Tensor:
        if not match.known:
            self._say_unknown()
        return match.strengths

    def detach(self) -> None:
        """Leave the model as it was found; hooks that another owner still holds do nothing from now on."""
        for module, hook, found in reversed(self._found):
            if module.__dict__.get("forward") is hook:
                if found is None:
                    del module.forward
                else:
                    module.forward = found
        self._found.clear()
        if self._patcher is not None and self.model.forge_objects.unet is self._patcher:
            self.model.forge_objects.unet = self._before_clone
        self._patcher = self._before_clone = None
        if self.projector is not None:
            self.projector.clear()
        self.projector = self._step = None

    def prepare(self, params: Any) -> None:
        """Load the patches of a model that was changed in the middle of a run; Forge loads before the first step only."""
        if self._patcher is not None:
            load_forge(self._patcher, params.x)


def _unmarked(context: Tensor | None) -> Any:
    """Without the token of ±1024 that ControlNet puts before every prompt and its own ``forward`` takes off again."""
    if context is None or context.shape[1] % CHUNK != 1 or not bool((context[:, 0].abs() == MARK).all()):
        return context
    return context[:, 1:]


def _split_a1111(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Context, vector and how to call with others, of ``DiffusionWrapper`` (SD1, SD2) or ``OpenAIWrapper`` (SDXL)."""
    if len(args) > 2 and isinstance(args[2], Mapping):
        cond = args[2]
        return cond["crossattn"], cond.get("vector"), lambda c, v: ((*args[:2], _changed(cond, crossattn=c, vector=v), *args[3:]), kwargs)
    given = kwargs.get("c_crossattn")
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        return given, None, lambda c, v: (args, _changed(kwargs, c_crossattn=c))
    return torch.cat(given, 1), None, lambda c, v: (args, _changed(kwargs, c_crossattn=[c]))


def _split_forge(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    context = kwargs.get("context")
    return None if context is None else (context, kwargs.get("y"), lambda c, v: (args, _changed(kwargs, context=c, y=v)))


def _changed(facts: Mapping[str, Any], **new: Any) -> dict[str, Any]:
    """The same with other values; None is no value."""
    return {**facts, **{name: value for name, value in new.items() if value is not None}}
