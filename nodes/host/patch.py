"""Deltas on a MODEL: edited contexts, patched keys and values, every prompt's own strengths in one batch, nothing left after a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from comfy.conds import CONDCrossAttn, CONDRegular
from comfy.ops import disable_weight_init
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...sepme.apply.composition import Composition
from ...sepme.apply.kv_cache import room
from ...sepme.apply.projector import KVProjector
from ...sepme.apply.row_strengths import row_strengths
from ...sepme.apply.toggles import Toggles, merge, strengths
from ...sepme.delta.concept_delta import ConceptDelta
from ...sepme.delta.verify import check_named_encoder, encoder_warnings
from ...sepme.model.layers import projections, shapes
from .denoiser import changeable_layers
from .language import OTHERS, adapts, encoder_name, readable
from .page import notice

KEY = "sepme"  # of everything that is put on a patcher or into a CONDITIONING
UNEDITED = "sepme_unedited"  # of a prompt's context before it was edited, among what a model is called with
TOGGLES, TAGS = "toggles", "tags"  # of CONDITIONING[KEY]: set by nodes, and by the prompt's own text, which beats them
SKIP = "clip_skip"  # of CONDITIONING[KEY]: of the CLIP that read the text, where one of our nodes had it read

log = logging.getLogger("sepme")


class Applied:
    """What a patched MODEL carries. It acts during a sampling run only, from ON_PRE_RUN to ON_CLEANUP.

    Args:
        composition: all deltas of the MODEL.
        toggles: for prompts that say nothing themselves.
        inner: what the patches stand before.
        adapts: whether the model makes another context of the text encoder's, which is edited then.
    """

    def __init__(
        self, composition: Composition, toggles: Toggles, gate: bool, backend: str, inner: Mapping[str, Callable[..., Any]], adapts: bool
    ) -> None:
        self.composition, self.toggles, self.gate, self.backend, self.inner = composition, dict(toggles), gate, backend, dict(inner)
        self.adapts = adapts
        self.default = self._strengths({})
        self._projectors: dict[int, KVProjector] = {}  # by model object: hosts with several GPUs run copies of one model
        self._current = threading.local()
        self._running, self._keep = False, True
        self._said: set[str] = set()

    def _strengths(self, own: Mapping[str, Toggles]) -> Tensor:
        """``(N,)`` of a CONDITIONING."""
        return strengths([merge(self.toggles, own.get(TOGGLES, {}), own.get(TAGS, {}))], self.composition.deltas)[0]

    def start(self, patcher: Any) -> None:
        """A sampling run begins: cached keys and values of an earlier one go."""
        self._projectors.clear()
        self._running = True
        self._keep = not getattr(patcher, "hook_patches", None)  # hooks change weights in place, unseen, between two forwards

    def stop(self, patcher: Any) -> None:
        """A sampling run is over: nothing acts until the next."""
        self._projectors.clear()
        self._running = False

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """ComfyUI's own, of the edited context; and for per-layer deltas the strengths ``(1, N)`` and, where the context is edited too,
        the context as it was. ComfyUI lays them side by side in the order of the rows of each batch.

        Every prompt gets them: prompts with other keys would go in a batch of their own.
        """
        inner = self.inner["extra_conds"]
        if not self._running:
            return inner(**kwargs)
        facts = kwargs.pop(KEY, None) or {}
        own = self._strengths(facts)
        if SKIP in facts:
            for warning in encoder_warnings(self.composition.deltas, facts[SKIP]):
                self._say(warning)
        if bool(((own < 0) | (own > 1)).any()):
            self._say("A strength lies outside 0 to 1: negative ones amplify the concept, larger ones overshoot.")
        pooled, context = kwargs.get("pooled_output"), kwargs.get("cross_attn")
        if pooled is not None and context is not None and any(d.pooled is not None for d in self.composition.deltas):
            kwargs["pooled_output"] = self.composition.replace_pooled(pooled, context, own, self.gate)
        more: dict[str, Any] = {KEY: CONDRegular(own[None])} if self.composition.columns else {}
        if context is None:
            return inner(**kwargs) | more
        kwargs |= self._other_texts(kwargs, own)
        read, kind = context, CONDCrossAttn
        if not self.adapts:
            read = readable(context, kwargs.get("attention_mask"))
            edited = self.composition.edit_context(read, own, self.gate)
            kwargs["cross_attn"] = context if edited is read else edited
        made = inner(**kwargs)
        if self.adapts:
            context, kind = made["c_crossattn"].cond, type(made["c_crossattn"])
            read = context
            made = made | {"c_crossattn": kind(self.composition.edit_context(context, own, self.gate))}
        if more and (read is not context or any(d.edits_context for d in self.composition.deltas)):
            more[UNEDITED] = kind(read)
        return made | more

    def _other_texts(self, kwargs: dict[str, Any], own: Tensor) -> dict[str, Any]:
        """The edited texts of a CONDITIONING beside its context, by their place in it."""
        edited: dict[str, Any] = {}
        for text in self.composition.parts:
            name, _, index = text.partition(".")
            key = OTHERS[name]
            whole = edited.get(key, kwargs.get(key))
            if whole is None:
                continue
            part = whole[:, int(index)] if index else whole
            changed = self.composition.edit_part(text, part, own, self.gate)
            if changed is not part:
                edited[key] = whole.clone() if index and key not in edited else whole if index else changed
                if index:
                    edited[key][:, int(index)] = changed
        return edited

    def apply_model(
        self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Wrapper of one forward pass: the rows' strengths are taken out of the arguments and hold until it returns."""
        rows, unedited, model = kwargs.pop(KEY, None), kwargs.pop(UNEDITED, None), executor.class_obj
        arguments = (x, t, c_concat, c_crossattn, control, {} if transformer_options is None else transformer_options)
        if c_crossattn is None:
            return executor(*arguments, **kwargs)
        projector = self._projectors.get(id(model))
        if projector is None:
            projector = self._projectors[id(model)] = self._projector(model)
            if self.backend == "fused":
                self._say_why_not_fused(projector, c_crossattn)
        known = self._rows(rows, c_crossattn)
        unknown = self._unknown_tokens if projector.embedded else self._unknown_rows
        with projector.forward_pass(known, c_crossattn, self.default, unknown, unedited=unedited):
            self._current.projector = projector
            try:
                return executor(*arguments, **kwargs)
            finally:
                self._current.projector = None

    def _projector(self, model: Any) -> KVProjector:
        kept = room(model.diffusion_model)
        projector = KVProjector(changeable_layers(model), self.composition, self.gate, self._keep, kept, self.backend)
        for name, module in projector.modules.items():
            inner = self._inner(name, module)
            projector.wrap(name, module, inner, partial(_plain_weight, module, inner))
        return projector

    def _say_why_not_fused(self, projector: KVProjector, context: Tensor) -> None:
        """Once, where ``fused`` was chosen and something else runs."""
        reason = projector.why_not_fused(context)
        if reason is not None:
            self._say(f"Backend fused: {reason}.")

    def _inner(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """What the patch stands before: of a module's own forward that of the running model's module, which may be another object."""
        inner = self.inner[name]
        return MethodType(inner.__func__, module) if isinstance(inner, MethodType) and isinstance(inner.__self__, nn.Module) else inner

    def _rows(self, rows: Tensor | None, context: Tensor) -> Tensor:
        if rows is None:  # a caller that makes its arguments itself
            return self.default
        match = row_strengths(context, rows.to("cpu", torch.float32), self.default)
        if not match.known:
            self._say("Another extension split or joined the batch of prompts; all of it gets the toggles of SepME Apply.")
        return match.strengths

    def _unknown_rows(self) -> None:
        self._say("Another extension added prompts to the batch (attention couple?); those get the toggles of SepME Apply.")

    def _unknown_tokens(self) -> None:
        self._say("Another extension added or left out prompts or words of the batch; deltas of layers do nothing there.")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)
            notice(text)

    @torch.compiler.disable  # a compiled MODEL calls it as it is: what it does changes with every prompt
    def project(self, name: str, context: Tensor) -> Tensor | None:
        """Keys or values of the model that runs at the moment; None when none does."""
        projector: KVProjector | None = getattr(self._current, "projector", None)
        if projector is None:
            return None
        module = projector.modules[name]
        return projector.project(name, module, self._inner(name, module), context)

    def __deepcopy__(self, memo: Any) -> Applied:
        """One for all copies of a model."""
        return self


