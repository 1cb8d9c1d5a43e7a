"""The seams at which ComfyUI calls us. They call the hooks of the techniques, and know none by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .attention import Forward
from .call import Call, Load, Room, replaced_blocks
from .journal import fingerprints, journal_of
from .layouts import read_layout, stream_of
from .layouts.layout import Unclear
from .layouts.role import Role
from .plan import PLAN, plan_in
from .run import Run
from .shadow import shadowed
from .summary import announce, summarise
from .technique import ATTENTION_CALLS, Replacement, State, overrides

RUN = "frame_thrift_run"

try:
    from comfy.model_prefetch import cleanup_prefetch_queues
except ImportError:  # Older releases stream weights without queues.
    cleanup_prefetch_queues = None

logger = logging.getLogger(__name__)

# Beside the call itself, for DIFFUSION_MODEL: options are looked into by torch.compile, and copied by anybody.
CURRENT: ContextVar[Call | None] = ContextVar("frame_thrift_call", default=None)


def _outer_sample(
    executor: Any,
    noise: Any,
    latent_image: Any,
    sampler: Any,
    sigmas: Any,
    denoise_mask: Any = None,
    callback: Any = None,
    disable_pbar: Any = False,
    seed: Any = None,
    **kwargs: Any,
) -> Any:
    """Run seam: owns the run from before the first step until after the last, however it ends."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    if PLAN not in options:
        logger.warning(
            "FrameThrift: another node replaced the model's transformer_options, and what was mounted with "
            "them; the result is stock. Put the FrameThrift nodes after that node."
        )
        return executor(
            noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
        )
    model = guider.model_patcher
    sampling = model.get_model_object("model_sampling")
    run = Run(plan_in(options), sigmas, sampling.percent_to_sigma, model.load_device)
    journal = journal_of(model)
    _say(announce(run.plan, run.clock, journal.records() if journal is not None else []))
    # As core's sampling: without guidance the negative conds are not computed.
    run.has_guidance = getattr(guider, "cfg", None) != 1 or bool(
        guider.model_options.get("disable_cfg1_optimization")
    )
    options[RUN] = run
    last: list[Any] = []

    def keeping(*given: Any, **named: Any) -> Any:
        last[:] = [named.get("x0", given[1] if len(given) > 1 else None)]
        return callback(*given, **named)

    # Where nobody listens, no x0 lands anywhere.
    listener = None if callback is None else keeping
    finished = False
    try:
        output = executor(
            noise, latent_image, sampler, sigmas, denoise_mask, listener, disable_pbar, seed, **kwargs
        )
        finished = True
        _note_output(run, model, output, last, kwargs.get("latent_shapes"))
        return output
    finally:
        last.clear()
        options.pop(RUN, None)
        run.close()
        _close(run, model, finished)


def _note_output(run: Run, model: Any, output: Any, x0: list[Any], shapes: Any) -> None:
    """Fingerprints of what has come out, as ComfyUI's samplers put it into LATENTs."""
    try:
        run.note_output("samples", fingerprints(_parts(output, shapes)))
        for last in x0:
            run.note_output("x0", fingerprints(_parts(model.model.process_latent_out(last.cpu()), shapes)))
    except Exception:
        # Others may sample what they like; that they have no fingerprints shall not cost the run.
        logger.debug("FrameThrift: no fingerprint of what a run put out", exc_info=True)


def _parts(latent: Any, shapes: Any) -> list[torch.Tensor]:
    """Video, and audio if there is any, of a latent that samplers see as one."""
    if latent.is_nested:
        return list(latent.unbind())
    if not shapes or sum(math.prod(shape[1:]) for shape in shapes) != math.prod(latent.shape[1:]):
        return [latent]
    return list(comfy.utils.unpack_latents(latent, shapes)) if len(shapes) > 1 else [latent]


