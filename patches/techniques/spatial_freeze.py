"""Spatial freeze: some steps reuse what a full step before them has computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from .. import backend
from ..call import Attend, AttentionCall, Call, Load, Room, Sampling
from ..clock import Schedule, SigmaClock
from ..kernels.half import saturated
from ..kernels.lse import has_lse
from ..kernels.split_softmax import all_but_own_frame, attend_anew, own_frame
from ..kernels.tokens import VideoTokens
from ..layouts.layout import Layout, Stream, Unclear
from ..layouts.role import Role
from ..layouts.work import PER_FRAME, VIDEO, Work
from ..reuse.cache import ATTENTION_EXCHANGED, CACHE_FULL, Cache, Key, Lookup, Place, Rhythm
from ..reuse.recorder import outliving_blocks
from ..reuse.store import DEFAULT, FP8, GIB, GPU, HOST, PLACEMENTS, PRECISIONS, Store
from ..settings import Choice, Number, Whole, setting
from ..shadow import uncompiled
from ..technique import FOREIGN_OVERRIDE, MASKED, NO_LSE, Replacement, State, Technique

ATTENTION, WORK, BLOCKS = "spatial attention", "per-frame work", "whole blocks"
SCOPES = (ATTENTION, WORK, BLOCKS)
HOLD, LINEAR = "hold", "linear"
FORECASTS = (HOLD, LINEAR)

ONE_FRAME = "ONE_FRAME"
KEPT_BLOCK = "KEPT_BLOCK"
OTHER_TECHNIQUE = "OTHER_TECHNIQUE"

# What is stored of an attention call's own-frame share.
PARTS = ("out", "lse")

OUT_OF_MEMORY_ADVICE = (
    "FrameThrift: memory ran out beside what spatial freeze keeps (%s). All of it is let go and the run goes on without "
    "freezing. For the next one set cache_device to cpu, cache_dtype to fp8_e4m3fn, or a cache_limit_gb."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpatialFreeze(Technique):
    """Within a part of the schedule every `refresh_every`-th step is full; the others reuse, per `scope`.

    WORK: the outputs of feed-forward and text cross-attention. BLOCKS: what blocks add to the video stream. ATTENTION: a
    query's softmax over its own frame, while that over other frames is fresh. The first step in the range and the last of
    the schedule are full. forecast: the last full value (HOLD), or the line through the last two (LINEAR).
    blocks_kept: so many first and last blocks are always computed.
    """

    name: ClassVar[str] = "spatial freeze"
    stage: ClassVar[int] = 10
    does: ClassVar[str] = "freezes"

    refresh_every: int = setting(Whole(3, 1, 16))
    scope: str = setting(Choice(BLOCKS, SCOPES))
    forecast: str = setting(Choice(LINEAR, FORECASTS))
    blocks_kept: int = setting(Whole(0, 0, 64))
    cache_device: str = setting(Choice("auto", PLACEMENTS))
    cache_limit_gb: float = setting(Number(0.0, 0.0, 1024.0, 0.1))
    cache_dtype: str = setting(Choice(DEFAULT, PRECISIONS))
    schedule: Schedule = field(default=Schedule(0.6, 1.0), kw_only=True)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.VIDEO_SELF} if self.scope == ATTENTION else ())

    @property
    def is_neutral(self) -> bool:
        return self.refresh_every == 1 or super().is_neutral

    @property
    def neutral_because(self) -> str:
        return "refresh_every is 1" if self.refresh_every == 1 else super().neutral_because

    def describe(self) -> str:
        kept = f", {self.blocks_kept} blocks kept at each end" if self.blocks_kept else ""
        packed = "" if self.cache_dtype == DEFAULT else f", kept as {self.cache_dtype}"
        return f"{self.scope}, every {self.refresh_every}. step full, {self.forecast}{kept}{packed}"

    def acting_steps(self, clock: SigmaClock) -> list[int]:
        """The steps that are frozen, if every step before them runs."""
        return list(self.rhythm(clock).frozen)

    def rhythm(self, clock: SigmaClock) -> Rhythm:
        return Rhythm(
            steps=clock.steps,
            within=tuple(super().acting_steps(clock)),
            refresh_every=self.refresh_every,
            has_forecast=self.has_forecast,
            places_a_block=1 if self.scope == BLOCKS else 2,
            is_earlier=clock.is_earlier,
            is_rising=clock.is_rising,
        )

    @property
    def has_forecast(self) -> bool:
        return self.forecast == LINEAR

    def blocks(self, count: int) -> range:
        """Those of so many blocks that may be frozen."""
        return range(self.blocks_kept, count - self.blocks_kept)

    def values_stored(self, stream: Stream) -> int:
        """How many tensors of the stream's size are stored for each cond."""
        # The log-sum-exp of a softmax share is next to nothing beside its output.
        places = len(self.blocks(stream.blocks))
        if self.scope == BLOCKS and stream.is_alone:
            places = min(places, 1)
        return places * (2 if self.scope == WORK else 1) * (2 if self.has_forecast else 1)

    def cost(self, work: Work) -> Work:
        for block in self.blocks(work.blocks):
            if self.scope == ATTENTION:
                work = work.with_segments(Role.VIDEO_SELF, block, all_but_own_frame(work.tokens))
            else:
                work = work.without(block, VIDEO if self.scope == BLOCKS else PER_FRAME)
        return work

    def words_for(self, part: Mapping[str, Any]) -> str:
        return "".join(
            f"; {size:.2g} GiB kept {'beside the model' if place == GPU else 'in host memory'}"
            for place, size in part["cache_gib"].items()
        )

    def begin(self, run: Sampling) -> State:
        kinds = {ATTENTION: FreezingAttention, WORK: FreezingWork, BLOCKS: FreezingBlocks}
        return kinds[self.scope](self, run)


