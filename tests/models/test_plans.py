"""Plans: what each costs, what it equals at its ends, and that every image depends on its own seed alone."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.toys import Echo, prompts, toys

from analysis.images.cache import acting
from configs import UserError
from controls import formats
from controls.lora import fused
from models.families import Family
from models.interventions import CADS, Pink, WeightInterpolation, derived
from models.lora_student import Delta
from models.noise import vp
from models.plans import PLANS, named, swapped
from models.sampler import Denoiser, Plan, Stage, alone, draw_noise, during, finish, sample

TEXTS = ["portrait of a person, glasses, brown hair", "portrait of a person, hat, purple background"]


@pytest.fixture(scope="module")
def tiny():
    return Family("tiny", dtype=torch.float32)


@pytest.fixture(scope="module", params=["dmd", "lightning"])
def pair(tiny, request):
    """A base and a student: one that adds fresh noise, one that does not."""
    return tiny.member("base"), tiny.member(request.param)


def latents(tiny, plan: Plan, seeds=(5, 17), texts=TEXTS) -> torch.Tensor:
    return finish(plan, draw_noise(seeds, tiny.latent_shape, plan.steps), tiny.encode(list(texts)))


# on networks that answer at once


def drawn(text: str, eta: float = 1.0, seeds=(3, 8), rows=(0, 1)) -> torch.Tensor:
    plan = named(text, *toys(eta))
    return finish(plan, draw_noise(seeds, (4, 8, 8), plan.steps), prompts()[list(rows)])


COSTS = {  # plan: evaluations of the base of 10 steps with guidance, and of the student of 4 without
    "base": (20, 0),
    "base(4)": (8, 0),
    "student": (0, 4),
    "hybrid(0)": (0, 4),
    "hybrid(1)": (1, 3),
    "hybrid(2,5)": (4, 2),
    "hybrid(1,1,.5)": (1, 3),
    "hybrid(4)": (4, 0),
    "late(1)": (1, 3),
    "skip(1)": (0, 3),
    "only(2)": (1, 3),
    "schedule(8)": (2, 3),
    "interval(0,500)": (15, 0),
    "attenuate(.5)": (0, 4),
    "other(.5)": (0, 5),
    "blend(.5)": (1, 4),
    "pink(.5)": (0, 4),
    "few(3)": (0, 3),
    "teacher": (20, 0),
    "alike(.5)": (0, 5),
    "unprompted(2)": (0, 4),
    "adapted(1)": (0, 4),
    "cads(.2)": (0, 4),
    "delta(.8)": (0, 4),
    "delta(.8,1)": (0, 4),
}
SAME = {
    "hybrid(0)": "student",
    "attenuate(1)": "student",
    "other(1)": "student",
    "blend(1)": "student",
    "delta(1)": "student",
    "delta(1,2)": "student",
    "skip(0)": "student",
    "alike(0)": "student",
    "unprompted(0)": "student",
    "only(1)": "hybrid(1)",
    "only(4)": "late(1)",
    "hybrid(1,1)": "hybrid(1)",
    "hybrid(0,5,0)": "student",
    "schedule(4)": "hybrid(1)",
    "blend(0)": "hybrid(1)",
    "hybrid(4)": "late(4)",
    "interval(0,999)": "base",
    "base(10)": "base",
}
DIFFERENT = [
    "hybrid(2)",
    "only(3)",
    "hybrid(1)",
    "hybrid(1,5)",
    "hybrid(1,1,.5)",
    "attenuate(.5)",
    "other(.5)",
    "blend(.5)",
    "pink(1)",
    "cads(.5)",
    "delta(0)",
    "delta(0,1)",
    "skip(1)",
    "schedule(8)",
    "alike(1)",
    "unprompted(1)",
]
NONE = {
    "only(0)": "1 … 4",
    "only(5)": "1 … 4",
    "delta(1,9)": "1 … 4",
    "hybrid(1.5)": "whole numbers",
    "hybrid(5)": "0 … 4",
    "hybrid(1,2,.5,4)": r"hybrid\(k\[,guidance\]\[,eta\]\)",
    "hybrid(1,3,2)": "eta must be from 0 to 1",
    "delta(x)": r"delta\(s\[,k\]\)",
    "cads()": r"cads\(scale\)",
    "pink(nan)": "pink",
    "base(0)": "1 … 1000",
    "interval(5,2)": "low < high",
    "student(1)": "student",
    "hybrid(1": r"base\[\(n\)\]",
    "": "hybrid",
    "pink(1e9)": "exponent must be from -10 to 10",
    "pink(100)": "exponent must be",
    "delta(inf)": r"delta\(s\[,k\]\)",
    "delta(900)": "s must be",
    "cads(1e300)": "scale must be",
    "attenuate(99)": "keep must be",
    "hybrid(99999999)": "k must be",
    "few(0)": "1 … 1000",
    "few(99999999)": "n must be",
    "hybrid(1,0)": "conditional only",
    "alike(1.5)": "from 0 to 1",
    "unprompted(5)": "0 … 4",
    "adapted(1,5,2)": "above < below",
    "adapted()": r"adapted\(scale\[,above\]\[,below\]\)",
    "x" * 999: "no plan",
}


def test_every_plan_is_tried_here():
    assert {text.partition("(")[0] for text in COSTS} == PLANS.keys()


@pytest.mark.parametrize("text", COSTS)
def test_a_plan_costs_what_it_says(text):
    base, student = toys()
    plan = named(text, base, student)
    finish(plan, draw_noise([1], (4, 8, 8), plan.steps), prompts(1))
    counted = (base.denoiser.nfe, student.denoiser.nfe)
    assert counted == COSTS[text] and plan.nfe == sum(counted)


@pytest.mark.parametrize("text", COSTS)
def test_an_image_depends_on_its_own_seed_alone(text):
    both = drawn(text)
    for i, seed in enumerate((3, 8)):
        assert torch.allclose(drawn(text, seeds=(seed,), rows=(i,)), both[i : i + 1], atol=1e-5)
    assert torch.equal(drawn(text), both)


@pytest.mark.parametrize(("text", "same"), SAME.items())
def test_the_ends_of_the_lines_meet(text, same):
    assert torch.equal(drawn(text), drawn(same))


def test_the_line_between_them_is_straight():
    """With fresh noise, x after the first step is alpha' (keep x0 + (1 - keep) x0 of the other) + sigma'
    noise: PAPER.md's line.
    """

    def first(text):
        return next(iter(sample(named(text, *toys()), draw_noise([3], (4, 8, 8), 4), prompts(1)))).after

    for name, end in (("blend", "hybrid(1)"), ("attenuate", "attenuate(0)")):
        assert torch.allclose(first(f"{name}(.25)"), 0.25 * first("student") + 0.75 * first(end), atol=1e-5)


@pytest.mark.parametrize("text", DIFFERENT)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_plan_changes_something(text, eta):
    assert not torch.allclose(drawn(text, eta), drawn("student", eta), atol=1e-4)


@pytest.mark.parametrize(("text", "says"), NONE.items())
def test_a_plan_that_is_none(text, says):
    with pytest.raises(UserError, match=says):
        named(text, *toys())


def test_two_networks_that_are_not_alike():
    base, student = toys()
    with pytest.raises(UserError, match="predicts what its base does"):
        named("delta(1)", base, replace(student, denoiser=Denoiser(Echo(1.0), "v")))
    with pytest.raises(UserError, match="different shapes"):
        named("delta(1)", base, replace(student, denoiser=Denoiser(torch.nn.Linear(2, 2)))).stages[
            0
        ].within().__enter__()


def test_what_is_held_is_held_beside_what_the_plan_holds():
    """A control on some steps of a plan that has swapped the weights acts on the swapped ones."""
    base, student = toys()
    seen, net = [], student.denoiser.net

    @contextmanager
    def doubled():
        before = net.share.data
        net.share.data = 2 * before
        yield
        net.share.data = before

    net.register_forward_pre_hook(lambda *_: seen.append(float(net.share)))
    finish(
        during(named("delta(0)", base, student), lambda level: level.t > 500, doubled),
        draw_noise([1], (4, 8, 8), 4),
        prompts(1),
    )
    assert seen == pytest.approx([1.8, 1.8, 0.9, 0.9]) and float(net.share) == pytest.approx(0.6)


# the interventions by themselves


def test_derived_noise_is_noise_of_its_own():
    own = draw_noise([1, 2], (4, 16, 16), 0)[:, 0]
    more, other = derived(own, (4, 16, 16)), derived(own, (4, 16, 16), 7)
    assert torch.equal(derived(own[1:], (4, 16, 16)), more[1:])
    assert more.std() == pytest.approx(1, abs=0.05) and not torch.allclose(more, other)
    assert abs(torch.corrcoef(torch.stack([own[0].flatten(), more[0].flatten()]))[0, 1]) < 0.1


def test_pink_noise_has_the_spectrum_that_it_says():
    white = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Pink(0)(white), white, atol=1e-5)
    noise = Pink(1.0)(white)
    assert noise.var() == pytest.approx(1, abs=0.05)
    power = torch.fft.fft2(noise).abs().square().mean((0, 1))
    slope = torch.log(power[0, 8] / power[0, 2]) / torch.log(torch.tensor(4.0))
    assert slope == pytest.approx(-1.0, abs=0.1)


def test_cads_fades_with_the_noise_level():
    """gamma by hand; without rescaling the formula itself, with it the prompt's own mean and deviation."""
    conditioning, own = prompts(), draw_noise([1, 2], (4, 8, 8), 0)[:, 0]
    cads = CADS(0.5, rescale=0.0)
    assert [round(cads.gamma(vp(t)), 6) for t in (1000 - 1, 900, 750, 600, 100)] == [0, 0, 0.5, 1, 1]
    assert cads(conditioning, vp(600), own) is conditioning
    noised = cads(conditioning, vp(750), own)
    n = (noised.tokens - 0.5**0.5 * conditioning.tokens) / (0.5 * 0.5**0.5)
    assert (
        torch.allclose(n, derived(own, (3, 4), 10_750), atol=1e-5)
        and noised.negative is conditioning.negative
    )
    kept = CADS(0.5)(conditioning, vp(750), own).tokens
    assert torch.allclose(kept.mean((1, 2)), conditioning.tokens.mean((1, 2))) and torch.allclose(
        kept.std((1, 2)), conditioning.tokens.std((1, 2))
    )