def _close(run: Run, model: Any, finished: bool) -> None:
    try:
        record = {**run.record(), "finished": finished}
    except Exception:
        logger.exception("FrameThrift: a technique could not tell what it did; this run has no record")
        return
    journal = journal_of(model)
    # A run cut short by an interrupt or somebody's error proves nothing about us.
    if finished and run.clock.steps:
        suspects = [name for name in model.object_patches if name.startswith("diffusion_model.")]
        _say(summarise(record, run.plan, suspects, journal.records() if journal is not None else []))
    if journal is not None:
        journal.add(record)


def _say(lines: list[tuple[bool, str]]) -> None:
    for is_warning, line in lines:
        logger.log(logging.WARNING if is_warning else logging.INFO, line)


def _prepare_sampling(
    executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load seam: asks for the techniques' room before the model is loaded, and tells them what room there is."""
    model_options = kwargs.get("model_options") or (args[0] if args else None) or {}
    run: Run | None = model_options.get("transformer_options", {}).get(RUN)
    having = (
        [] if run is None else [s for s in run.states if overrides(s, "wants") or overrides(s, "granted")]
    )
    load = _load(run, model, tuple(noise_shape), conds, model_options) if run is not None and having else None
    if load is None:
        return executor(model, noise_shape, conds, *args, **kwargs)
    host = int(mm.get_free_memory(torch.device("cpu")) / 2)
    wanted = {state: state.wants(load) for state in having}
    total, shape = sum(wanted.values()), list(noise_shape)
    if total:
        # ComfyUI budgets by the noise's shape alone.
        needed = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        shape[-1] = math.ceil(shape[-1] * (1 + total / needed))
    out = executor(model, shape, conds, *args, **kwargs)
    free = host if load.is_on_cpu else int(mm.get_free_memory(model.load_device) - load.reserve)
    for state, size in wanted.items():
        part = size / total if size else 1.0
        state.granted(Room(max(0, int(free * part)), host))
    return out


def _load(run: Run, model: Any, noise_shape: tuple[int, ...], conds: Any, options: Any) -> Load | None:
    stream = stream_of(model.model.diffusion_model, noise_shape)
    if stream is None:
        return None
    replaced = replaced_blocks(options["transformer_options"])
    return Load(
        stream=replace(stream, is_alone=stream.is_alone and not replaced),
        passes=sum(len(cond) for name, cond in conds.items() if run.has_guidance or name != "negative"),
        width=mm.dtype_size(model.model.manual_cast_dtype or model.model.get_dtype()),
        weights=model.model_size(),
        total=mm.get_total_memory(model.load_device),
        is_on_cpu=mm.is_device_cpu(model.load_device),
    )


def _predict_noise(
    executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any, **kwargs: Any
) -> Any:
    """Step seam: one evaluation by the sampler, whether or not the model is called for it."""
    run: Run | None = model_options.get("transformer_options", {}).get(RUN)
    if run is None:
        return executor(x, timestep, model_options, *args, **kwargs)
    evaluation = run.begin_step(timestep)
    out = executor(x, timestep, model_options, *args, **kwargs)
    run.end_step(evaluation)
    return out


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
        plan_in(options), (), executor.class_obj.model_sampling.percent_to_sigma
    )
    run.count_forward()
    diffusion_model = executor.class_obj.diffusion_model
    layout = read_layout(diffusion_model, x, options, conds)
    if isinstance(layout, Unclear):
        run.decline_forward(layout.reason)
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)
    begin = partial(
        Call,
        diffusion_model,
        layout,
        run.sites_of(diffusion_model, layout),
        run.clock,
        sigma=float(options.get("sigmas", t).flatten()[0]),
        evaluation=run.evaluations,
        shape=tuple(x.shape),
        dtype=x.dtype,
        device=x.device,
        text=tuple(c_crossattn.shape) if isinstance(c_crossattn, torch.Tensor) else None,
        options=options,
    )

    def compute(changes: dict[str, Any]) -> Any:
        return executor(x, t, c_concat, c_crossattn, control, options, **{**conds, **changes})

    return _carried_out(run, begin, compute)


