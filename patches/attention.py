"""One attention call: read, its geometry settled, executed segment by segment down to the innermost backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from . import backend
from .call import OVERRIDE, Attend, AttentionCall, Call
from .kernels.coarse import attend_masked, attend_merged
from .kernels.lse import has_lse
from .kernels.segments import Segments, attend_batched
from .kernels.tokens import VideoTokens
from .layouts.layout import NO_OPTIONS, Site, Unclear
from .layouts.role import Role
from .shadow import inner, is_rewritten, uncompiled
from .technique import CHECKPOINT_ATTENTION, FOREIGN_OVERRIDE, Replacement, State, overrides

PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

TOKEN_COUNT = "TOKEN_COUNT"
SPLIT_HEADS = "SPLIT_HEADS"
UNCHANGED = "UNCHANGED"
ANSWERED_BEFORE = "ANSWERED_BEFORE"

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Say(NamedTuple):
    """Who has a say in the attention of one role, all of them and by hook, in the order of stages."""

    states: list[State]
    see: list[State]
    attend: list[State]
    backend: list[State]


@dataclass(frozen=True)
class Forward:
    """What is the same for every attention call of one forward."""

    call: Call
    says: Mapping[Role, Say]

    @staticmethod
    def of(call: Call) -> Forward:
        says: dict[Role, Say] = {}
        for state in call.acting:
            hooks = [hook for hook in ("see", "attend", "backend") if overrides(state, hook)]
            for role in state.technique.roles if hooks else ():
                say = says.setdefault(role, Say([], [], [], []))
                for having in (say.states, *(getattr(say, hook) for hook in hooks)):
                    having.append(state)
                call.awaiting.add(state)
        return Forward(call, says)

    def shadows(self) -> Iterator[tuple[torch.nn.Module, Replacement]]:
        """Puts the plan on top of whatever else handles attention, for the duration of one forward.

        The attention modules are shadowed, not their class, and only there is the override slot filled, in a
        copy of transformer_options: the module tells the role of the call, and whoever wrote to the slot, at
        whatever time, ends up below us. Blocks that another pack has rewritten may call attention themselves,
        so there the slot is filled for the whole block.
        """
        if not self.says:
            return
        blocks = [(index, inner(block)) for index, block in enumerate(self.call.layout.blocks)]
        rewritten = {index: block for index, block in blocks if is_rewritten(block)}
        for module, site in self.call.sites:
            if site.role in self.says:
                yield module, partial(_forward_module, self, site, module)
            elif site.block in rewritten:
                yield module, _forward_other_module
        if Role.VIDEO_SELF in self.says:
            modules = {site.block: module for module, site in self.call.sites if site.role is Role.VIDEO_SELF}
            for index, block in rewritten.items():
                site = Site(Role.VIDEO_SELF, index, len(blocks))
                yield block, partial(_forward_rewritten_block, self, site, modules.get(index))

    def reach(self, role: Role) -> Say:
        """Those who have a say in an attention call that has come."""
        say = self.says[role]
        self.call.reached.update(say.states)
        return say

    def decline(self, role: Role, reason: str) -> None:
        for state in self.reach(role).states:
            self.call.count(state, reason)


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
        forward.decline(site.role, NO_OPTIONS)
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
        call = self.forward.call
        named = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        is_ours: bool | Unclear = False
        if isinstance(call.tokens, VideoTokens):
            is_ours = call.layout.is_self_attention(named["q"], named["k"], call.tokens, self.given)
        if is_ours is True:
            mask = call.layout.block_mask(self.given)
            return _override(self.forward, self.site, self.module, mask, self.options, func, *args, **kwargs)
        if isinstance(is_ours, Unclear):
            self.forward.decline(self.site.role, is_ours.reason)
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
    own = backend.of_checkpoint(module)
    below: Callable[..., torch.Tensor] = own or func
    foreign = None if own is None else CHECKPOINT_ATTENTION
    if OVERRIDE in options:
        below, foreign = partial(options[OVERRIDE], func), FOREIGN_OVERRIDE
    rest = {name: value for name, value in given.items() if name not in ("q", "k", "v", "heads", "mask")}

    def innermost(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return below(q, k, v, given["heads"], mask=mask, **rest)

    pairs = given["q"].shape[-2] * given["k"].shape[-2]
    attention = _read(forward.call, site, module_mask, given, foreign)
    if isinstance(attention, Unclear):
        forward.decline(site.role, attention.reason)
        forward.call.count_pairs(site.role, pairs, pairs)
        return innermost(given["q"], given["k"], given["v"], given.get("mask"))
    forward.call.count_pairs(site.role, pairs, 0)
    return _Attending(forward.reach(site.role)).output(attention, innermost)


def _read(
    call: Call, site: Site, module_mask: Any, given: Mapping[str, Any], foreign: str | None
) -> AttentionCall | Unclear:
    tokens = call.tokens
    if isinstance(tokens, Unclear):
        return tokens
    if given.get("skip_reshape") or given.get("skip_output_reshape"):
        return Unclear(SPLIT_HEADS)
    q, k, v, mask = given["q"], given["k"], given["v"], given.get("mask")
    queries, keys = q.shape[1], k.shape[1]
    if (site.role.has_video_keys and keys != tokens.total) or (
        site.role.has_video_queries and not site.role.has_video_keys and queries != tokens.total
    ):
        return Unclear(TOKEN_COUNT)
    rows: range | Unclear = range(queries)
    if site.role is Role.VIDEO_SELF:
        queries, rows = keys, call.layout.query_rows(q, mask, module_mask, tokens)
    if isinstance(rows, Unclear):
        return rows
    segments = Segments.dense(queries, keys)
    return AttentionCall(
        call, site, q, k, v, mask, rows, given["heads"], given.get("scale"), foreign, segments
    )


class _Attending:
    """What several techniques make of one attention call, and what became of each."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.outcomes: dict[State, str | None] = {}

    def output(self, attention: AttentionCall, innermost: Compute) -> torch.Tensor:
        for state in self.say.see:
            seen = state.see(attention.segments, attention)
            if isinstance(seen, str):
                self._note(state, seen)
            else:
                self._note(state, UNCHANGED if seen is attention.segments else None)
                attention.segments = seen
        inner: Attend = partial(self._execute, innermost)
        for state in reversed(self.say.attend):
            inner = partial(self._around, state, "attend", inner)
        out = inner(attention)
        for state in (*self.say.attend, *self.say.backend):
            # An earlier stage had the answer itself, and asked nobody.
            self.outcomes.setdefault(state, ANSWERED_BEFORE)
        for state, reason in self.outcomes.items():
            attention.call.count(state, reason)
        return out

    def _execute(self, innermost: Compute, attention: AttentionCall) -> torch.Tensor:
        rows, segments = attention.rows, attention.segments
        attention.count_pairs(segments.pairs(rows))
        compute = partial(self._compute, attention, innermost) if self.say.backend else innermost
        q, k, v, heads = attention.q, attention.k, attention.v, attention.heads
        if not segments.is_coarse:
            return attend_batched(q, k, v, attention.mask, rows, segments, compute)
        if not self.say.backend and has_lse(q.device.type, q.dtype, q.shape[-1] // heads):
            return attend_merged(q, k, v, heads, attention.scale, rows, segments)
        return attend_masked(q, k, v, rows, segments, compute)

    def _compute(
        self,
        attention: AttentionCall,
        innermost: Compute,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """One segment, or several alike at once, each of them a batch item."""

        def inner(piece: AttentionCall) -> torch.Tensor:
            return innermost(piece.q, piece.k, piece.v, piece.mask)

        chain: Attend = inner
        for state in reversed(self.say.backend):
            chain = partial(self._around, state, "backend", chain)
        return chain(replace(attention, q=q, k=k, v=v, mask=mask))

    def _around(self, state: State, hook: str, inner: Attend, attention: AttentionCall) -> torch.Tensor:
        out = getattr(state, hook)(attention, inner)
        if isinstance(out, str):
            self._note(state, out)
            return inner(attention)
        self._note(state, None)
        return out

    def _note(self, state: State, reason: str | None) -> None:
        """A technique of several hooks has acted if one of them has; else its first reason counts."""
        if reason is None or state not in self.outcomes:
            self.outcomes[state] = reason
