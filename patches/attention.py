"""One attention call: read, passed through the techniques of the plan, handed to the innermost backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import backend
from .kernels.tokens import VideoTokens
from .layouts.layout import Layout, Role, Site, Unclear
from .reuse import OUTSIDE_RANGE, Moment
from .run import Run
from .shadow import inner, is_rewritten, shadowed, uncompiled
from .technique import NO_OPTIONS, Attend, AttentionCall, AttentionTechnique

OVERRIDE = "optimized_attention_override"
PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

TOKEN_COUNT = "TOKEN_COUNT"
SPLIT_HEADS = "SPLIT_HEADS"


@dataclass(frozen=True)
class Forward:
    """What is the same for every attention call of one forward."""

    run: Run
    layout: Layout
    tokens: VideoTokens | Unclear
    sigma: float
    moment: Moment | None = None

    @property
    def techniques(self) -> list[AttentionTechnique]:
        return [entry for entry in self.run.plan if isinstance(entry, AttentionTechnique)]


@contextmanager
def bound_attention(forward: Forward) -> Iterator[None]:
    """For the duration of one forward, put the plan on top of whatever else handles attention.

    The attention modules are shadowed, not their class, and only there is the override slot filled, in a
    copy of transformer_options: the module tells the role of the call, and whoever wrote to the slot, at
    whatever time, ends up below us. Blocks that another pack has rewritten may call attention themselves,
    so there the slot is filled for the whole block.
    """
    roles = {technique.role for technique in forward.techniques}
    if not roles:
        yield
        return
    blocks = [(index, inner(block)) for index, block in enumerate(forward.layout.blocks)]
    rewritten = {index: block for index, block in blocks if is_rewritten(block)}
    with shadowed(_shadows(forward, roles, rewritten)):
        yield


def _shadows(
    forward: Forward, roles: set[Role], rewritten: Mapping[int, torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    for module, site in forward.layout.sites():
        if site.role in roles:
            yield module, partial(_forward_module, forward, site, module)
        elif site.block in rewritten:
            yield module, _forward_other_module
    if Role.VIDEO_SELF in roles:
        modules = {
            site.block: module for module, site in forward.layout.sites() if site.role is Role.VIDEO_SELF
        }
        for index, block in rewritten.items():
            site = Site(Role.VIDEO_SELF, index, len(forward.layout.blocks))
            yield block, partial(_forward_rewritten_block, forward, site, modules.get(index))


@torch.compiler.disable
def _forward_module(
    forward: Forward,
    site: Site,
    module: torch.nn.Module,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    options = kwargs.get("transformer_options")
    if options is None:
        techniques = [technique for technique in forward.techniques if technique.role is site.role]
        forward.run.count_attention([(technique, NO_OPTIONS) for technique in techniques], 0, 1)
        return original(*(_without_ours(given) for given in args), **kwargs)
    options = _without_ours(options)
    override = partial(_override, forward, site, module, kwargs.get("mask"), options)
    return original(*args, **{**kwargs, "transformer_options": {**options, OVERRIDE: override}})


@torch.compiler.disable
def _forward_other_module(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a rewritten block, a module whose calls are no business of the plan."""
    named = {name: _without_ours(given) for name, given in kwargs.items()}
    return original(*(_without_ours(given) for given in args), **named)