def test_the_swap_computes_once_and_gives_back(tiny):
    base, student = (tiny.member(name).denoiser.net for name in ("base", "dmd"))
    own = [p.data_ptr() for p in student.parameters()]
    between = WeightInterpolation(base, student, 0.0)
    with between():
        inside = [p.data_ptr() for p in student.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), student.parameters(), strict=True))
    with pytest.raises(RuntimeError), between():
        assert [p.data_ptr() for p in student.parameters()] == inside
        raise RuntimeError
    assert [p.data_ptr() for p in student.parameters()] == own


# on the embedded family


def test_hybrid_of_none_is_the_student_and_of_all_the_base(tiny, pair):
    base, student = pair
    assert torch.equal(latents(tiny, named("hybrid(0)", *pair)), latents(tiny, alone(student)))
    path = Plan("the base in the student's loop", (Stage.of(swapped(base, student), student.levels),))
    assert torch.equal(latents(tiny, named("hybrid(4)", *pair)), latents(tiny, path))


def test_no_delta_is_the_base_s_network_and_all_of_it_the_student(tiny, pair):
    base, student = pair
    assert torch.equal(latents(tiny, named("delta(1)", *pair)), latents(tiny, alone(student)))
    other = replace(student, denoiser=Denoiser(base.denoiser.net))
    assert torch.equal(latents(tiny, named("delta(0)", *pair)), latents(tiny, alone(other)))


