"""Blocks and their sub-modules in one forward: computed as ever, kept from, or replaced by what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from . import backend
from .freeze import BLOCKS, WORK, Freeze
from .kernels.half import saturated
from .layouts.layout import Layout
from .recorder import outliving_blocks
from .reuse import Moment, Place
from .shadow import shadowed, uncompiled
from .technique import NO_OPTIONS


def bound_blocks(
    freeze: Freeze | None, moment: Moment | None, layout: Layout, patches: Mapping[Any, Any]
) -> AbstractContextManager[None]:
    """For the duration of one forward, put the freeze on top of whatever else handles blocks.

    patches: what other packs have put around blocks, by place.
    """
    if freeze is None or moment is None or freeze.scope not in (WORK, BLOCKS):
        return nullcontext()
    indices = range(freeze.blocks_kept, len(layout.blocks) - freeze.blocks_kept)
    if freeze.scope == WORK:
        return shadowed(_work(moment, layout, indices))
    # Where nothing but video flows through the blocks, and nobody adds to it, a run of frozen ones is one sum.
    is_one = not layout.has_other_streams and not patches
    return shadowed(_whole(moment, layout, [indices] if is_one else [range(i, i + 1) for i in indices]))


def _work(
    moment: Moment, layout: Layout, indices: range
) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    for index in indices:
        for name, module in layout.per_frame_work(layout.blocks[index]).items():
            yield module, partial(_forward_work, moment, (index, name))


@torch.compiler.disable(recursive=False)
def _forward_work(
    moment: Moment,
    place: Place,
    original: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    value = _recall(moment, place, x)
    if value is not None:
        return value
    out = original(x, *args, **kwargs)
    _remember(moment, place, out)
    return out


# What keeps and recalls is Python that torch.compile has nothing to gain from.
@torch.compiler.disable
def _recall(moment: Moment, place: Place, like: torch.Tensor) -> torch.Tensor | None:
    if moment.is_exchanged(place[0], backend.in_force()) or not moment.has(place, like):
        return None
    return moment.value(place)


@torch.compiler.disable
def _remember(moment: Moment, place: Place, value: torch.Tensor) -> None:
    moment.computed += 1
    if moment.is_stored and place[0] not in moment.reuse.exchanged_blocks:
        moment.store(place, value.detach())


def _whole(
    moment: Moment, layout: Layout, runs: Iterable[range]
) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    for run in runs:
        stretch = _Stretch(moment, layout, run)
        for index in run:
            yield layout.blocks[index], partial(_forward_block, stretch, index)


@torch.compiler.disable(recursive=False)
def _forward_block(
    stretch: _Stretch, index: int, original: Callable[..., Any], stream: Any, *args: Any, **kwargs: Any
) -> Any:
    if stretch.is_frozen_at(index, stream, "transformer_options" in kwargs):
        return stretch.skip(index, original, stream, *args, **kwargs)
    out = original(stream, *args, **kwargs)
    stretch.leave(index, out)
    return out


class _Stretch:
    """Neighbouring blocks whose contributions to the video stream are kept as one."""

    def __init__(self, moment: Moment, layout: Layout, indices: range) -> None:
        self.moment, self.layout, self.indices = moment, layout, indices
        self.place = indices.start, "block"
        self.before: torch.Tensor | None = None
        self.is_frozen = False

    @torch.compiler.disable
    def is_frozen_at(self, index: int, stream: Any, has_options: bool) -> bool:
        """Whether the block leaves video out; decided at the first one for all."""
        if index == self.indices[0]:
            self._enter(self.layout.video_of(stream), has_options)
        return self.is_frozen

    @torch.compiler.disable
    def skip(self, index: int, original: Callable[..., Any], stream: Any, *args: Any, **kwargs: Any) -> Any:
        """What the block puts out if it leaves video out; the first one adds what all of them would have added."""
        added = self.moment.value(self.place) if index == self.indices[0] else None
        out = self.layout.beside_video(partial(uncompiled, original), stream, *args, **kwargs)
        if added is not None:
            saturated(self.layout.video_of(out).add_(added))
        return out

    @torch.compiler.disable
    def leave(self, index: int, out: Any) -> None:
        """After a computed block: behind the last one, keep what they have added."""
        self.moment.computed += 1
        if index != self.indices[-1] or self.before is None:
            return
        before, self.before = self.before, None
        added = before.neg_().add_(self.layout.video_of(out).detach())
        self.moment.store(self.place, saturated(added))

    def _enter(self, video: torch.Tensor, has_options: bool) -> None:
        self.is_frozen, self.before = False, None
        if self.moment.is_exchanged(self.place[0], backend.in_force()):
            return
        self.is_frozen = self.moment.has(self.place, like=video)
        if self.is_frozen and self.layout.has_other_streams and not has_options:
            self.is_frozen, self.moment.obstacle = False, NO_OPTIONS
        if not self.is_frozen and self.moment.is_stored:
            # Blocks write into what they are given, and a stretch may be longer than one.
            with outliving_blocks():
                self.before = torch.clone(video.detach())
