"""One attention call: read, passed through the techniques of the plan, handed to the innermost backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .kernels.tokens import VideoTokens
from .layouts.layout import Layout, Site, Unclear
from .reuse import OUTSIDE_RANGE, Moment
from .run import Run
from .shadow import shadowed
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
    whatever time, ends up below us.
    """
    roles = {technique.role for technique in forward.techniques}
    sites = [(module, site) for module, site in forward.layout.sites() if site.role in roles]
    with shadowed((module, partial(_forward_module, forward, site)) for module, site in sites):
        yield


@torch.compiler.disable
def _forward_module(
    forward: Forward, site: Site, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    options = kwargs.get("transformer_options")
    if options is None:
        techniques = [technique for technique in forward.techniques if technique.role is site.role]
        forward.run.count_attention([(technique, NO_OPTIONS) for technique in techniques], 0, 1)
        return original(*args, **kwargs)
    override = partial(_override, forward, site, kwargs.get("mask"), options)
    return original(*args, **{**kwargs, "transformer_options": {**options, OVERRIDE: override}})


def _override(
    forward: Forward,
    site: Site,
    module_mask: Any,
    options: Mapping[str, Any],
    func: Callable[..., torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """What ComfyUI calls instead of `func`; `options` are the transformer_options without us."""
    given = dict(zip(PARAMETERS, args, strict=False))
    given.update(kwargs)
    given["transformer_options"] = options
    backend = partial(options[OVERRIDE], func) if OVERRIDE in options else func

    def innermost(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rest = {name: value for name, value in given.items() if name not in ("q", "k", "v", "heads", "mask")}
        return backend(q, k, v, given["heads"], mask=mask, **rest)

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
