"""Objectives that are trained, on models that are no UNets: diffusers' real classes, tiny, of diffusion and of flow."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from planning import OPTIONS, HashedEncoder, book_of
from tiny import diffusers_models
from tiny.probe import WIDTH, Tiny
from torch import Tensor

from sepme.apply.composition import Composition
from sepme.apply.projector import KVProjector
from sepme.delta.concept_delta import ConceptDelta
from sepme.errors import SepMEError
from sepme.model.blocks import TextBlocks
from sepme.model.protocols import Encoding
from sepme.model.schedule import Schedule, ScheduledDenoiser
from sepme.plan.planner import Planner
from sepme.train import TrainOptions
from sepme.train.increment import Increment
from sepme.train.make import make_delta
from sepme.train.passes import make_step
from sepme.train.source import Draw

CASES = {"pixart": "layers", "wan": "layers", "hunyuan_dit": "layers", "chroma": "context"}  # and what is edited
DIFFUSION = {"pixart", "hunyuan_dit"}


class Reader(HashedEncoder):
    """Prompts of the tiny models' width, with what else each is given."""

    def __init__(self, tiny: Tiny) -> None:
        super().__init__()
        self._pooled = tiny.texts.get("pooled")

    def encode(self, prompts: Sequence[str]) -> Encoding:
        encoding = super().encode(prompts)
        pooled = None if self._pooled is None else encoding.context[:, -1, -self._pooled[0] :].clone()
        return Encoding(encoding.context[..., :WIDTH].contiguous(), encoding.mask, pooled)


class Host(ScheduledDenoiser):
    """A tiny model as denoiser; texts that no prompt is read for are the same for all."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, name: str, tiny: Tiny) -> None:
        self.tiny = tiny
        alphas = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod
        self.schedule = Schedule.diffusion(alphas) if name in DIFFUSION else Schedule.flow()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.tiny.image

    def attention_layers(self) -> Any:
        return TextBlocks.of(self.tiny.model) or {}

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Any) -> Tensor:
        texts = {group: rows[:1].repeat(len(x), *[1] * (rows.dim() - 1)) for group, rows in self.tiny.draw(1, 3).items()}
        texts |= {"context": context} | ({} if extra is None else {"pooled": extra})
        out = self.tiny.call(x, (t.float() + 1) / self.timesteps, texts)
        return out[:, : x.shape[1]] if self.tiny.image[0] == 4 else out  # some predict a variance too


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model, its planner and a trained delta of the star."""
    tiny = diffusers_models.build(request.param)
    host = Host(request.param, tiny)
    planner = Planner(Reader(tiny), book_of(3), OPTIONS, ())
    options = TrainOptions(edit=CASES[request.param], steps=60, trajectories=2, warm_start=False, learning_rate=0.05)
    return SimpleNamespace(host=host, planner=planner, options=options, delta=make_delta(planner, "star", host, options))


def test_the_loss_falls_and_directions_spare_the_others(case: SimpleNamespace) -> None:
    delta: ConceptDelta = case.delta
    losses = delta.facts.losses
    assert len(losses) < 60, "the momentum stop ends it"
    assert min(losses) <= 0 < losses[0]
    assert torch.equal(delta.down, case.planner.plan("star").down)
    for name in ("circle", "heart"):
        known = case.planner.prompts.rows(name)
        assert float((known @ delta.down.double().T).norm(dim=-1).max()) < 0.1 * float(known.norm(dim=-1).max())


@torch.no_grad()
def test_what_was_trained_is_what_acts(case: SimpleNamespace) -> None:
    """The prediction with the delta is that of training; in one batch the star moves, others and a restored star keep their bits."""
    host, planner, delta = case.host, case.planner, case.delta
    encoding = Encoding(*(torch.cat([planner.prompts.encodings[n][i][:1] for n in ("star", "heart", "circle", "star")]) for i in (0, 1)))
    x, t = host.latents([3] * 4), torch.full((4,), 500)
    composition, blocks = Composition((delta,)), host.attention_layers()
    on, mixed = torch.ones(4, 1), torch.tensor([[1.0], [1.0], [1.0], [0.0]])

    def predict(strengths: Tensor, gate: bool) -> Tensor:
        edited = composition.edit_context(encoding.context, strengths, gate)
        if not composition.columns:
            return host.predict(x, t, edited, extra)
        with KVProjector(blocks, composition, gate).attached(strengths, encoding.context):
            return host.predict(x, t, edited, extra)

    pooled = planner.prompts.encodings["star"].pooled
    extra = None if pooled is None else pooled[:1].expand(4, -1)
    stock, erased = host.predict(x, t, encoding.context, extra), predict(mixed, True)
    assert [i for i in range(4) if not torch.equal(erased[i], stock[i])] == [0]
    increment = Increment.zeros({n: torch.zeros(len(y), delta.d_in) for n, y in delta.up.items()}, delta.down, 1.0)
    increment.fill({n: delta.up_factor(n) for n in delta.up})
    run: Any = SimpleNamespace(pooled=None, own=encoding, words=None, empty=encoding.rows([0]), anchor=encoding.rows([0]))
    step = make_step(run, [increment], host, Draw(x, t, torch.arange(4)))
    torch.testing.assert_close(step.erased(encoding._replace(pooled=extra)), predict(on, False), rtol=1e-4, atol=1e-5)


def test_what_is_refused(case: SimpleNamespace) -> None:
    """What only cross-attention of UNets has, or a model of which only the layers are at hand."""
    blocks = case.host.attention_layers()
    if not blocks:
        return
    for options, said in ((TrainOptions.for_mode(objective="fmn"), "objective fmn"), (TrainOptions.for_mode("paper"), "mode paper")):
        with pytest.raises(SepMEError, match=f"The {said} is for Stable Diffusion"):
            make_delta(case.planner, "star", case.host, options)
    with pytest.raises(SepMEError, match="through the whole model"):
        make_delta(case.planner, "star", blocks, case.options)
