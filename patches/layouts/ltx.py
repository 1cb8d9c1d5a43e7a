"""LTX-Video (LTXVModel) and LTX-2 (LTXAVModel)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch

from ..kernels.tokens import VideoTokens
from .layout import NO_VIDEO, Layout, Role, Site, Stream, Unclear
from .work import VIDEO, Work

CLASS_NAMES = {"LTXVModel", "LTXAVModel"}

ROLES = {
    "attn1": Role.VIDEO_SELF,
    "attn2": Role.VIDEO_TEXT,
    "audio_attn1": Role.AUDIO_SELF,
    "audio_attn2": Role.AUDIO_TEXT,
    "audio_to_video_attn": Role.VIDEO_AUDIO,
    "video_to_audio_attn": Role.AUDIO_VIDEO,
}
AUDIO, TEXT = "audio", "text"
# The sub-modules of a block: whose tokens they compute, and whose tokens those look at.
PARTS = {
    "attn1": (VIDEO, VIDEO),
    "attn2": (VIDEO, TEXT),
    "ff": (VIDEO, VIDEO),
    "audio_attn1": (AUDIO, AUDIO),
    "audio_attn2": (AUDIO, TEXT),
    "audio_ff": (AUDIO, AUDIO),
    "audio_to_video_attn": (VIDEO, AUDIO),
    "video_to_audio_attn": (AUDIO, VIDEO),
}
OF_KEYS = ("to_k", "to_v")

# Options with which guiders (spatio-temporal guidance, multimodal guidance) switch parts of a pass off.
RUN_VIDEO = "run_vx"
PASS_OPTIONS = (
    RUN_VIDEO,
    "run_ax",
    "a2v_cross_attn",
    "v2a_cross_attn",
    "stg_indexes",
    "stg_self_attn_blocks",
    "ptb_index",
)
CHANNELS = 128

UNCLEAR_SHAPE = "UNCLEAR_SHAPE"
UNCLEAR_QUERY = "UNCLEAR_QUERY"
UNCLEAR_CALL = "UNCLEAR_CALL"
NO_FRAME_RATE = "NO_FRAME_RATE"


def read(
    model: Any, x: torch.Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
) -> LtxLayout | Unclear | None:
    """The layout of this forward if `model` is of the LTX family, else None."""
    if not is_ltx(model):
        return None
    if not options.get(RUN_VIDEO, True):
        return Unclear(NO_VIDEO)
    return LtxLayout(model, x, options, conds)


class LtxLayout(Layout):
    def __init__(self, model: Any, x: torch.Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]):
        self._model = model
        self._shape = _video_shape(x, conds.get("latent_shapes"))
        self._shapes = tuple(tuple(shape) for shape in conds.get("latent_shapes") or ())
        self._keyframe_idxs = conds.get("keyframe_idxs")
        self._denoise_mask = conds.get("denoise_mask")
        self._slots = conds.get("generated_keyframes")
        self._frame_rate = conds.get("frame_rate")
        self._window = options.get("context_window")
        self._pass_options = tuple(_hashable(options.get(name)) for name in PASS_OPTIONS)
        anchor = getattr(self._window, "causal_anchor_index", None)
        self._anchors = int(anchor is not None and anchor >= 0)

    def sites(self) -> Iterator[tuple[torch.nn.Module, Site]]:
        blocks = self.blocks
        for index, block in enumerate(blocks):
            for name, role in ROLES.items():
                module = getattr(block, name, None)
                if module is not None:
                    yield module, Site(role, index, len(blocks))

    @property
    def blocks(self) -> list[torch.nn.Module]:
        return list(self._model.transformer_blocks)

    def per_frame_work(self, block: torch.nn.Module) -> dict[str, torch.nn.Module]:
        return {name: getattr(block, name) for name in ("attn2", "ff")}

    @property
    def has_other_streams(self) -> bool:
        return _has_audio(self.blocks[0])

    def video_of(self, stream: Any) -> torch.Tensor:
        return stream[0] if self.has_other_streams else stream

    def beside_video(self, block: Callable[..., Any], stream: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.has_other_streams:
            return stream
        options = {**kwargs.pop("transformer_options"), RUN_VIDEO: False}
        return block(stream, *args, transformer_options=options, **kwargs)

    @property
    def shapes(self) -> Hashable:
        return self._shapes, self.video_tokens()

    @property
    def pass_options(self) -> Hashable:
        return self._pass_options

    @property
    def window_frames(self) -> tuple[int, ...] | None:
        frames = getattr(self._window, "index_list", None)
        return None if frames is None else tuple(frames)

    def video_tokens(self) -> VideoTokens | Unclear:
        if self._shape is None:
            return Unclear(UNCLEAR_SHAPE)
        frames, height, width = self._shape
        per_frame = height * width
        guides = 0 if self._keyframe_idxs is None else int(self._keyframe_idxs.shape[2])
        guide_frames, rest = divmod(guides, per_frame)
        if rest or guide_frames >= frames:
            return Unclear(UNCLEAR_SHAPE)
        frames -= guide_frames
        if not guides or self._denoise_mask is None:
            return VideoTokens.grid(frames, height, width, guides, self._anchors)
        # As the model does where guides are given: a token whose denoise mask is negative is dropped.
        kept = ~(self._denoise_mask[0] < 0).any(dim=0).flatten()
        if kept.numel() != (frames + guide_frames) * per_frame:
            return Unclear(UNCLEAR_SHAPE)
        per_frame_kept = kept.view(-1, per_frame).sum(dim=1).tolist()
        offsets = tuple(accumulate(per_frame_kept[:frames], initial=0))
        return VideoTokens(offsets, sum(per_frame_kept), self._anchors)

    def clip_frames(self) -> int | Unclear:
        total = getattr(self._window, "total_frames", None)
        if total is not None:
            return int(total)
        tokens = self.video_tokens()
        return tokens if isinstance(tokens, Unclear) else tokens.frames

    @property
    def has_lost_keyframes(self) -> bool:
        if not self._slots or self._shape is None or self._window is not None:
            return False
        return bool(self._slots["first_latent_frame"] + self._slots["num_keyframes"] > self._shape[0])

    def stretched(self, factor: float) -> Mapping[str, Any] | Unclear:
        # Video and guide positions are divided by the frame rate; audio positions are seconds by themselves.
        rate = self.frame_rate
        return Unclear(NO_FRAME_RATE) if rate is None else {"frame_rate": rate / factor}

    def seconds(self, clip_frames: int) -> float | Unclear:
        rate = self.frame_rate
        return Unclear(NO_FRAME_RATE) if rate is None else (8 * (clip_frames - 1) + 1) / rate

    def sound_seconds(self) -> float | None:
        patchifier = getattr(self._model, "a_patchifier", None)
        if self._window is not None or patchifier is None or len(self._shapes) < 2:
            return None
        a_second = patchifier.sample_rate / patchifier.hop_length / patchifier.audio_latent_downsample_factor
        return float(self._shapes[1][2] / a_second) or None

    @property
    def frame_rate(self) -> float | None:
        rate = self._frame_rate
        return float(rate) if isinstance(rate, (int, float)) and rate > 0 else None

    @property
    def longest_seconds(self) -> float:
        return float(self._model.positional_embedding_max_pos[0])

    def query_rows(
        self, q: torch.Tensor, mask: Any, module_mask: Any, tokens: VideoTokens
    ) -> range | Unclear:
        rows = q.shape[1]
        if rows == tokens.total:
            return range(rows)
        # Guide strengths other than 1: the module hands over query slices, each with its own part of the mask.
        start = getattr(module_mask, "guide_start", None)
        if start is not None:
            end = start + module_mask.tracked_count
            if mask is module_mask.noisy_mask and rows == start:
                return range(start)
            if mask is module_mask.tracked_mask and rows == end - start:
                return range(start, end)
            if mask is None and rows == tokens.total - end:
                return range(end, tokens.total)
        return Unclear(UNCLEAR_QUERY)

    def is_self_attention(
        self, q: torch.Tensor, k: torch.Tensor, tokens: VideoTokens, given: Mapping[str, Any]
    ) -> bool | Unclear:
        width = int(self._model.inner_dim)
        if q.ndim != 3 or q.shape[-1] != width or k.shape[-1] != width or k.shape[1] != tokens.total:
            return False
        text = given.get("v_context", given.get("context"))
        return Unclear(UNCLEAR_CALL) if text is None or text.shape[1] == tokens.total else True

    def block_mask(self, given: Mapping[str, Any]) -> Any:
        return given.get("self_attention_mask")


def is_ltx(model: Any) -> bool:
    return any(base.__name__ in CLASS_NAMES for base in type(model).__mro__)


def _hashable(value: Any) -> Hashable:
    """An option by its value: what cannot be compared by value, by its type."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted((_hashable(item) for item in value), key=repr))
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def stream_of(model: Any, noise_shape: tuple[int, ...]) -> Stream | None:
    """The stream that this noise makes: [B,128,T,h,w], or packed with audio [B,1,n]."""
    if not is_ltx(model):
        return None
    places = math.prod(noise_shape[2:]) // (CHANNELS if len(noise_shape) == 3 else 1)
    blocks = model.transformer_blocks
    return Stream(len(blocks), noise_shape[0] * places * int(model.inner_dim), not _has_audio(blocks[0]))


