"""What a model family has to tell about one forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..kernels.tokens import VideoTokens

NO_VIDEO = "NO_VIDEO"


class Role(Enum):
    """Who attends to whom in one attention call."""

    VIDEO_SELF = "video self-attention"
    VIDEO_TEXT = "video to text"
    AUDIO_SELF = "audio self-attention"
    AUDIO_TEXT = "audio to text"
    VIDEO_AUDIO = "video to audio"
    AUDIO_VIDEO = "audio to video"


@dataclass(frozen=True)
class Site:
    """The place of one attention module: its role and its transformer block, counted from 0 of `blocks`."""

    role: Role
    block: int
    blocks: int


@dataclass(frozen=True)
class Unclear:
    """Why a forward, or one attention call in it, cannot be read. `reason` is counted and logged."""

    reason: str


@dataclass(frozen=True)
class Stream:
    """The video tokens of a model before its layout can be read.

    blocks: of the model; numbers: in the tokens of one cond; is_alone: nothing else flows through the blocks.
    """

    blocks: int
    numbers: int
    is_alone: bool


class Layout(ABC):
    """One model family's reading of one forward. Subclasses live beside this file."""

    @abstractmethod
    def sites(self) -> Iterator[tuple[torch.nn.Module, Site]]:
        """Every attention module of the model with its place."""

    @property
    @abstractmethod
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer blocks, in order."""

    @abstractmethod
    def per_frame_work(self, block: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The sub-modules of a block that treat every video token alone, by name."""

    @property
    @abstractmethod
    def has_other_streams(self) -> bool:
        """Whether blocks compute something beside video (audio)."""

    @abstractmethod
    def video_of(self, stream: Any) -> torch.Tensor:
        """The video tokens [B, N, C] in what a block is given or returns."""

    @abstractmethod
    def beside_video(self, block: Callable[..., Any], stream: Any, *args: Any, **kwargs: Any) -> Any:
        """What `block(stream, *args, **kwargs)` returns if it computes everything but video."""

    @property
    @abstractmethod
    def shapes(self) -> Hashable:
        """Whatever of this forward's shapes the packed latent does not tell."""

    @property
    @abstractmethod
    def pass_options(self) -> Hashable:
        """What guiders tell this pass apart by: the options with which they switch parts of the model off."""

    @property
    @abstractmethod
    def window_frames(self) -> tuple[int, ...] | None:
        """The latent frames of the clip that this forward sees, if it is a context window."""

    @abstractmethod
    def video_tokens(self) -> VideoTokens | Unclear:
        """The order of the video tokens in this forward."""

    @abstractmethod
    def clip_frames(self) -> int | Unclear:
        """Latent frames of the whole clip, without guides, even if this forward sees a window of it."""

    @property
    @abstractmethod
    def has_lost_keyframes(self) -> bool:
        """Whether frames were cut out of the latent after generated keyframes were added behind the clip."""

    @abstractmethod
    def stretched(self, factor: float) -> Mapping[str, Any] | Unclear:
        """Named arguments of the call with which every video frame and guide lasts `factor` times as long."""

    @abstractmethod
    def seconds(self, clip_frames: int) -> float | Unclear:
        """How long so many latent frames last in this forward."""

    @abstractmethod
    def sound_seconds(self) -> float | None:
        """How long the sound beside the video lasts, None without any or where it is not that of the video's frames."""

    @property
    @abstractmethod
    def frame_rate(self) -> float | None:
        """Video frames a second as the conditioning says, None if it does not."""

    @property
    @abstractmethod
    def longest_seconds(self) -> float:
        """The longest clip, in seconds, whose positions the model was made for."""

    @abstractmethod
    def query_rows(
        self, q: torch.Tensor, mask: Any, module_mask: Any, tokens: VideoTokens
    ) -> range | Unclear:
        """Which video tokens the rows of `q` [B, n, H·D] are.

        `mask` is the one given to the attention call, `module_mask` the one given to the module around it.
        """

    @abstractmethod
    def is_self_attention(
        self, q: torch.Tensor, k: torch.Tensor, tokens: VideoTokens, given: Mapping[str, Any]
    ) -> bool | Unclear:
        """Whether a block, called with the named arguments `given`, itself lets the video attend to itself by this call.

        So it does where another pack has rewritten the block: no module tells the role of the call then.
        """

    @abstractmethod
    def block_mask(self, given: Mapping[str, Any]) -> Any:
        """The mask that a block, called with these named arguments, gives its video self-attention."""
