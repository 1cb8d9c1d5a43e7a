"""Blocks and their sub-modules in one forward: computed as ever, kept from, or replaced by what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from .freeze import BLOCKS, WORK, Freeze
from .layouts.layout import Layout
from .reuse import Moment, Place
from .shadow import shadowed
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
    if moment.has(place, like=x):
        return moment.value(place)
    out = original(x, *args, **kwargs)
    moment.computed += 1
    if moment.is_stored:
        moment.store(place, out.detach())
    return out


def _whole(
    moment: Moment, layout: Layout, runs: Iterable[range]
) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    for run in runs:
        stretch = _Stretch(moment, layout, run)
        for index in run:
            yield layout.blocks[index], partial(_forward_block, stretch, index)


class _Stretch:
    """Neighbouring blocks whose contributions to the video stream are kept as one."""

    def __init__(self, moment: Moment, layout: Layout, indices: range) -> None:
        self.moment, self.layout, self.indices = moment, layout, indices
        self.before: torch.Tensor | None = None
        self.is_frozen = False

    def enter(self, video: torch.Tensor, has_options: bool) -> torch.Tensor | None:
        """What the first block of a frozen stretch adds, or None where all are computed."""
        place = self.indices[0], "block"
        self.is_frozen = self.moment.has(place, like=video)
        if self.is_frozen and self.layout.has_other_streams and not has_options:
            self.is_frozen, self.moment.obstacle = False, NO_OPTIONS
        if self.is_frozen:
            return self.moment.value(place)
        # Blocks write into what they are given.
        self.before = torch.clone(video.detach()) if self.moment.is_stored else None
        return None

    def leave(self, video: torch.Tensor) -> None:
        before, self.before = self.before, None
        if before is not None:
            self.moment.store((self.indices[0], "block"), before.neg_().add_(video.detach()))


@torch.compiler.disable(recursive=False)
def _forward_block(
    stretch: _Stretch, index: int, original: Callable[..., Any], stream: Any, *args: Any, **kwargs: Any
) -> Any:
    layout = stretch.layout
    added = None
    if index == stretch.indices[0]:
        added = stretch.enter(layout.video_of(stream), "transformer_options" in kwargs)
    if stretch.is_frozen:
        out = layout.beside_video(original, stream, *args, **kwargs)
        if added is not None:
            layout.video_of(out).add_(added)
        return out
    out = original(stream, *args, **kwargs)
    stretch.moment.computed += 1
    if index == stretch.indices[-1]:
        stretch.leave(layout.video_of(out))
    return out
