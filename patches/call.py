"""What techniques are told: of the model before it is loaded, of a step, of a forward, of an attention call."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .clock import Schedule, SigmaClock
from .kernels.segments import Segments
from .kernels.tokens import VideoTokens
from .layouts.layout import Layout, Site, Stream, Unclear
from .layouts.role import Role
from .shadow import is_compiled

OVERRIDE = "optimized_attention_override"

Attend = Callable[["AttentionCall"], torch.Tensor]


class Sampling:
    """The run that a state lives in, as far as it may ask and tell."""

    def __init__(self, clock: SigmaClock) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def say_once(self, warning: str) -> bool:
        """Whether this was not said in this run before."""
        with self._lock:
            is_new = warning not in self._said
            self._said.add(warning)
            return is_new


@dataclass(frozen=True)
class Load:
    """The model that is about to be loaded, and where to.

    stream: the video tokens that it will see. passes: conds evaluated in a step. width: bytes of a number that blocks
    compute with. weights: bytes of the model; total: bytes of the device; reserve: of those, what blocks compute in.
    """

    stream: Stream
    passes: int
    width: int
    weights: int
    total: int
    is_on_cpu: bool

    @property
    def numbers(self) -> int:
        """Numbers in the video tokens of all passes."""
        return self.stream.numbers * self.passes

    @property
    def reserve(self) -> int:
        # ComfyUI's own estimate is far too high for packed latents; a block holds about a dozen such tensors at once.
        return 16 * self.numbers * self.width

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes fit on the device beside the whole model."""
        return self.weights + self.reserve + size < 0.95 * self.total


@dataclass(frozen=True)
class Room:
    """Bytes that a technique may take on the device, beside the model that lies there now, and of host memory."""

    device: int
    host: int


class Step:
    """One evaluation by the sampler, counted from 1, at the sigma in `timestep` [B]."""

    def __init__(self, evaluation: int, timestep: torch.Tensor, clock: SigmaClock) -> None:
        self.evaluation, self.clock = evaluation, clock
        self._sigma: torch.Tensor | float = timestep

    @property
    def sigma(self) -> float:
        if isinstance(self._sigma, torch.Tensor):
            # Reading it waits for the GPU: not before somebody asks.
            self._sigma = float(self._sigma.flatten()[0])
        return self._sigma

    @property
    def number(self) -> int:
        """The step of the schedule that it belongs to, counted from 0; -1 without a schedule."""
        return self.clock.step_at(self.sigma) if self.clock.steps else -1


class Sites(tuple[tuple[torch.nn.Module, Site], ...]):
    """Every attention module of a model with its place."""

    @cached_property
    def _by_role(self) -> Counter[Role]:
        return Counter(site.role for _, site in self)

    def count_of(self, roles: Iterable[Role]) -> int:
        """How many there are of these roles."""
        return sum(self._by_role[role] for role in roles)