def test_a_control_on_weights_between_acts_whole_and_leaves_them_between(tiny, pair):
    """At all levels or at some: neither is the control scaled as the weights are, nor are they the student's
    meanwhile.
    """
    control = formats.load("controls/tiny/smile-dmd.safetensors")
    plan, before = named("delta(0)", *pair), latents(tiny, alone(pair[1]))
    other = alone(replace(pair[1], denoiser=Denoiser(pair[0].denoiser.net)))
    with fused(pair[0].denoiser.net, control, 1.0):
        expected = latents(tiny, other)
    assert not torch.allclose(expected, latents(tiny, other), atol=0.1)
    for holds in (None, lambda level: True):
        with acting(plan, control, 1.0, "tiny", holds) as controlled:
            assert torch.allclose(latents(tiny, controlled), expected, atol=1e-3)
    assert torch.equal(latents(tiny, alone(pair[1])), before)


def test_between_a_base_and_its_lora_student_is_the_dial_of_the_student():
    base, student = toys()
    net, lora = base.denoiser.net, Delta({})
    for own, turned in ((1.0, 0.5), (0.8, 0.4), (lambda noise: noise.t / 1000, None)):
        over = replace(student, denoiser=Denoiser(net, delta=lora, lora_scale=own))
        stage, *rest = named("delta(.5,1)", base, over).stages
        strength = stage.member.denoiser.lora_scale
        assert strength == turned if turned else strength(stage.levels[0]) == own(stage.levels[0]) / 2
        assert [part.member.denoiser for part in rest] == [over.denoiser]
        assert named("delta(.5)", base, over).stages[0].levels == over.levels


@pytest.mark.parametrize("text", ["other(.5)", "cads(.3)", "pink(.5)"])
def test_an_image_of_the_family_is_the_same_alone(tiny, pair, text):
    plan = named(text, *pair)
    both = latents(tiny, plan)
    assert torch.allclose(latents(tiny, plan, (17,), TEXTS[1:]), both[1:], atol=2e-5)
