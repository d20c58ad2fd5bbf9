"""Acting: a control on all networks of a plan, at all of its noise levels or at some."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from configs import UserError
from controls.lora import Control, beside, fusing
from models.interventions import WeightInterpolation
from models.noise import Noise
from models.sampler import Plan, during


@contextmanager
def acting(
    plan: Plan,
    control: Control | None,
    scale: float | Mapping[str, float],
    family: str,
    holds: Callable[[Noise], bool] | None = None,
) -> Iterator[Plan]:
    """Inside, the plan returned runs with a control at a scale on all of its networks; holds: at these noise
    levels alone. Blocks nest, and add up.

    scale: of all, or by member's name. Levels, not steps: so base and student are changed at the same noise.
    """
    if control is None:
        yield plan
        return
    changed = any(
        isinstance(stage.within, WeightInterpolation) for stage in plan.stages
    )  # to weights that the control's sums are not of
    scales = by_network(plan, scale)
    contexts = [(beside if changed else fusing)(net, control, its, family) for net, its in scales.items()]

    def on() -> ExitStack:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return stack.pop_all()

    if holds is not None:
        yield during(plan, holds, on)
        return
    with on():
        yield plan


def by_network(plan: Plan, scale: float | Mapping[str, float]) -> dict[nn.Module, float]:
    """A scale for each network of a plan. Raises UserError for two on one network, as a LoRA student's is its
    base's.
    """
    scales: dict[nn.Module, float] = {}
    for member in plan.members:
        its = scale[member.name] if isinstance(scale, Mapping) else scale
        if scales.setdefault(member.denoiser.net, its) != its:
            raise UserError(
                f"{member.name} shares the network of a member that has another scale, "
                f"{scales[member.denoiser.net]:g} and {its:g}: give one number for both"
            )
    return scales
