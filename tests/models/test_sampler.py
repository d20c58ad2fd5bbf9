"""Sampling agrees with diffusers, hands over by noise level, and draws every image from its own seed."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from diffusers.utils.torch_utils import randn_tensor

from configs import UserError
from models.architectures.unets import guidance_features
from models.families import Family, place
from models.noise import CLEAN, Noise, ancestral, flow, flow_at, to_eps, to_x0, vp, vp_at
from models.plans import hybrid, late, named, skip
from models.prompts import Prompts
from models.sampler import (
    Denoiser,
    Member,
    Plan,
    Stage,
    alone,
    draw_noise,
    during,
    finish,
    levels_of,
    sample,
    update,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False}  # its default is True
TEXTS = ["portrait of a person, glasses, brown hair", "portrait of a person, hat, purple background"]
SEEDS = [5, 17]
DMD2 = [999, 749, 499, 249]


@pytest.fixture(scope="session")
def tiny():
    """The embedded family, in fp32."""
    return Family("tiny", dtype=torch.float32)


@pytest.fixture(scope="session")
def pipe(tiny):
    """The embedded base as diffusers alone loads it, in fp32."""
    pipe = StableDiffusionXLPipeline.from_pretrained(place(tiny.card.repo), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_latents(pipe, scheduler, guidance: float | None, seeds=SEEDS, **options) -> torch.Tensor:
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # 0 is diffusers' word for conditional only
    return pipe(
        TEXTS[: len(seeds)],
        guidance_scale=guidance or 0,
        generator=generators,
        output_type="latent",
        **options,
    ).images


def our_latents(family: Family, member: Member, texts=TEXTS, seeds=SEEDS, negative=None) -> torch.Tensor:
    return finish(
        alone(member),
        draw_noise(seeds, family.latent_shape, len(member.levels)),
        family.encode(texts, negative),
    )


def sampler(
    family: Family, guidance: float | None, spacing: str = "", steps: int = 0, explicit=(), **options
) -> Member:
    """The embedded base, sampled in another way."""
    net = family.member("base").denoiser.net
    return Member(
        "tiny/base", Denoiser(net), levels_of("vp", spacing, steps, explicit), guidance=guidance, **options
    )


EULERS = {
    "euler": (EulerDiscreteScheduler, 0.0),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, ancestral),
}


@pytest.mark.parametrize("guidance", [None, 3.0])
class TestParity:
    """The same seeds through diffusers' own pipeline and through ours."""

    def test_ddim_leading(self, tiny, pipe, guidance):
        scheduler = DDIMScheduler(**DDIM, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
        ours = our_latents(tiny, sampler(tiny, guidance, "leading", 5, final=vp(0)))
        assert torch.allclose(
            ours, diffusers_latents(pipe, scheduler, guidance, num_inference_steps=5), atol=1e-4, rtol=0
        )

    def test_ddim_trailing(self, tiny, pipe, guidance):
        scheduler = DDIMScheduler(**DDIM, timestep_spacing="trailing")
        ours = our_latents(tiny, sampler(tiny, guidance, "trailing", 5))
        assert torch.allclose(
            ours, diffusers_latents(pipe, scheduler, guidance, num_inference_steps=5), atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize(
        ("spacing", "start"), [("leading", "unit"), ("trailing", "sigma"), ("linspace", "sigma")]
    )
    @pytest.mark.parametrize("prediction_type", EULERS)
    def test_euler(self, tiny, pipe, prediction_type, spacing, start, guidance):
        build, eta = EULERS[prediction_type]
        scheduler = build(**BETAS, timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
        ours = our_latents(tiny, sampler(tiny, guidance, spacing, 4, start=start, eta=eta))
        assert torch.allclose(
            ours, diffusers_latents(pipe, scheduler, guidance, num_inference_steps=4), atol=1e-4, rtol=0
        )

    def test_lcm(self, tiny, pipe, guidance):
        ours = our_latents(tiny, sampler(tiny, guidance, explicit=[999, 759, 499, 259], eta=1.0))
        theirs = diffusers_latents(pipe, LCMScheduler(**DDIM), guidance, num_inference_steps=4)
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)

    def test_lcm_with_the_timesteps_of_dmd2(self, tiny, pipe, guidance):
        ours = our_latents(tiny, sampler(tiny, guidance, explicit=DMD2, eta=1.0))
        assert torch.allclose(
            ours, diffusers_latents(pipe, LCMScheduler(**DDIM), guidance, timesteps=DMD2), atol=1e-4, rtol=0
        )


def test_negative_prompts_are_those_of_diffusers(tiny, pipe):
    away = ["hat", "blue background"]
    theirs = diffusers_latents(pipe, LCMScheduler(**DDIM), 3.0, timesteps=DMD2, negative_prompt=away)
    ours = our_latents(tiny, sampler(tiny, 3.0, explicit=DMD2, eta=1.0), negative=away)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, our_latents(tiny, sampler(tiny, 3.0, explicit=DMD2, eta=1.0)), atol=1e-2)


def test_an_image_is_the_same_alone_and_in_a_batch(tiny):
    member = sampler(tiny, 3.0, "leading", 4, eta=1.0)
    both = our_latents(tiny, member)
    for i in range(2):
        assert torch.allclose(
            our_latents(tiny, member, TEXTS[i : i + 1], SEEDS[i : i + 1]),
            both[i : i + 1],
            rtol=1e-5,
            atol=2e-5,
        )


# one update against one scheduler.step


def states() -> list[torch.Tensor]:
    """An x, a network output and fresh noise, (2, 4, 8, 8)."""
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 8, 8, generator=rng) for _ in range(3)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("prediction_type", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("sample", "sample")]
)
def test_update_is_a_step_of_ddim(prediction_type, name, eta):
    """DDIM's eta 1 is DDPM, and the same share of fresh noise as Euler-ancestral's."""
    x, out, fresh = states()
    scheduler = DDIMScheduler(
        **DDIM, prediction_type=name, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False
    )
    scheduler.set_timesteps(5)
    levels = [*levels_of("vp", "leading", 5), vp(0)]
    for now, after in zip(levels, levels[1:], strict=False):
        theirs = scheduler.step(out, int(now.t), x, eta=eta, variance_noise=fresh if eta else None)
        x0 = to_x0(x, out, now, prediction_type)
        ours = update(x, x0, now, after, ancestral if eta else 0.0, fresh)
        assert torch.allclose(x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        assert torch.allclose(
            ours, theirs.prev_sample, rtol=1e-5, atol=1e-4 if prediction_type == "sample" else 1e-5
        )  # /sigma, float32 near t = 0


@pytest.mark.parametrize(("prediction_type", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_update_is_a_step_of_euler_at_another_scale(prediction_type, name):
    """x_VE = x_VP sqrt(1 + ratio^2)."""
    x, out, _ = states()
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=name, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    levels = [*levels_of("vp", "trailing", 4), CLEAN]
    for t, now, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        theirs = (
            scheduler.step(out, t, x * (1 + now.ratio**2) ** 0.5).prev_sample / (1 + after.ratio**2) ** 0.5
        )
        assert torch.allclose(
            update(x, to_x0(x, out, now, prediction_type), now, after), theirs, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_update_is_a_step_of_flow_matching(shift):
    x, out, _ = states()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    levels = [*(flow(t, shift) for t in (1000, 750, 500, 250)), CLEAN]
    for t, now, after in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        theirs = scheduler.step(out, t, x).prev_sample
        assert torch.allclose(update(x, to_x0(x, out, now, "flow"), now, after), theirs, rtol=1e-5, atol=1e-5)


def test_update_is_a_step_of_lcm():
    x, out, _ = states()
    scheduler = LCMScheduler(**DDIM)
    scheduler.set_timesteps(timesteps=DMD2)
    levels = levels_of("vp", "", 0, DMD2)
    for now, after in zip(levels, levels[1:], strict=False):
        rng = torch.Generator().manual_seed(1)
        theirs = scheduler.step(out, int(now.t), x, generator=rng).prev_sample
        fresh = torch.randn(x.shape, generator=rng.manual_seed(1))
        assert torch.allclose(
            update(x, to_x0(x, out, now, "eps"), now, after, 1.0, fresh), theirs, rtol=1e-5, atol=1e-5
        )


def test_update_takes_eta_as_a_number_or_a_function():
    x, x0, fresh = states()
    now, after = vp(749), vp(499)
    eta = ancestral(now, after)
    assert 0 < eta < 1
    assert torch.equal(update(x, x0, now, after, ancestral, fresh), update(x, x0, now, after, eta, fresh))


# plans, on networks that count


class Counting(torch.nn.Module):
    """A network that answers with a share of its input and remembers how many images it was asked for, and at
    which t.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(share), requires_grad=False)
        self.images, self.told = 0, []

    def forward(self, x, t, tokens, added_cond_kwargs):
        assert (
            len(x)
            == len(tokens)
            == len(added_cond_kwargs["text_embeds"])
            == len(added_cond_kwargs["time_ids"])
        )
        self.images += len(x)
        self.told.append(float(t))
        return SimpleNamespace(sample=self.share * x)


def prompts(batch: int = 2) -> Prompts:
    """Prompts with a negative side that a counting network does not read."""
    plain = Prompts(torch.zeros(batch, 1, 1), torch.zeros(batch, 1), torch.zeros(batch, 6))
    return replace(plain, negative=plain)


def members(
    guidance: float | None = None, noise_schedule: str = "vp", prediction_type: str = "eps"
) -> tuple[Member, Member]:
    """A base, guided or not, and a four-step student of it."""
    base = Member(
        "toy/base",
        Denoiser(Counting(0.9), prediction_type),
        levels_of(noise_schedule, "leading", 10),
        noise_schedule,
        guidance=guidance,
    )
    return base, Member("toy/student", Denoiser(Counting(0.6)), levels_of("vp", "", 0, DMD2), eta=1.0)


def noise(steps: int = 4, batch: int = 2) -> torch.Tensor:
    return draw_noise(range(batch), (4, 4, 4), steps)


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("plan", [hybrid, late])
def test_the_base_makes_exactly_k_evaluations(plan, k, guidance):
    base, student = members(guidance)
    made = plan(base, student, k)
    finish(made, noise(), prompts())
    assert made.steps == 4
    assert (base.denoiser.nfe, student.denoiser.nfe) == (k, 4 - k), "its own guidance is not asked for"
    assert (base.denoiser.net.images, student.denoiser.net.images) == (2 * k, 2 * (4 - k))
    first, second = (base, student) if plan is hybrid else (student, base)
    assert first.denoiser.net.told + second.denoiser.net.told == pytest.approx(
        DMD2
    )  # whoever runs, the student's levels


@pytest.mark.parametrize("k", range(4))
def test_skip_leaves_the_first_k_out(k):
    _, student = members()
    steps = list(sample(skip(student, k), noise(), prompts()))
    assert student.denoiser.nfe == len(steps) == 4 - k
    assert student.denoiser.net.told == DMD2[k:]
    assert torch.equal(steps[0].x, noise()[:, 0])


def test_plans_without_the_other_are_the_member_alone():
    base, student = members(3.0)
    expected = finish(alone(student), noise(), prompts())
    for plan in (hybrid(base, student, 0), late(base, student, 0), skip(student, 0)):
        assert torch.equal(finish(plan, noise(), prompts()), expected)
    assert torch.equal(
        finish(hybrid(base, student, 4), noise(), prompts()),
        finish(late(base, student, 4), noise(), prompts()),
    )
    assert not torch.allclose(finish(hybrid(base, student, 1), noise(), prompts()), expected)


@pytest.mark.parametrize("k", [-1, 5])
def test_a_k_beyond_the_students_steps(k):
    base, student = members()
    for plan in (hybrid, late):
        with pytest.raises(UserError, match="0 … 4, the steps of toy/student"):
            plan(base, student, k)
    with pytest.raises(UserError, match="toy/student"):
        skip(student, k)


def test_skipping_every_step():
    with pytest.raises(UserError, match="leaves nothing"):
        skip(members()[1], 4)


def test_plans_go_by_name():
    base, student = members()
    for text, plan in {
        "hybrid(1)": hybrid(base, student, 1),
        "late(2)": late(base, student, 2),
        "skip(1)": skip(student, 1),
    }.items():
        assert named(text, base, student) == plan
    for wrong in ("hybrid", "mixed(1)", "hybrid(x)"):
        with pytest.raises(UserError, match=r"hybrid\(k\[,guidance\]\[,eta\]\)"):
            named(wrong, base, student)


def test_during_holds_at_the_chosen_levels_alone():
    base, student = members()
    held, asked = [False], []

    @contextmanager
    def within():
        held[0] = True
        yield
        held[0] = False

    student.denoiser.net.register_forward_pre_hook(lambda *_: asked.append(held[0]))
    plan = during(alone(student), lambda level: level.ratio < student.levels[1].ratio, within)
    plain = finish(alone(student), noise(), prompts())
    asked.clear()
    assert torch.equal(finish(plan, noise(), prompts()), plain)
    assert asked == [False, False, True, True]


def test_the_steps_tell_the_story():
    base, student = members()
    steps = list(sample(hybrid(base, student, 1), noise(), prompts()))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.member.name for step in steps] == ["toy/base", *["toy/student"] * 3]
    assert all(
        torch.equal(step.after, following.x) for step, following in zip(steps, steps[1:], strict=False)
    )
    assert torch.equal(steps[-1].after, steps[-1].x0)


def test_what_is_missing_is_said():
    base, student = members(3.0)
    with pytest.raises(UserError, match="needs noise for 4 steps, got 3"):
        finish(alone(student), noise(3), prompts())
    with pytest.raises(UserError, match="negative side"):
        finish(alone(base), noise(10), prompts().conditional())


# hand-overs between noise schedules, with a denoiser that knows the answer


class Knowing:
    """A denoiser that returns the same x0 whatever it sees."""

    def __init__(self, x0: torch.Tensor):
        self.x0 = x0

    def __call__(self, x, noise, prompts, guidance=None):
        return self.x0


X0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(11))
KNOWING = {
    "ddim": Member("toy/ddim", Knowing(X0), levels_of("vp", "leading", 6)),
    "lcm": Member("toy/lcm", Knowing(X0), levels_of("vp", "", 0, DMD2), eta=1.0),
    "ancestral": Member(
        "toy/ancestral", Knowing(X0), levels_of("vp", "trailing", 4), eta=ancestral, start="sigma"
    ),
    "flow": Member("toy/flow", Knowing(X0), levels_of("flow", "trailing", 5), "flow"),
    "noisy flow": Member(
        "toy/noisy-flow", Knowing(X0), tuple(flow(t, 3.0) for t in (1000, 750, 500, 250)), "flow", eta=0.5
    ),
}


@pytest.mark.parametrize("noise_schedule", ["vp", "flow"])
def test_a_hand_over_keeps_the_noise_level(noise_schedule):
    """sigma / alpha stays, and x is the same x0 and eps in the other schedule's scale: x_VP = x_VE / sqrt(1 +
    ratio^2).
    """
    given, taken = (
        (KNOWING["lcm"], KNOWING["flow"]) if noise_schedule == "flow" else (KNOWING["flow"], KNOWING["lcm"])
    )
    levels = [level for level in given.levels if 0 < level.ratio < 14]
    stage = Stage.of(taken, levels)
    assert [level.ratio for level in stage.levels] == pytest.approx([level.ratio for level in levels])
    eps = torch.randn(X0.shape, generator=torch.Generator().manual_seed(1))
    for level, other in zip(levels, stage.levels, strict=True):
        after = update(vp(999).alpha * X0 + vp(999).sigma * eps, X0, vp(999), other)
        same = (level.alpha * X0 + level.sigma * eps) * (other.alpha / level.alpha)
        assert torch.allclose(after, same, atol=1e-4)
        assert torch.allclose(to_eps(after, X0, other), eps, atol=1e-4)


def test_a_flow_hears_its_own_clock_on_levels_of_another():
    assert Stage.of(KNOWING["flow"], [vp(749)]).levels == (flow_at(vp(749).ratio),)
    assert Stage.of(KNOWING["lcm"], [flow(600)]).levels == (vp_at(flow(600).ratio),)
    assert Stage.of(KNOWING["lcm"], KNOWING["lcm"].levels).levels == KNOWING["lcm"].levels


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("second", KNOWING)
@pytest.mark.parametrize("first", KNOWING)
def test_who_knows_the_answer_ends_at_it(first, second, k):
    one, two = KNOWING[first], KNOWING[second]
    for plan in (hybrid(one, two, min(k, len(two.levels))), late(one, two, min(k, len(two.levels)))):
        assert torch.equal(finish(plan, noise(6), prompts()), X0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, ancestral])
def test_every_state_holds_the_noise_of_its_level(eta):
    """With x0 known, (x - alpha x0) / sigma is standard normal at every step, whatever eta."""
    x0 = torch.full((64, 4, 4, 4), 2.0)
    levels = (*levels_of("flow", "trailing", 3), *(vp(t) for t in (300, 200, 100)))
    member = Member("toy/any", Knowing(x0), levels, eta=eta, final=vp(50))
    for step in sample(Plan("any", (Stage(member, levels),)), noise(6, 64), prompts(64)):
        eps = to_eps(step.x, x0, step.noise) if step.index else step.x
        assert eps.mean().abs() < 0.06 and eps.std() == pytest.approx(1, abs=0.05)


def test_a_last_step_may_renoise():
    member = replace(members()[1], final=vp(0))
    assert torch.isfinite(finish(alone(member), noise(4), prompts())).all()


# noise


def test_noise_is_what_diffusers_draws():
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = draw_noise(SEEDS, (4, 16, 16), 2)
    assert drawn.shape == (2, 3, 4, 16, 16)
    for step in range(3):
        assert torch.equal(drawn[:, step], randn_tensor((2, 4, 16, 16), generator=generators))


def test_noise_depends_on_the_own_seed_alone():
    drawn = draw_noise([3, 1, 4], (4, 8, 8), 3)
    assert torch.equal(draw_noise([4, 3], (4, 8, 8), 3), drawn[[2, 0]])
    assert torch.equal(
        draw_noise([1], (4, 8, 8), 5)[:, :4], drawn[[1]]
    )  # a plan of more steps starts with the same
    assert not torch.equal(drawn[0, 0], drawn[1, 0]) and not torch.equal(drawn[0, 0], drawn[0, 1])


# what the network is told


def test_guidance_pushes_away_from_the_negative_side():
    class Told(torch.nn.Module):
        """Answers with its tokens."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, tokens, added_cond_kwargs):
            return SimpleNamespace(sample=tokens.mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(x))

    denoiser, plain = Denoiser(Told(), "sample"), prompts()
    told = replace(plain, tokens=plain.tokens + 3, negative=replace(plain.negative, tokens=plain.tokens + 1))
    x = torch.zeros(2, 4, 4, 4)
    assert torch.equal(denoiser(x, vp(500), told), torch.full_like(x, 3))
    assert torch.equal(denoiser(x, vp(500), told, 1.0), torch.full_like(x, 3))
    assert torch.equal(denoiser(x, vp(500), told, 0.0), torch.full_like(x, 1))
    assert torch.equal(denoiser(x, vp(500), told, 7.0), torch.full_like(x, 1 + 7 * 2))


@pytest.mark.parametrize("size", [256, 7])
def test_guidance_features_are_those_of_diffusers(size):
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.0, 7.0]), size)
    assert torch.allclose(guidance_features(7.0, size, 2), theirs, atol=1e-6)


def test_prompts_keep_their_negative_side():
    told = prompts(3)
    assert len(told[[0, 2]]) == len(told[[0, 2]].negative) == 2
    assert told[[]].negative is not None and told.to(torch.float64).negative.tokens.dtype == torch.float64
    assert told.conditional().negative is None


def test_a_network_in_half_precision_leaves_the_latent_in_full():
    denoiser = Denoiser(Counting(0.5).to(torch.bfloat16))
    assert denoiser(noise()[:, 0], Noise(500.0, 0.8, 0.6), prompts()).dtype == torch.float32