def _plain_weight(module: nn.Module, forward: Any) -> Tensor | None:
    """The weight of a projection that is a plain product at the moment: not cast, not patched while it runs, not another extension's."""
    if getattr(forward, "__func__", None) is not type(module).forward or not isinstance(module, disable_weight_init.Linear):
        return None
    busy = module.comfy_cast_weights or module.weight_function or module.bias_function or module.bias is not None
    return None if busy else module.weight


class _Projection:
    """``to_k.forward`` or ``to_v.forward``. In a deep copy of the model ``inner`` is the copy's own."""

    def __init__(self, applied: Applied, name: str) -> None:
        self.applied, self.name, self.inner = applied, name, applied.inner[name]

    def __call__(self, context: Tensor) -> Tensor:
        out = self.applied.project(self.name, context)
        return self.inner(context) if out is None else out


def _inner(found: Any, name: str, before: Applied | None) -> Any:
    """What a patch stands before: what is there, or what an earlier one of ours stood before, which it replaces."""
    owner = found.applied if isinstance(found, _Projection) else getattr(found, "__self__", None)
    return before.inner[name] if before is not None and owner is before else found


def apply_deltas(patcher: Any, deltas: tuple[ConceptDelta, ...], toggles: Toggles, gate: bool = True, backend: str = "auto") -> Any:
    """A clone of a MODEL with deltas on it; those that it carries already stay, with their toggles where the new ones say nothing.

    Raises:
        SepMEError: deltas for another model or text encoder, two of one concept, toggles of unknown concepts; per-layer deltas and no
            layers that could be changed.
    """
    clone = patcher.clone()
    before: Applied | None = patcher.get_attachment(KEY)
    if before is not None:
        deltas, toggles = before.composition.deltas + tuple(deltas), merge(before.toggles, toggles)
    if not deltas:
        return clone
    composition = Composition(tuple(deltas))
    if any(delta.edits_context for delta in deltas):
        check_named_encoder(deltas, encoder_name(patcher))
    layers = changeable_layers(patcher.model) if composition.columns else {}
    modules = projections(layers)
    for delta in deltas if modules else ():
        delta.check_fits(shapes(layers), "this MODEL")
    paths = {name: f"diffusion_model.{name}.forward" for name in modules} | {"extra_conds": "extra_conds"}
    inner = {name: _inner(patcher.get_model_object(path), name, before) for name, path in paths.items()}
    applied = Applied(composition, toggles, gate, backend, inner, adapts(patcher.model))
    for name, path in paths.items():
        clone.add_object_patch(path, applied.extra_conds if name == "extra_conds" else _Projection(applied, name))
    clone.set_attachments(KEY, applied)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    if modules:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, applied.apply_model)
    for call, function in ((CallbacksMP.ON_PRE_RUN, applied.start), (CallbacksMP.ON_CLEANUP, applied.stop)):
        clone.remove_callbacks_with_key(call, KEY)
        clone.add_callback_with_key(call, KEY, function)
    return clone


def deltas_on(patcher: Any) -> tuple[ConceptDelta, ...]:
    """The deltas that a MODEL carries."""
    applied: Applied | None = patcher.get_attachment(KEY)
    return () if applied is None else applied.composition.deltas


def toggled(
    conditioning: list[Any], toggles: Toggles | None = None, tags: Toggles | None = None, clip_skip: int | None = None
) -> list[Any]:
    """A CONDITIONING that carries toggles, set by a node, and tags of its own text; those that it carries already count where not named.

    It may also carry the clip skip that it was read with.
    """
    result = []
    for tensor, facts in conditioning:
        own = facts.get(KEY, {})
        merged = {**own, TOGGLES: merge(own.get(TOGGLES, {}), toggles or {}), TAGS: merge(own.get(TAGS, {}), tags or {})}
        if clip_skip is not None:
            merged[SKIP] = clip_skip
        result.append([tensor, {**facts, KEY: merged}])
    return result