@torch.compiler.disable
def _forward_rewritten_block(
    forward: Forward,
    site: Site,
    module: torch.nn.Module | None,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    options = kwargs.get("transformer_options")
    if options is None:
        return original(*args, **kwargs)
    override = _BlockOverride(forward, site, module, kwargs, options)
    told = {**kwargs, "transformer_options": {**options, OVERRIDE: override}}
    return uncompiled(original, *args, **told)


@dataclass(frozen=True)
class _BlockOverride:
    """What a rewritten block calls itself, without one of its modules in between.

    given: the named arguments of the block. options: the transformer_options without us.
    """

    forward: Forward
    site: Site
    module: torch.nn.Module | None
    given: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        forward, layout = self.forward, self.forward.layout
        call = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        is_ours: bool | Unclear = False
        if isinstance(forward.tokens, VideoTokens):
            is_ours = layout.is_self_attention(call["q"], call["k"], forward.tokens, self.given)
        if is_ours is True:
            mask = layout.block_mask(self.given)
            return _override(forward, self.site, self.module, mask, self.options, func, *args, **kwargs)
        if isinstance(is_ours, Unclear):
            techniques = [technique for technique in forward.techniques if technique.role is self.site.role]
            forward.run.count_attention([(technique, is_ours.reason) for technique in techniques], 0, 1)
        kwargs["transformer_options"] = self.options
        below = self.options.get(OVERRIDE)
        return func(*args, **kwargs) if below is None else below(func, *args, **kwargs)


def _without_ours(given: Any) -> Any:
    """Options as they were before a rewritten block was told of us; anything else as it is."""
    ours = given.get(OVERRIDE) if isinstance(given, dict) else None
    return ours.options if isinstance(ours, _BlockOverride) else given


def _override(
    forward: Forward,
    site: Site,
    module: torch.nn.Module | None,
    module_mask: Any,
    options: Mapping[str, Any],
    func: Callable[..., torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """What ComfyUI calls instead of `func`; `options` are the transformer_options without us.

    Below us comes what another pack has set, else what the checkpoint names for this module, else `func`.
    """
    given = dict(zip(PARAMETERS, args, strict=False))
    given.update(kwargs)
    given["transformer_options"] = options
    below: Callable[..., torch.Tensor]
    if OVERRIDE in options:
        below = partial(options[OVERRIDE], func)
    else:
        below = backend.of_checkpoint(module) or func

    def innermost(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rest = {name: value for name, value in given.items() if name not in ("q", "k", "v", "heads", "mask")}
        return below(q, k, v, given["heads"], mask=mask, **rest)

    call = _read_call(forward, site, module_mask, given, is_foreign=OVERRIDE in options)
    attend: Attend = innermost
    outcomes: list[tuple[AttentionTechnique, str | None]] = []
    share = 1.0
    for technique in sorted(forward.techniques, key=lambda t: t.stage, reverse=True):
        if technique.role is not site.role:
            continue
        reason = _reason_to_decline(forward, technique, call)
        outcomes.append((technique, reason))
        if not isinstance(call, AttentionCall):
            continue
        if reason is None:
            attend = partial(_attend, technique, call, attend)
            share *= technique.cost(call)
            call = replace(call, is_covered=True)
        else:
            technique.observe(call)
    pairs = given["q"].shape[-2] * given["k"].shape[-2]
    forward.run.count_attention(outcomes, pairs, share)
    return attend(given["q"], given["k"], given["v"], given.get("mask"))


def _attend(
    technique: AttentionTechnique,
    call: AttentionCall,
    inner: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    return technique.attend(replace(call, q=q, k=k, v=v, mask=mask), inner)


def _read_call(
    forward: Forward, site: Site, module_mask: Any, given: Mapping[str, Any], is_foreign: bool
) -> AttentionCall | Unclear:
    tokens = forward.tokens
    if isinstance(tokens, Unclear):
        return tokens
    if given.get("skip_reshape") or given.get("skip_output_reshape"):
        return Unclear(SPLIT_HEADS)
    q, k, v, mask = given["q"], given["k"], given["v"], given.get("mask")
    if k.shape[1] != tokens.total:
        return Unclear(TOKEN_COUNT)
    rows = forward.layout.query_rows(q, mask, module_mask, tokens)
    if isinstance(rows, Unclear):
        return rows
    return AttentionCall(
        q,
        k,
        v,
        mask,
        rows,
        tokens,
        site,
        heads=given["heads"],
        scale=given.get("scale"),
        is_foreign=is_foreign,
        moment=forward.moment,
    )


def _reason_to_decline(
    forward: Forward, technique: AttentionTechnique, call: AttentionCall | Unclear
) -> str | None:
    if isinstance(call, Unclear):
        return call.reason
    if not forward.run.clock.is_within(forward.sigma, technique.start_percent, technique.end_percent):
        return OUTSIDE_RANGE
    return technique.reason_to_decline(call)
