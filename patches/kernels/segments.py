"""Attention in which each stretch of queries sees some ranges of the keys, and who sees what.

Names: B batch, N tokens, C = heads × head width. Consecutive queries with the same keys form one `Segment`,
answered by one ordinary attention call; where segments are alike, one call answers many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

from .pooling import Coarse

# Copied keys, and copied values, hold at most so many times the rows of the originals. With two, a block of
# LTX still needs more memory in its feed-forward (hidden layer and activation, four times its input each).
INTERLEAVED_ROWS = 2
# Views cost nothing where the backend reads them in place, as PyTorch's does; others copy what they are given.
VIEWED_ROWS = 8

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Query tokens [start, stop), the token ranges they see, ascending and disjoint, and what they see as pooled."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    coarse: tuple[Coarse, ...] = ()

    @property
    def key_count(self) -> int:
        return sum(b - a for a, b in self.keys) + sum(coarse.key_count for coarse in self.coarse)


@dataclass(frozen=True)
class Interior:
    """Consecutive segments, called frames here, that differ only in where their window starts.

    `frames` query frames of `per_frame` tokens, the first one at token `start`; each sees `2·window + 1`
    frames around itself and all of `shared`.
    """

    start: int
    frames: int
    per_frame: int
    window: int
    shared: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.start + self.frames * self.per_frame


@dataclass(frozen=True)
class Segments:
    """Who sees what: `parts` in ascending order cover all queries; there are `total` keys."""

    parts: tuple[Segment, ...]
    total: int
    _pairs: dict[range, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stops = [0, *(part.stop for part in self.parts)]
        if [part.start for part in self.parts] != stops[:-1]:
            raise ValueError(
                f"segments: expected parts that follow each other from query 0 on, got {self.parts}."
            )

    @staticmethod
    @lru_cache(maxsize=64)
    def dense(queries: int, keys: int, /) -> Segments:
        """Every query sees every key. The same sizes give the same object."""
        return Segments((Segment(0, queries, ((0, keys),)),), keys)

    @property
    def queries(self) -> int:
        return self.parts[-1].stop

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.parts, self.total))

    @cached_property
    def is_coarse(self) -> bool:
        """Whether anything is seen as pooled."""
        return any(part.coarse for part in self.parts)

    @cached_property
    def is_dense(self) -> bool:
        return not self.is_coarse and all(part.key_count == self.total for part in self.parts)

    def pairs(self, rows: range) -> int:
        """Query-key pairs that are computed for the query tokens `rows`; dense attention has rows × total."""
        if rows not in self._pairs:
            self._pairs[rows] = sum(
                max(0, min(part.stop, rows.stop) - max(part.start, rows.start)) * part.key_count
                for part in self.parts
            )
        return self._pairs[rows]

    def narrowed(self, other: Segments) -> Segments:
        """What is seen here and in `other`, of the same queries and keys. Raises ValueError if anything is pooled."""
        if self.is_dense:
            return other
        if self.is_coarse or other.is_coarse:
            raise ValueError("segments: expected ranges of tokens, got pooled ones; narrow before you pool.")
        parts = []
        for one in self.parts:
            for two in other.parts:
                start, stop = max(one.start, two.start), min(one.stop, two.stop)
                if start < stop:
                    both = ((max(a, c), min(b, d)) for a, b in one.keys for c, d in two.keys)
                    parts.append(Segment(start, stop, tuple(sorted((a, b) for a, b in both if a < b))))
        return Segments(tuple(sorted(parts, key=lambda part: part.start)), self.total)

    @cached_property
    def interior(self) -> Interior | None:
        """The longest run of equally large segments, each in the middle of a key range that moves with it, if any.

        Their other key ranges are the same. Of runs of one length it is the first.
        """
        if self.is_dense or self.is_coarse:
            return None
        runs: list[Interior] = []
        seen: list[tuple[tuple[int, int], ...]] = [(), *(part.keys for part in self.parts), ()]
        for part, before, after in zip(self.parts, seen, seen[2:], strict=False):
            near = next((r for r in part.keys if r[0] < part.start and part.stop < r[1]), None)
            # A range that a neighbour sees as well does not move: that this part is in its middle is chance.
            if near is None or near in before or near in after:
                continue
            size = part.stop - part.start
            window, uneven = divmod(part.start - near[0], size)
            if uneven or near[1] - part.stop != window * size:
                continue
            one = Interior(part.start, 1, size, window, tuple(r for r in part.keys if r != near))
            if runs and one == replace(runs[-1], start=runs[-1].stop, frames=1):
                runs[-1] = replace(runs[-1], frames=runs[-1].frames + 1)
            else:
                runs.append(one)
        return max(runs, key=lambda run: run.frames, default=None)


def attend_segments(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    mask: torch.Tensor | None,
    rows: range,
    segments: Segments,
    attend: Attend,
) -> torch.Tensor:
    """One call of `attend(q, k, v, mask)` per segment, or in all if each sees everything: right for every mask.

    `rows` says which tokens the rows of `q_BNC` are; `mask` [..., 1 or rows, total] is cut like queries and keys.
    Returns [B, rows, C]. Pooled keys are the business of `coarse`.
    """
    assert not segments.is_coarse
    if segments.is_dense:
        return attend(q_BNC, k_BNC, v_BNC, mask)
    parts = []
    for segment in segments.parts:
        start, stop = max(segment.start, rows.start), min(segment.stop, rows.stop)
        if start >= stop:
            continue
        cut = None
        if mask is not None:
            cut = take(mask, segment.keys, dim=-1)
            if cut.shape[-2] > 1:
                cut = cut[..., start - rows.start : stop - rows.start, :]
        q = q_BNC[:, start - rows.start : stop - rows.start]
        parts.append(attend(q, take(k_BNC, segment.keys), take(v_BNC, segment.keys), cut))
    return torch.cat(parts, dim=1)


def attend_batched(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    mask: torch.Tensor | None,
    rows: range,
    segments: Segments,
    attend: Attend,
) -> torch.Tensor:
    """As `attend_segments`, with the interior in few large calls where that is possible.

    That needs all queries, no mask, and an interior. The large calls are made for each batch item, so a batch
    of more items than interior frames goes segment by segment.
    """
    interior, items = segments.interior, q_BNC.shape[0]
    if mask is not None or len(rows) != segments.queries or interior is None or items > interior.frames:
        return attend_segments(q_BNC, k_BNC, v_BNC, mask, rows, segments, attend)
    out = torch.empty_like(q_BNC)
    for segment in segments.parts:
        if segment.stop <= interior.start or segment.start >= interior.stop:
            q = q_BNC[:, segment.start : segment.stop]
            out[:, segment.start : segment.stop] = attend(
                q, take(k_BNC, segment.keys), take(v_BNC, segment.keys), None
            )
    for item in range(items):
        _attend_interior(q_BNC[item], k_BNC[item], v_BNC[item], out[item], interior, attend)
    return out


def _attend_interior(
    q_NC: torch.Tensor,
    k_NC: torch.Tensor,
    v_NC: torch.Tensor,
    out_NC: torch.Tensor,
    interior: Interior,
    attend: Attend,
) -> None:
    """Fill the interior rows of `out_NC` by batches of frames over overlapping views of the keys.

    Without shared keys the windows of consecutive frames are one strided view of K and V. With shared keys
    they are so too once the shared tokens are put in after every 2·window + 1 frames: any stretch of that
    period then holds each frame of one window once and the shared tokens once, and the order of keys does
    not matter. Both are done for so many frames at a time that copies stay under `INTERLEAVED_ROWS`
    and views under `VIEWED_ROWS`.
    """
    size, window = interior.per_frame, interior.window
    near = (2 * window + 1) * size
    shared = sum(b - a for a, b in interior.shared)
    period = near + shared
    first_key = interior.start - window * size
    if shared:
        periods = max(2, INTERLEAVED_ROWS * k_NC.shape[0] // period)
        most = (periods - 1) * (2 * window + 1) + 1
    else:
        most = VIEWED_ROWS * k_NC.shape[0] // near
    chunks = -(-interior.frames // most)
    chunk = -(-interior.frames // chunks)
    for begin in range(0, interior.frames, chunk):
        frames = min(chunk, interior.frames - begin)
        key_rows = slice(first_key + begin * size, first_key + (begin + frames + 2 * window) * size)
        k, v = k_NC[key_rows], v_NC[key_rows]
        if shared:
            k = interleave(k, take(k_NC[None], interior.shared)[0], near)
            v = interleave(v, take(v_NC[None], interior.shared)[0], near)
        query_rows = slice(interior.start + begin * size, interior.start + (begin + frames) * size)
        q_frames = q_NC[query_rows].view(frames, size, -1)
        out_frames = out_NC[query_rows].view(frames, size, -1)
        for start, stop, step in window_batches(frames, 2 * window + 1, bool(shared)):
            row = start // (2 * window + 1) * period + start % (2 * window + 1) * size
            stride = period if step > 1 else size
            which = slice(start, stop, step)
            count = len(range(start, stop, step))
            out_frames[which] = attend(
                q_frames[which],
                _views(k, row, period, stride, count),
                _views(v, row, period, stride, count),
                None,
            )


def window_batches(frames: int, period: int, interleaved: bool) -> list[tuple[int, int, int]]:
    """Frames (start, stop, step) that one strided view can serve, in as few batches as possible."""
    if not interleaved:
        return [(0, frames, 1)]
    if -(-frames // period) <= period:
        return [(start, min(start + period, frames), 1) for start in range(0, frames, period)]
    return [(start, frames, period) for start in range(period)]


def interleave(x_NC: torch.Tensor, shared_SC: torch.Tensor, near: int) -> torch.Tensor:
    """Put `shared_SC` behind every `near` rows of `x_NC`, also behind an incomplete last stretch."""
    pieces = []
    for piece in x_NC.split(near):
        pieces += [piece, shared_SC]
    return torch.cat(pieces)


def take(x: torch.Tensor, ranges: tuple[tuple[int, int], ...], dim: int = 1) -> torch.Tensor:
    """The given ranges of dimension `dim`: a view if there is one range, else a copy."""
    pieces = [x.narrow(dim, a, b - a) for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _views(x_NC: torch.Tensor, row: int, length: int, stride: int, count: int) -> torch.Tensor:
    """[count, length, C]: `count` overlapping stretches of `length` rows, each `stride` rows after the one before."""
    return x_NC[row : row + (count - 1) * stride + length].unfold(0, length, stride).transpose(1, 2)
