"""The plan on a MODEL, and the wrappers that carry it out. The only file that touches ModelPatcher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP

from . import backend
from .attention import OVERRIDE, Forward, bound_attention
from .blocks import bound_blocks
from .cache import FP8, GPU, HOST
from .clock import SigmaClock
from .freeze import BLOCKS, KEPT_BLOCK, WORK
from .layouts import read_layout, stream_of
from .layouts.layout import Layout, Unclear
from .reuse import Moment, Subject
from .run import Journal, Run, summarise
from .technique import CallTechnique, Technique

KEY = "frame_thrift"
PLAN = "frame_thrift_plan"
RUN = "frame_thrift_run"
JOURNAL = "frame_thrift_journal"
FROZEN = "frame_thrift_frozen"
OUT_OF_MEMORY_ADVICE = (
    "FrameThrift: memory ran out beside what spatial freeze keeps (%s). All of it is let go and the run goes on without "
    "freezing. For the next one set cache_device to cpu, cache_dtype to fp8_e4m3fn, or a cache_limit_gb."
)

try:
    from comfy.model_prefetch import cleanup_prefetch_queues
except ImportError:  # Older releases stream weights without queues.
    cleanup_prefetch_queues = None

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
    for kind in WRAPPERS:
        model.remove_wrappers_with_key(kind, KEY)
    if not plan:
        options.pop(PLAN, None)
        return
    for kind, wrapper in WRAPPERS.items():
        model.add_wrapper_with_key(kind, KEY, wrapper)
    # Others sample a schedule in pieces: around ours these would be runs of their own, inside ours they are one.
    runs = model.wrappers[WrappersMP.OUTER_SAMPLE]
    model.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: runs.pop(KEY), **runs}
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
    journal = journal_of(guider.model_patcher)
    for is_warning, line in run.warn_before(journal.records() if journal is not None else []):
        logger.log(logging.WARNING if is_warning else logging.INFO, line)
    # As core's sampling: without guidance the negative conds are not computed.
    run.has_guidance = getattr(guider, "cfg", None) != 1 or bool(
        guider.model_options.get("disable_cfg1_optimization")
    )
    options[RUN] = run
    finished = False
    try:
        output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finished = True
        return output
    finally:
        options.pop(RUN, None)
        run.close()
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
    sigma = float(options.get("sigmas", t).flatten()[0])
    told = conds | _adapted(run, layout)

    def call(given: dict[str, Any]) -> Any:
        return executor(x, t, c_concat, c_crossattn, control, given, **told)

    moment = _begin(run, layout, sigma, x, c_crossattn, options)
    output = None
    try:
        output = _forward(call, options, run, layout, sigma, moment)
    except RuntimeError as error:
        if not _is_out_of_memory(error) or run.reuse is None or not run.reuse.is_in_use:
            raise
        logger.warning(OUT_OF_MEMORY_ADVICE, str(error))
        run.reuse.give_up(x.device)
    if output is None:
        # Outside of the handler, whose traceback holds on to what the failed forward had made.
        if cleanup_prefetch_queues is not None:
            cleanup_prefetch_queues()
        mm.soft_empty_cache()
        moment = _begin(run, layout, sigma, x, c_crossattn, options)
        output = _forward(call, options, run, layout, sigma, moment)
    if moment is not None:
        outcomes = moment.finish()
        if run.freeze is not None and run.freeze.unit == CallTechnique.unit:
            for reason in outcomes:
                run.count(run.freeze, reason)
    return output


def _forward(
    call: Callable[[dict[str, Any]], Any],
    options: dict[str, Any],
    run: Run,
    layout: Layout,
    sigma: float,
    moment: Moment | None,
) -> Any:
    """`call(options)` with everything bound that the plan asks for; what it kept is forgotten if it breaks off."""
    if moment is not None and moment.is_frozen and moment.slot.held and run.freeze is not None:
        options = {**options, FROZEN: run.freeze.scope}
    try:
        with (
            bound_attention(Forward(run, layout, layout.video_tokens(), sigma, moment)),
            bound_blocks(run.freeze, moment, layout, _block_patches(options)),
        ):
            return call(options)
    except BaseException:
        if moment is not None:
            moment.reuse.drop(moment.slot)
        raise


def _is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    # Newer releases know that some of them come as errors of the accelerator.
    is_oom = getattr(mm, "is_oom", None)
    return type(error).__name__ == "AcceleratorError" and is_oom is not None and bool(is_oom(error))


def _block_patches(options: dict[str, Any]) -> dict[Any, Any]:
    """What others have put in the place of transformer blocks, by place."""
    return options.get("patches_replace", {}).get("dit", {})


def _places(options: dict[str, Any]) -> tuple[Any, ...]:
    """What others have put something into: the places of blocks, and the slot of attention. Functions tell nothing."""
    replaced = options.get("patches_replace", {})
    return OVERRIDE in options, *sorted(
        ((kind, *sorted(map(str, at))) for kind, at in replaced.items() if at)
    )


def _begin(
    run: Run,
    layout: Layout,
    sigma: float,
    x: torch.Tensor,
    text: Any,
    options: dict[str, Any],
) -> Moment | None:
    """Where this forward stands among those that the plan keeps something from."""
    if run.reuse is None or run.freeze is None:
        return None
    if run.freeze.unit == CallTechnique.unit and 2 * run.freeze.blocks_kept >= len(layout.blocks):
        run.count(run.freeze, KEPT_BLOCK)
        return None
    subject = Subject(
        conds=(
            tuple(options.get("uuids", ())),
            tuple(x.shape),
            tuple(text.shape) if isinstance(text, torch.Tensor) else None,
            layout.shapes,
            x.dtype,
            # Guiders leave blocks or parts of them out in passes that are to come out worse.
            layout.pass_options,
            _places(options),
        ),
        window=layout.window_frames,
        device=x.device,
    )
    moment = run.reuse.begin(subject, sigma, run.evaluations)
    moment.backend = backend.in_force()
    return moment


@torch.compiler.disable(recursive=False)
def _diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward with frozen blocks or parts of them streams only the weights that it still needs, none ahead."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, dict) and given.get(FROZEN) in (WORK, BLOCKS):
            given["prefetch_dynamic_vbars"] = False
    return executor(*args, **kwargs)


def _prepare_sampling(
    executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load seam: asks for the cache's room before the model is loaded, and notes what room there was."""
    model_options = kwargs.get("model_options") or (args[0] if args else None) or {}
    run: Run | None = model_options.get("transformer_options", {}).get(RUN)
    stream = stream_of(model.model.diffusion_model, tuple(noise_shape))
    if run is None or run.reuse is None or run.freeze is None or stream is None:
        return executor(model, noise_shape, conds, *args, **kwargs)
    patches = _block_patches(model_options["transformer_options"])
    stream = replace(stream, is_alone=stream.is_alone and not patches)
    shelf = run.reuse.shelf
    # A run that is sampled in pieces comes here with each of them, and what is kept is no longer free.
    shelf.rooms[HOST] = int(mm.get_free_memory(torch.device("cpu")) / 2) + shelf.taken[HOST]
    if mm.is_device_cpu(model.load_device):
        shelf.rooms[GPU] = int(mm.get_free_memory(torch.device("cpu")) / 2) + shelf.taken[GPU]
        return executor(model, noise_shape, conds, *args, **kwargs)
    passes = sum(len(cond) for name, cond in conds.items() if run.has_guidance or name != "negative")
    numbers = stream.numbers * passes
    width = mm.dtype_size(model.model.manual_cast_dtype or model.model.get_dtype())
    wanted = numbers * (1 if shelf.precision == FP8 else width) * run.freeze.values_kept(stream)
    wanted = min(wanted, shelf.limit) if shelf.limit else wanted
    wanted = max(0, wanted - shelf.taken.total())
    needed = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
    # ComfyUI's own estimate is far too high for packed latents; a block holds about a dozen such tensors at once.
    reserve = 16 * numbers * width
    total = mm.get_total_memory(model.load_device)
    is_asked = shelf.placement == GPU or (
        shelf.placement != HOST and model.model_size() + reserve + wanted < 0.95 * total
    )
    shape = list(noise_shape)
    if is_asked:
        # ComfyUI budgets by the noise's shape alone.
        shape[-1] = math.ceil(shape[-1] * (1 + wanted / needed))
    else:
        shelf.expected = min(wanted, shelf.rooms[HOST])
    out = executor(model, shape, conds, *args, **kwargs)
    free = max(0, int(mm.get_free_memory(model.load_device) - reserve)) if is_asked else 0
    shelf.rooms[GPU] = shelf.taken[GPU] + free
    return out


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
            for warning in technique.warnings(layout):
                if run.say_once(warning):
                    logger.warning("FrameThrift: %s", warning)
    return told


def _close(run: Run, model: Any, finished: bool) -> None:
    record = {**run.record(), "finished": finished}
    journal = journal_of(model)
    # A run cut short by an interrupt or somebody's error proves nothing about us.
    if finished and run.clock.steps:
        suspects = [name for name in model.object_patches if name.startswith("diffusion_model.")]
        earlier = journal.records() if journal is not None else []
        advice = {technique.name: technique.advice_if_never_needed for technique in run.plan}
        for is_warning, line in summarise(record, suspects, earlier, advice):
            logger.log(logging.WARNING if is_warning else logging.INFO, line)
    if journal is not None:
        journal.add(record)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.PREPARE_SAMPLING: _prepare_sampling,
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.APPLY_MODEL: _apply_model,
    WrappersMP.DIFFUSION_MODEL: _diffusion_model,
}