@dataclass(eq=False)
class Call:
    """One forward of one batch of conds. What techniques have to remember of it lies here, each under its own State.

    model: the diffusion model. evaluation: how many times the sampler has called for noise so far. shape, dtype, device: of the latent [B, ...];
    text: shape of the text [B, n, C]. options: transformer_options as others have left them. is_unwatched: nobody has a say
    in video self-attention. acting: the states that have not declined all of it. shadowing, awaiting, reached:
    the states that have put something over modules, that wait for attention calls, and whose calls have come.
    """

    model: torch.nn.Module
    layout: Layout
    sites: Sites
    clock: SigmaClock
    sigma: float
    evaluation: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    text: tuple[int, ...] | None
    options: Mapping[str, Any]
    error: BaseException | None = None
    outcomes: list[tuple[Any, str | None, int]] = field(default_factory=list)
    pairs: dict[Role, list[float]] = field(default_factory=dict)
    is_unwatched: bool = False
    shadowing: set[Any] = field(default_factory=set)
    awaiting: set[Any] = field(default_factory=set)
    reached: set[Any] = field(default_factory=set)
    acting: list[Any] = field(default_factory=list)
    _slots: dict[Any, Any] = field(default_factory=dict)
    _narrowed: list[VideoTokens] = field(default_factory=list)

    def __setitem__(self, state: Any, value: Any) -> None:
        self._slots[state] = value

    def __getitem__(self, state: Any) -> Any:
        return self._slots[state]

    def get(self, state: Any) -> Any:
        """What a State has put here, None if nothing."""
        return self._slots.get(state)

    def has_shadowed(self, state: Any) -> bool:
        """Whether a State has put something over modules in this forward."""
        return state in self.shadowing

    def count(self, state: Any, reason: str | None, times: int = 1) -> None:
        """What became of a technique: the reason why it declined, or None."""
        self.outcomes.append((state, reason, times))

    def count_pairs(self, role: Role, dense: float, computed: float) -> None:
        """Query-key pairs of one attention call of this role."""
        pairs = self.pairs.setdefault(role, [0.0, 0.0])
        pairs[0] += dense
        pairs[1] += computed

    def is_within(self, schedule: Schedule) -> bool:
        return self.clock.is_within(self.sigma, schedule)

    @property
    def step(self) -> int:
        """The step of the schedule, counted from 0; -1 without a schedule."""
        return self.clock.step_at(self.sigma) if self.clock.steps else -1

    @cached_property
    def _tokens(self) -> VideoTokens | Unclear:
        return self.layout.video_tokens()

    @property
    def tokens(self) -> VideoTokens | Unclear:
        """The video tokens, as far as they are computed where it is asked."""
        return self._narrowed[-1] if self._narrowed else self._tokens

    @property
    def is_foreign(self) -> bool:
        """Whether another pack has told the whole forward how to compute attention."""
        return OVERRIDE in self.options

    @cached_property
    def is_compiled(self) -> bool:
        """Whether torch.compile has made code of the model or of blocks in it."""
        return is_compiled(self.model, self.layout.blocks, self.options)

    @property
    def replaced_blocks(self) -> Mapping[Any, Any]:
        """What others have put in the place of transformer blocks, by place."""
        return replaced_blocks(self.options)

    @property
    def conds(self) -> Hashable:
        """What has to be the same where the results of one forward stand in for those of another: the conds, all shapes,
        and by what a guider tells one pass over the same conds from another. Functions tell nothing."""
        replaced = self.options.get("patches_replace", {})
        return (
            tuple(self.options.get("uuids", ())),
            self.shape,
            self.text,
            self.layout.shapes,
            self._tokens,
            self.dtype,
            # Guiders leave blocks or parts of them out in passes that are to come out worse.
            self.layout.pass_options,
            self.is_foreign,
            *sorted((kind, *sorted(map(str, at))) for kind, at in replaced.items() if at),
        )

    def on_frames(
        self, state: Any, frames: Iterable[int], block: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What `block(*args, **kwargs)` returns if it computes only these latent frames and what is no frame.

        The tokens of other frames come out as they went in. Where the layout cannot do it, the block computes all, and the
        reason is counted for `state`.
        """
        tokens = self.tokens
        if isinstance(tokens, Unclear):
            self.count(state, tokens.reason)
            return block(*args, **kwargs)
        within, rows = tokens.only(frames)
        cut = self.layout.cut(rows, tokens, args, kwargs)
        if isinstance(cut, Unclear):
            self.count(state, cut.reason)
            return block(*args, **kwargs)
        with self._narrow(within):
            out = block(*cut[0], **cut[1])
        return self.layout.put_back(out, rows, args, kwargs)

    @contextmanager
    def _narrow(self, tokens: VideoTokens) -> Iterator[None]:
        self._narrowed.append(tokens)
        try:
            yield
        finally:
            self._narrowed.pop()


def replaced_blocks(options: Mapping[str, Any]) -> Mapping[Any, Any]:
    """What others have put in the place of transformer blocks, by place."""
    replaced: Mapping[Any, Any] = options.get("patches_replace", {}).get("dit", {})
    return replaced


@dataclass
class AttentionCall:
    """One attention call: q [B, rows, C], k and v [B, N, C], mask [..., 1 or rows, N].

    rows: which of the queries' tokens `q` holds. segments: who sees whom. foreign: who computes it instead of
    ComfyUI, as a reason to decline; None if nobody.
    """

    call: Call
    site: Site
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    rows: range
    heads: int
    scale: float | None
    foreign: str | None
    segments: Segments

    @property
    def tokens(self) -> VideoTokens:
        """Of the video, which the queries are, or the keys."""
        tokens = self.call.tokens
        assert isinstance(tokens, VideoTokens)
        return tokens

    def count_pairs(self, computed: float) -> None:
        """Query-key pairs that somebody has computed instead of the executor."""
        self.call.count_pairs(self.site.role, 0.0, computed)
