"""Records of the Cosmos Framework whose guidance interval means another step here than there.

A step at a bound is inside the interval here, as in diffusers, SGLang and vLLM-Omni; the framework leaves
it out. Timesteps rarely meet a bound, so it is said only where one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.generator.sampling.schedule import make_schedule

if TYPE_CHECKING:
    from vllm_cosmos3.checkpoint.config import SchedulerConfig
    from vllm_cosmos3.request.plan import Plan

INTERVALS = {  # and the scale that holds inside
    "guidance_interval": "guidance_scale",
    "control_guidance_interval": "control_guidance",
}


def steps_at_bounds(
    fields: Mapping[str, Any], plan: Plan, scheduler: SchedulerConfig
) -> tuple[str, ...]:
    """A warning for each interval among the ``fields`` of a record that has a timestep for a bound."""
    parameters = plan.parameters
    schedule = make_schedule(
        parameters.schedule,
        steps=parameters.num_inference_steps,
        shift=parameters.flow_shift,
        scheduler=scheduler,
    )
    warnings = []
    for name, scale in INTERVALS.items():
        interval = getattr(parameters, name)
        guided = getattr(parameters, scale) not in (None, 1.0)
        if name not in fields or interval is None or not guided:
            continue
        met = {t: i for i, t in enumerate(schedule.timesteps, start=1) if t in interval}
        if met:
            places = " and ".join(f"{i} (timestep {t:g})" for t, i in met.items())
            warnings.append(
                f"{name} [{interval[0]:g}, {interval[1]:g}] has step {places} at a bound: it is guided "
                "here, and not in the Cosmos Framework, which leaves bounds out"
            )
    return tuple(warnings)