class Freezing(State):
    """What all scopes have in common: a feature cache, and when to use it."""

    technique: SpatialFreeze

    def __init__(self, technique: SpatialFreeze, run: Sampling) -> None:
        super().__init__(technique, run)
        limit = int(technique.cache_limit_gb * GIB)
        self.store = Store(technique.cache_device, limit, technique.cache_dtype)
        self.cache = Cache(technique.rhythm(run.clock), self.store)
        self._load: Load | None = None
        self._wanted, self._is_asked = 0, False

    def wants(self, load: Load) -> int:
        store, self._load = self.store, load
        if load.is_on_cpu or not self.technique.acting_steps(self.run.clock):
            return 0
        width = 1 if store.precision == FP8 else load.width
        wanted = load.numbers * width * self.technique.values_stored(load.stream)
        wanted = min(wanted, store.limit) if store.limit else wanted
        # A run that is sampled in pieces comes here with each of them, and what is stored is there already.
        self._wanted = max(0, wanted - store.taken.total())
        self._is_asked = store.placement == GPU or (
            store.placement != HOST and load.has_room_for(self._wanted)
        )
        return self._wanted if self._is_asked else 0

    def granted(self, room: Room) -> None:
        store, load = self.store, self._load
        assert load is not None
        store.rooms[HOST] = room.host + store.taken[HOST]
        has_room = self._is_asked or load.is_on_cpu
        store.rooms[GPU] = store.taken[GPU] + (room.device if has_room else 0)
        if not has_room:
            store.expected = min(self._wanted, store.rooms[HOST])

    def obstacle(self, layout: Layout) -> str | None:
        """Why nothing of such a model can be frozen, or None."""
        return None if self.technique.blocks(len(layout.blocks)) else KEPT_BLOCK

    def call(self, call: Call) -> Mapping[str, Any] | str:
        reason = self.obstacle(call.layout)
        if reason is not None:
            return reason
        key = Key(call.conds, call.layout.context_frames, call.device)
        lookup = self.cache.look_up(key, call.step, call.sigma, call.evaluation)
        lookup.backend = backend.in_force()
        call[self] = lookup
        # Blocks whose attention is exchanged are learned of wherever it happens, be it before the range.
        is_watched = bool(call.replaced_blocks) or call.layout.is_perturbed
        return {} if lookup.reason is None or lookup.is_stored or is_watched else lookup.reason

    def called(self, call: Call, error: BaseException | None) -> list[str | None]:
        lookup: Lookup | None = call.get(self)
        if lookup is None:
            return []
        if error is not None:
            self.cache.drop(lookup.found)
            return []
        self.cache.make_ready(lookup.step, self._bytes_of_a_value(call))
        return lookup.finish() if self in call.acting else []

    def _bytes_of_a_value(self, call: Call) -> int:
        """What one stored value of such a forward takes; 0 if it cannot be told."""
        width, tokens = call.layout.width, call.tokens
        if self._load is None or isinstance(width, Unclear) or isinstance(tokens, Unclear):
            return 0
        return self.store.size_of_such((call.shape[0], tokens.total, width), self._load.width, call.device)

    def relieve(self, call: Call) -> bool:
        if not self.cache.is_in_use:
            return False
        logger.warning(OUT_OF_MEMORY_ADVICE, str(call.error))
        self.cache.give_up(call.device)
        return True

    def record(self) -> Mapping[str, Any]:
        return {"cache_gib": {place: size / GIB for place, size in self.store.most.items()}}

    def close(self) -> None:
        self.cache.close()


