"""What a model family has to tell about one forward.

Blocks, attention sites and video tokens are all that a family needs to be served; what else it does not tell is
`UNCLEAR`, and a technique that needs it declines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.tokens import Ranges, VideoTokens
from .role import Role
from .work import Work

NO_OPTIONS = "NO_OPTIONS"
NO_VIDEO = "NO_VIDEO"
UNCLEAR_QUERY = "UNCLEAR_QUERY"


@dataclass(frozen=True)
class Site:
    """The place of one attention module: its role and its transformer block, counted from 0 of `blocks`."""

    role: Role
    block: int
    blocks: int


@dataclass(frozen=True)
class Unclear:
    """Why a forward, or something in it, cannot be read. `reason` is counted and logged."""

    reason: str


UNCLEAR = Unclear("UNCLEAR_LAYOUT")


@dataclass(frozen=True)
class Stream:
    """The video tokens of a model before its layout can be read.

    blocks: of the model; numbers: in the tokens of one cond; is_alone: nothing else flows through the blocks.
    """

    blocks: int
    numbers: int
    is_alone: bool


# What a family tells of together: half of it would break off in the middle of a run.
TOGETHER = {
    "has_other_streams": ("given_video", "returned_video", "obstacle_beside_video", "beside_video"),
    "cut": ("put_back",),
}


class Layout(ABC):
    """One model family's reading of one forward. Subclasses live beside this file.

    Raises TypeError, when it is defined, for a family that tells half of what stands in `TOGETHER`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for told, others in TOGETHER.items():
            lacking = [name for name in others if getattr(cls, name) is getattr(Layout, name)]
            if lacking and getattr(cls, told) is not getattr(Layout, told):
                raise TypeError(
                    f"{cls.__name__}: a layout that tells {told} tells {', '.join(lacking)}, too."
                )

    @property
    @abstractmethod
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer blocks, in order."""

    @abstractmethod
    def sites(self) -> Iterator[tuple[torch.nn.Module, Site]]:
        """Every attention module of the model with its place."""

    @abstractmethod
    def video_tokens(self) -> VideoTokens | Unclear:
        """The order of the video tokens in this forward."""

    # Attention calls.

    def query_rows(
        self, q: torch.Tensor, mask: Any, module_mask: Any, tokens: VideoTokens
    ) -> range | Unclear:
        """Which video tokens the rows of `q` [B, n, H·D] are.

        `mask` is the one given to the attention call, `module_mask` the one given to the module around it.
        """
        return range(tokens.total) if q.shape[1] == tokens.total else Unclear(UNCLEAR_QUERY)

    def is_self_attention(
        self, q: torch.Tensor, k: torch.Tensor, tokens: VideoTokens, given: Mapping[str, Any]
    ) -> bool | Unclear:
        """Whether a block, called with the named arguments `given`, itself lets the video attend to itself by this call.

        So it does where another pack has rewritten the block: no module tells the role of the call then.
        """
        return UNCLEAR

    def block_mask(self, given: Mapping[str, Any]) -> Any:
        """The mask that a block, called with these named arguments, gives its video self-attention."""
        return None

    # Blocks, and how they are called.

    def per_frame_work(self, block: torch.nn.Module) -> Mapping[str, torch.nn.Module] | Unclear:
        """The sub-modules of a block that treat every video token alone, by name."""
        return UNCLEAR

    @property
    def has_other_streams(self) -> bool | Unclear:
        """Whether blocks compute something beside video (audio). A family that tells it tells the next four, too."""
        return UNCLEAR

    def given_video(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The video tokens [B, N, C] in what a block is called with."""
        raise NotImplementedError

    def returned_video(self, out: Any) -> torch.Tensor:
        """The video tokens [B, N, C] in what a block returns."""
        raise NotImplementedError

    def obstacle_beside_video(self, kwargs: Mapping[str, Any]) -> Unclear | None:
        """Why a block that is called so cannot be told to leave video out, or None."""
        raise NotImplementedError

    def beside_video(
        self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `block(*args, **kwargs)` returns if it computes everything but video."""
        raise NotImplementedError

    def cut(
        self, rows: Ranges, tokens: VideoTokens, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | Unclear:
        """What a block is to be called with so that it sees the video tokens `rows` of `tokens` only: stream, positions,
        modulation and masks. A family that tells it tells `put_back`, too."""
        return UNCLEAR

    def put_back(self, out: Any, rows: Ranges, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the block returns for all tokens if it returned `out` for `rows`; the others are as they were given."""
        raise NotImplementedError

    # By what forwards are told apart.

    @property
    def shapes(self) -> Hashable:
        """Whatever of this forward's shapes neither the packed latent nor the tokens tell."""
        return ()

    @property
    def pass_options(self) -> Hashable:
        """What guiders tell this pass apart by: the options with which they switch parts of the model off."""
        return ()

    @property
    def is_perturbed(self) -> bool:
        """Whether a guider has told this pass anything of the kind."""
        return False

    @property
    def context_frames(self) -> tuple[int, ...] | None:
        """The latent frames of the clip that this forward sees, if it is one of ComfyUI's context windows."""
        return None

    # Time.

    def clip_frames(self) -> int | Unclear:
        """Latent frames of the whole clip, without guides, even if this forward sees a part of it."""
        return UNCLEAR

    @property
    def has_lost_keyframes(self) -> bool:
        """Whether frames were cut out of the latent after generated keyframes were added behind the clip."""
        return False

    def stretched(self, factor: float) -> Mapping[str, Any] | Unclear:
        """Named arguments of the call with which every video frame and guide lasts `factor` times as long."""
        return UNCLEAR

    def seconds(self, clip_frames: int) -> float | Unclear:
        """How long so many latent frames last in this forward."""
        return UNCLEAR

    def sound_seconds(self) -> float | None:
        """How long the sound beside the video lasts, None without any or where it is not that of the video's frames."""
        return None

    @property
    def frame_rate(self) -> float | None:
        """Video frames a second as the conditioning says, None if it does not."""
        return None

    @property
    def longest_seconds(self) -> float | Unclear:
        """The longest clip, in seconds, whose positions the model was made for."""
        return UNCLEAR

    # Work.

    @property
    def width(self) -> int | Unclear:
        """Numbers in one video token."""
        return UNCLEAR

    def work(self, text_tokens: int) -> Work | Unclear:
        """What this forward computes for one cond, given so many tokens of text."""
        return UNCLEAR

    def flops(self, work: Work) -> float | Unclear:
        """FLOPs of the blocks."""
        return UNCLEAR