def _carried_out(run: Run, begin: Callable[[], Call], compute: Callable[[dict[str, Any]], Any]) -> Any:
    """A forward under the plan, and once again if memory ran out and the techniques could free some."""
    call, failed = begin(), None
    try:
        return _attempt(run, call, compute)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        failed = call.error = error
    # Outside of the handler, whose traceback holds on to what the failed forward had made.
    try:
        if not _relieved(run, call):
            raise failed
    finally:
        call.error = failed = None
        del call
    if cleanup_prefetch_queues is not None:
        cleanup_prefetch_queues()
    mm.soft_empty_cache()
    return _attempt(run, begin(), compute)


def _relieved(run: Run, call: Call) -> bool:
    """Whether any of the states could let go of something; each is asked."""
    has_freed = False
    for state in run.states:
        try:
            has_freed |= state.relieve(call)
        except Exception:
            logger.exception("FrameThrift: %s could not let go of what it has stored", state.technique.name)
    return has_freed


def _attempt(run: Run, call: Call, compute: Callable[[dict[str, Any]], Any]) -> Any:
    before = CURRENT.get()
    try:
        changes = _ask(run, call)
        CURRENT.set(call)
        with _bound(call):
            output = compute(changes)
    except BaseException as error:
        for state in run.states:
            _let_go(state, call, error)
        raise
    finally:
        CURRENT.set(before)
    for state in run.states:
        for outcome in state.called(call, None):
            call.count(state, outcome)
    run.absorb(call)
    return output


def _let_go(state: State, call: Call, error: BaseException) -> None:
    try:
        list(state.called(call, error))
    except Exception:
        # The error on its way is the one that the user has to see.
        logger.exception("FrameThrift: %s could not let go of a forward", state.technique.name)


def _ask(run: Run, call: Call) -> dict[str, Any]:
    """Who declines the forward, and the arguments that it is told instead by those who do not."""
    changes: dict[str, Any] = {}
    for state in run.states:
        roles = state.technique.roles
        reply = call.tokens.reason if roles and isinstance(call.tokens, Unclear) else state.call(call)
        if not isinstance(reply, str):
            call.acting.append(state)
            changes |= reply
            if reply:
                call.count(state, None)
        elif state.technique.unit == ATTENTION_CALLS:
            call.count(state, reply, call.sites.count_of(roles))
        else:
            call.count(state, reply)
    return changes


def _bound(call: Call) -> AbstractContextManager[None]:
    """Everything that those who act put over modules, the first stage outermost."""
    attention = Forward.of(call)
    call.is_unwatched = Role.VIDEO_SELF not in attention.says
    having = [state for state in call.acting if overrides(state, "modules")]
    if not attention.says and not having:
        return nullcontext()
    return shadowed(chain(attention.shadows(), *(_modules(call, state) for state in reversed(having))))


def _modules(call: Call, state: State) -> Iterator[tuple[torch.nn.Module, Replacement]]:
    for module, replacement in state.modules(call):
        call.shadowing.add(state)
        yield module, replacement


# What torch.compile makes of a forward has nothing to gain from it.
@torch.compiler.disable(recursive=False)
def _diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The same forward behind ComfyUI's own last changes of options."""
    call = CURRENT.get()
    if call is not None:
        changes = {name: value for state in call.acting for name, value in state.forward(call).items()}
        for given in (*args, *kwargs.values()):
            if changes and isinstance(given, dict) and PLAN in given:
                given.update(changes)
    return executor(*args, **kwargs)


def _is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    # Newer releases know that some of them come as errors of the accelerator.
    is_oom = getattr(mm, "is_oom", None)
    return type(error).__name__ == "AcceleratorError" and is_oom is not None and bool(is_oom(error))


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.PREPARE_SAMPLING: _prepare_sampling,
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.APPLY_MODEL: _apply_model,
    WrappersMP.DIFFUSION_MODEL: _diffusion_model,
}