class FreezingModules(Freezing):
    """Freezes by what it puts over modules; frozen ones stream only the weights that they still need, none ahead."""

    def forward(self, call: Call) -> Mapping[str, Any]:
        lookup: Lookup = call[self]
        return {"prefetch_dynamic_vbars": False} if lookup.is_hit and lookup.found.entries else {}


class FreezingWork(FreezingModules):
    def obstacle(self, layout: Layout) -> str | None:
        work = layout.per_frame_work(layout.blocks[0])
        return work.reason if isinstance(work, Unclear) else super().obstacle(layout)

    def modules(self, call: Call) -> Iterator[tuple[torch.nn.Module, Replacement]]:
        for index in self.technique.blocks(len(call.layout.blocks)):
            work = call.layout.per_frame_work(call.layout.blocks[index])
            assert not isinstance(work, Unclear)
            for name, module in work.items():
                yield module, partial(_forward_work, call[self], (index, name))


@torch.compiler.disable(recursive=False)
def _forward_work(
    lookup: Lookup,
    place: Place,
    original: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    value = _recall(lookup, place, x)
    if value is not None:
        return value
    out = original(x, *args, **kwargs)
    _remember(lookup, place, out)
    return out


# What stores and recalls is Python that torch.compile has nothing to gain from.
@torch.compiler.disable
def _recall(lookup: Lookup, place: Place, like: torch.Tensor) -> torch.Tensor | None:
    if lookup.is_exchanged(place[0], backend.in_force()) or not lookup.has(place, like):
        return None
    return lookup.value(place)


@torch.compiler.disable
def _remember(lookup: Lookup, place: Place, value: torch.Tensor) -> None:
    lookup.computed += 1
    if lookup.is_stored and place[0] not in lookup.cache.exchanged_blocks:
        lookup.store(place, value.detach())


class FreezingBlocks(FreezingModules):
    def obstacle(self, layout: Layout) -> str | None:
        others = layout.has_other_streams
        return others.reason if isinstance(others, Unclear) else super().obstacle(layout)

    def modules(self, call: Call) -> Iterator[tuple[torch.nn.Module, Replacement]]:
        indices = self.technique.blocks(len(call.layout.blocks))
        # Where nothing but video flows through the blocks, and nobody adds to it, a run of frozen ones is one sum.
        is_one = not call.layout.has_other_streams and not call.replaced_blocks
        runs: Iterable[range] = [indices] if is_one else [range(i, i + 1) for i in indices]
        for run in runs:
            stretch = Stretch(call[self], call.layout, run)
            for index in run:
                yield call.layout.blocks[index], partial(_forward_block, stretch, index)


@torch.compiler.disable(recursive=False)
def _forward_block(
    stretch: Stretch, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if stretch.is_frozen_at(index, args, kwargs):
        return stretch.skip(index, original, args, kwargs)
    out = original(*args, **kwargs)
    stretch.leave(index, out)
    return out


class Stretch:
    """Neighbouring blocks whose contributions to the video stream are stored as one."""

    def __init__(self, lookup: Lookup, layout: Layout, indices: range) -> None:
        self.lookup, self.layout, self.indices = lookup, layout, indices
        self.place = indices.start, "block"
        self.before: torch.Tensor | None = None
        self.is_frozen = False

    @torch.compiler.disable
    def is_frozen_at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the block leaves video out; decided at the first one for all."""
        if index == self.indices[0]:
            self._enter(args, kwargs)
        return self.is_frozen

    @torch.compiler.disable
    def skip(
        self, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the block puts out if it leaves video out; the first one adds what all of them would have added."""
        added = self.lookup.value(self.place) if index == self.indices[0] else None
        out = self.layout.beside_video(partial(uncompiled, original), args, kwargs)
        if added is not None:
            saturated(self.layout.returned_video(out).add_(added))
        return out

    @torch.compiler.disable
    def leave(self, index: int, out: Any) -> None:
        """After a computed block: behind the last one, store what they have added."""
        self.lookup.computed += 1
        if index != self.indices[-1] or self.before is None:
            return
        before, self.before = self.before, None
        added = before.neg_().add_(self.layout.returned_video(out).detach())
        self.lookup.store(self.place, saturated(added))

    def _enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        lookup, video = self.lookup, self.layout.given_video(args, kwargs)
        self.is_frozen, self.before = False, None
        if lookup.is_exchanged(self.place[0], backend.in_force()):
            return
        self.is_frozen = lookup.has(self.place, like=video)
        obstacle = self.layout.obstacle_beside_video(kwargs) if self.is_frozen else None
        if obstacle is not None:
            self.is_frozen, lookup.obstacle = False, obstacle.reason
        if not self.is_frozen and lookup.is_stored:
            # Blocks write into what they are given, and a stretch may be longer than one.
            with outliving_blocks():
                self.before = torch.clone(video.detach())


class FreezingAttention(Freezing):
    def call(self, call: Call) -> Mapping[str, Any] | str:
        tokens = call.tokens
        if isinstance(tokens, VideoTokens) and tokens.frames < 2:
            return ONE_FRAME
        return FOREIGN_OVERRIDE if call.is_foreign else super().call(call)

    def called(self, call: Call, error: BaseException | None) -> list[str | None]:
        """Its attention calls are counted one by one."""
        super().called(call, error)
        return []

    def attend(self, attention: AttentionCall, inner: Attend) -> torch.Tensor | str:
        lookup: Lookup = attention.call[self]
        places = [(attention.site.block, part) for part in PARTS]
        q, k, v, heads = attention.q, attention.k, attention.v, attention.heads
        obstacle = self._obstacle(attention, lookup)
        reason = obstacle or lookup.reason
        if reason is None and all(map(lookup.has, places)):
            out, lse = map(lookup.value, places)
            attention.count_pairs(all_but_own_frame(attention.tokens).pairs(attention.rows))
            return attend_anew(q, k, v, heads, attention.tokens, (out, lse), attention.scale)
        lookup.computed += 1
        if lookup.is_stored and obstacle is None:
            own = own_frame(q, k, v, heads, attention.tokens, attention.scale)
            for place, value in zip(places, own, strict=True):
                lookup.store(place, value.detach(), is_exact=place[1] == "lse")
        return reason or CACHE_FULL

    def _obstacle(self, attention: AttentionCall, lookup: Lookup) -> str | None:
        """Why this call can be split at no step, or None."""
        site, tokens, q = attention.site, attention.tokens, attention.q
        if site.block not in self.technique.blocks(site.blocks):
            return KEPT_BLOCK
        if lookup.is_exchanged(site.block, backend.in_force()):
            return ATTENTION_EXCHANGED
        if attention.foreign is not None:
            return attention.foreign
        if not attention.segments.is_dense:
            return OTHER_TECHNIQUE
        if attention.mask is not None or len(attention.rows) != tokens.total:
            return MASKED
        if tokens.frames < 2:
            return ONE_FRAME
        if not has_lse(q.device.type, q.dtype, q.shape[-1] // attention.heads):
            return NO_LSE
        return None
