"""Noise schedules against their equations in float64 and against diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sepme.model.schedule import Prediction, Schedule

SHAPE = (3, 4, 5, 5)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def ddim(prediction: Prediction = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noised_latents_follow_the_equation(prediction: Prediction) -> None:
    """``√ᾱ x_0 + √(1−ᾱ) ε`` in float64, and diffusers' own ``add_noise``."""
    scheduler, t = ddim(prediction), torch.tensor([0, 400, 999])
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, prediction)
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)[t].reshape(-1, 1, 1, 1)
    x_0, noise = latents(0), latents(1)
    expected = alphas.sqrt() * x_0.double() + (1 - alphas).sqrt() * noise.double()
    torch.testing.assert_close(schedule.noised(x_0, noise, t).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.noised(x_0, noise, t), scheduler.add_noise(x_0, noise, t))
    assert schedule.noised(x_0.half(), noise, t).dtype == torch.float16


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noised_latents_of_a_flow_lie_on_a_line(shift: float) -> None:
    """``(1 − s) x_0 + s ε``, s from just above 0 to 1, shifted as ``k s / (1 + (k − 1) s)``."""
    schedule, t = Schedule.flow(1000, shift), torch.tensor([0, 499, 999])
    even = (t.double() + 1) / 1000
    s = (shift * even / (1 + (shift - 1) * even)).reshape(-1, 1, 1, 1)
    x_0, noise = latents(0), latents(1)
    torch.testing.assert_close(schedule.noised(x_0, noise, t).double(), (1 - s) * x_0.double() + s * noise.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(schedule.noised(x_0, noise, t)[2], noise[2])
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(schedule.s.flip(0), theirs.sigmas.float(), rtol=1e-6, atol=1e-7)


def test_what_objectives_compare() -> None:
    """v becomes ε, exactly the noise that was added where v is right; ε and a flow's velocity stay as they are."""
    x_0, noise, t = latents(0), latents(1), torch.tensor([1, 500, 998])
    diffusion = Schedule.diffusion(ddim().alphas_cumprod, "v_prediction")
    a, s = diffusion.at(t, x_0)
    v = a.double() * noise.double() - s.double() * x_0.double()
    torch.testing.assert_close(diffusion.linear(v.float(), diffusion.noised(x_0, noise, t), t), noise, rtol=1e-5, atol=1e-5)
    for schedule in (Schedule.diffusion(ddim().alphas_cumprod), Schedule.flow()):
        assert schedule.linear(noise, x_0, t) is noise
    flow = Schedule.flow()
    torch.testing.assert_close(flow.step(flow.noised(x_0, noise, t), flow.target(x_0, noise), int(t[0]), None)[0], x_0[0])
    torch.testing.assert_close(diffusion.target(x_0, noise), noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [8, 25, 50])
def test_a_run_is_diffusers_ddim(prediction: Prediction, steps: int) -> None:
    """Every step of a run with a model whose answer depends on x and t; the last ends at the least noise, not at none."""
    scheduler = ddim(prediction)
    scheduler.set_timesteps(steps)
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, prediction)
    times = schedule.times(steps).tolist()
    assert times == scheduler.timesteps.tolist()
    ours = theirs = latents(0)
    for t, following in zip(times, [*times[1:], 0], strict=True):
        predicted = torch.tanh(ours + t / 1000)
        theirs = scheduler.step(predicted, t, theirs).prev_sample
        ours = schedule.step(ours, schedule.linear(predicted, ours, torch.full((3,), t)), t, following)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_step_is_eulers(shift: float) -> None:
    """``x + (s' − s) u`` in float64, and diffusers' scheduler; a run begins at pure noise and ends at clean latents."""
    schedule, theirs = Schedule.flow(1000, shift), FlowMatchEulerDiscreteScheduler(shift=1.0)
    times = schedule.times(25).tolist()
    assert float(schedule.s[times[0]]) == 1.0
    theirs.set_timesteps(sigmas=schedule.s[times].tolist())
    x = latents(0)
    for i, (t, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
        velocity = torch.tanh(x - t / 1000)
        end = 0.0 if following is None else schedule.s[following].double()
        stepped = schedule.step(x, velocity, t, following)
        torch.testing.assert_close(stepped.double(), x.double() + (end - schedule.s[t].double()) * velocity.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stepped, theirs.step(velocity, theirs.timesteps[i], x).prev_sample, rtol=1e-5, atol=1e-5)
        x = stepped


@pytest.mark.parametrize("schedule", [Schedule.diffusion(ddim().alphas_cumprod), Schedule.flow()], ids=["diffusion", "flow"])
def test_times_descend_inside_the_schedule(schedule: Schedule) -> None:
    for steps in (1, 7, 25, 50, 999):
        times = schedule.times(steps)
        assert times.dtype == torch.int64
        assert len(times) == steps
        assert (times[1:] < times[:-1]).all()
        assert int(times[-1]) >= 0
        assert int(times[0]) < len(schedule)


def test_the_true_noise_leads_to_the_clean_latents() -> None:
    """x̂_0 of one step from any timestep, with the noise (or velocity) that was really added."""
    x_0, noise = latents(0), latents(1)
    for schedule, told in ((Schedule.diffusion(ddim().alphas_cumprod), noise), (Schedule.flow(), noise - x_0)):
        for t in (1, 300, 900):
            x_t = schedule.noised(x_0, noise, torch.full((3,), t))
            torch.testing.assert_close(schedule.step(x_t, told, t, None), x_0, rtol=1e-3, atol=1e-4)