def flops(model: Any, work: Work) -> float | None:
    """FLOPs of the transformer blocks, as PyTorch's counter counts them; None if the model is unknown."""
    if not is_ltx(model):
        return None
    count = {VIDEO: work.tokens.total, AUDIO: work.audio_tokens, TEXT: work.text_tokens}
    total = 0
    for index, block in zip(range(work.blocks), model.transformer_blocks, strict=True):
        for name, (computed, seen) in PARTS.items():
            module = getattr(block, name, None)
            rows, keys = count[computed], count[seen]
            # Without audio the model skips whatever would compute it or look at it.
            if module is None or not rows or not keys or {(index, name), (index, computed)} & work.left_out:
                continue
            for path, linear in module.named_modules():
                if hasattr(linear, "in_features"):
                    through = keys if path.endswith(OF_KEYS) else rows
                    total += 2 * through * linear.in_features * linear.out_features
            if name in ROLES:
                segments = work.segments.get((ROLES[name], index))
                pairs = rows * keys if segments is None else segments.pairs(range(rows))
                total += 4 * pairs * module.to_q.out_features
    return total


def _has_audio(block: torch.nn.Module) -> bool:
    return hasattr(block, "audio_ff")


def _video_shape(x: torch.Tensor, latent_shapes: Any) -> tuple[int, int, int] | None:
    """(T, h, w) of the video latent; an audio-video latent travels packed, its shapes beside it."""
    shape = tuple(x.shape)
    if latent_shapes:
        items = [math.prod(s[1:]) for s in latent_shapes]
        if sum(items) != math.prod(shape[1:]):
            return None
        shape = tuple(latent_shapes[0])
    return (shape[2], shape[3], shape[4]) if len(shape) == 5 else None
