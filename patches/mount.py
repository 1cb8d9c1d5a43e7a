"""The plan on a MODEL, and the wrappers that carry it out. The only file that touches ModelPatcher."""

from __future__ import annotations

import logging
from typing import Any

from comfy.patcher_extension import WrappersMP

from .attention import Forward, bound_attention
from .layouts import read_layout
from .layouts.layout import Layout, Unclear
from .run import Journal, Run, SigmaClock, summarise
from .technique import CallTechnique, Technique

KEY = "frame_thrift"
PLAN = "frame_thrift_plan"
RUN = "frame_thrift_run"
JOURNAL = "frame_thrift_journal"

logger = logging.getLogger(__name__)


def mount(model: Any, technique: Technique) -> Any:
    """A clone of `model` (ModelPatcher) whose plan holds `technique` instead of any earlier one of its name.

    A neutral technique removes the entry; without an entry to remove, `model` itself comes back.
    """
    plan = plan_of(model)
    rest = [entry for entry in plan if entry.name != technique.name]
    if technique.is_neutral:
        logger.warning("FrameThrift: %s is not mounted: %s.", technique.name, technique.neutral_because)
        if len(rest) == len(plan):
            return model
    else:
        rest.append(technique)
    clone = model.clone()
    _set_plan(clone, tuple(sorted(rest, key=lambda entry: entry.stage)))
    return clone


def plan_of(model: Any) -> tuple[Technique, ...]:
    """The techniques mounted on `model`, in the order of their stages."""
    return model.model_options.get("transformer_options", {}).get(PLAN, ())


def journal_of(model: Any) -> Journal | None:
    """The journal that `model` shares with its clones; None if nothing was ever mounted."""
    return model.get_attachment(JOURNAL)


def _set_plan(model: Any, plan: tuple[Technique, ...]) -> None:
    options = model.model_options.setdefault("transformer_options", {})
    for kind, wrapper in WRAPPERS.items():
        model.remove_wrappers_with_key(kind, KEY)
        if plan:
            model.add_wrapper_with_key(kind, KEY, wrapper)
    if not plan:
        options.pop(PLAN, None)
        return
    options[PLAN] = plan
    if journal_of(model) is None:
        model.set_attachments(JOURNAL, Journal())


def _outer_sample(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run seam: owns the run from before the first step until after the last, however it ends."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    if PLAN not in options:
        logger.warning(
            "FrameThrift: another node replaced the model's transformer_options, and what was mounted with "
            "them; the result is stock. Put the FrameThrift nodes after that node."
        )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    run = Run(options[PLAN], SigmaClock(tuple(float(s) for s in sigmas), sampling.percent_to_sigma))
    for warning in run.warn_before():
        logger.warning(warning)
    options[RUN] = run
    finished = False
    try:
        output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finished = True
        return output
    finally:
        options.pop(RUN, None)
        _close(run, guider.model_patcher, finished)


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any, **kwargs: Any
) -> Any:
    """Step seam: one evaluation by the sampler, whether or not the model is called for it."""
    run = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.count_evaluation()
    return executor(x, timestep, model_options, *args, **kwargs)


def _apply_model(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Any = None,
    **conds: Any,
) -> Any:
    """Call seam: one forward of one batch of conds. All that happens inside is bound here and let go here."""
    options = transformer_options if transformer_options is not None else {}
    if PLAN not in options:
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)
    # Somebody who calls the model without a sampler still gets what is mounted, only no closing line.
    run: Run = options.get(RUN) or Run(
        options[PLAN], SigmaClock((), executor.class_obj.model_sampling.percent_to_sigma)
    )
    run.count_forward()
    layout = read_layout(executor.class_obj.diffusion_model, x, options, conds)
    if isinstance(layout, Unclear):
        for technique in run.plan:
            run.count(technique, layout.reason)
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)
    conds |= _adapted(run, layout)
    with bound_attention(
        Forward(run, layout, layout.video_tokens(), float(options.get("sigmas", t).flatten()[0]))
    ):
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def _adapted(run: Run, layout: Layout) -> dict[str, Any]:
    """What the plan's techniques want this forward to be told instead."""
    told: dict[str, Any] = {}
    for technique in run.plan:
        if not isinstance(technique, CallTechnique):
            continue
        change = technique.adapt(layout)
        run.count(technique, change if isinstance(change, str) else None)
        if not isinstance(change, str):
            told |= change
            warning = technique.warn(layout)
            if warning is not None and run.say_once(warning):
                logger.warning("FrameThrift: %s", warning)
    return told


def _close(run: Run, model: Any, finished: bool) -> None:
    record = {**run.record(), "finished": finished}
    # A run cut short by an interrupt or somebody's error proves nothing about us.
    if finished and run.clock.steps:
        suspects = [name for name in model.object_patches if name.startswith("diffusion_model.")]
        for is_warning, line in summarise(record, suspects):
            logger.log(logging.WARNING if is_warning else logging.INFO, line)
    journal = journal_of(model)
    if journal is not None:
        journal.add(record)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.APPLY_MODEL: _apply_model,
}
