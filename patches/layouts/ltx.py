"""LTX-Video (LTXVModel) and LTX-2 (LTXAVModel)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from ..kernels.segments import take
from ..kernels.tokens import Ranges, VideoTokens
from .layout import NO_OPTIONS, NO_VIDEO, UNCLEAR, UNCLEAR_QUERY, Layout, Site, Stream, Unclear
from .role import Role
from .work import PER_FRAME, VIDEO, Work

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
# Those that treat every video token alone.
EACH_TOKEN = ("attn2", "ff")

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
# What blocks are given for each video token: modulation and positions; and who of them may see whom.
OF_VIDEO = (
    "timestep",
    "pe",
    "v_timestep",
    "v_pe",
    "v_cross_pe",
    "v_cross_scale_shift_timestep",
    "v_cross_gate_timestep",
)
MASK = "self_attention_mask"

UNCLEAR_SHAPE = "UNCLEAR_SHAPE"
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
        self._context = options.get("context_window")
        self._pass_options = tuple(_hashable(options.get(name)) for name in PASS_OPTIONS)
        anchor = getattr(self._context, "causal_anchor_index", None)
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
        return {name: getattr(block, name) for name in EACH_TOKEN}

    @property
    def has_other_streams(self) -> bool:
        return _has_audio(self.blocks[0])

    def given_video(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        return self.returned_video(args[0])

    def returned_video(self, out: Any) -> torch.Tensor:
        video: torch.Tensor = out[0] if self.has_other_streams else out
        return video

    def obstacle_beside_video(self, kwargs: Mapping[str, Any]) -> Unclear | None:
        is_told = not self.has_other_streams or "transformer_options" in kwargs
        return None if is_told else Unclear(NO_OPTIONS)

    def beside_video(
        self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if not self.has_other_streams:
            return args[0]
        options = {**kwargs["transformer_options"], RUN_VIDEO: False}
        return block(*args, **{**kwargs, "transformer_options": options})

    def cut(
        self, rows: Ranges, tokens: VideoTokens, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | Unclear:
        video = take(self.given_video(args, kwargs), rows)
        stream = (video, *args[0][1:]) if self.has_other_streams else video
        named = {name: _cut(kwargs[name], rows, tokens.total) for name in OF_VIDEO if name in kwargs}
        if MASK in kwargs:
            named[MASK] = _cut_mask(kwargs[MASK], rows)
        return (stream, *args[1:]), {**kwargs, **named}

    def put_back(self, out: Any, rows: Ranges, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # Blocks write into the stream that they are given, and so may we.
        whole, computed, at = self.given_video(args, kwargs), self.returned_video(out), 0
        for start, stop in rows:
            whole[:, start:stop] = computed[:, at : at + stop - start]
            at += stop - start
        return (whole, *out[1:]) if self.has_other_streams else whole

    @property
    def shapes(self) -> Hashable:
        return self._shapes

    @property
    def pass_options(self) -> Hashable:
        return self._pass_options

    @property
    def is_perturbed(self) -> bool:
        return any(option is not None for option in self._pass_options)

    @property
    def context_frames(self) -> tuple[int, ...] | None:
        frames = getattr(self._context, "index_list", None)
        return None if frames is None else tuple(frames)

    def video_tokens(self) -> VideoTokens | Unclear:
        return self._tokens

    @cached_property
    def _tokens(self) -> VideoTokens | Unclear:
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
        size = (height, width) if offsets[-1] == frames * per_frame else None
        return VideoTokens(offsets, sum(per_frame_kept), self._anchors, size)

    def clip_frames(self) -> int | Unclear:
        total = getattr(self._context, "total_frames", None)
        if total is not None:
            return int(total)
        tokens = self.video_tokens()
        return tokens if isinstance(tokens, Unclear) else tokens.frames

    @property
    def has_lost_keyframes(self) -> bool:
        if not self._slots or self._shape is None or self._context is not None:
            return False
        return bool(self._slots["first_latent_frame"] + self._slots["num_keyframes"] > self._shape[0])

    def stretched(self, factor: float) -> Mapping[str, Any] | Unclear:
        # Video and guide positions are divided by the frame rate; audio positions are seconds by themselves.
        rate = self.frame_rate
        return Unclear(NO_FRAME_RATE) if rate is None else {"frame_rate": rate / factor}

    def seconds(self, clip_frames: int) -> float | Unclear:
        rate, a_latent = self.frame_rate, int(self._model.vae_scale_factors[0])
        return Unclear(NO_FRAME_RATE) if rate is None else (a_latent * (clip_frames - 1) + 1) / rate

    def sound_seconds(self) -> float | None:
        patchifier = getattr(self._model, "a_patchifier", None)
        if self._context is not None or patchifier is None or len(self._shapes) < 2:
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
        return given.get(MASK)

    @property
    def width(self) -> int:
        return int(self._model.inner_dim)

    def work(self, text_tokens: int) -> Work | Unclear:
        tokens = self._tokens
        if isinstance(tokens, Unclear):
            return tokens
        sound = self._shapes[1][2] if len(self._shapes) > 1 else 0
        return Work(tokens, len(self.blocks), text_tokens, sound)

    def flops(self, work: Work) -> float | Unclear:
        total = flops(self._model, work)
        return UNCLEAR if total is None else total


def is_ltx(model: Any) -> bool:
    return any(base.__name__ in CLASS_NAMES for base in type(model).__mro__)


def _cut(value: Any, rows: Ranges, total: int) -> Any:
    """Of something that a block is given for all its video tokens, what is for `rows`; anything else as it is.

    Modulation [B, N, C] or by frames; positions [B, N, …] or [B, H, N, D], several in a tuple.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(part, rows, total) for part in value)
    if isinstance(value, torch.Tensor):
        dim = 2 if value.ndim == 4 and value.shape[2] == total else 1
        return take(value, rows, dim) if value.ndim > 1 and value.shape[dim] == total else value
    each = getattr(value, "patches_per_frame", 0)
    if not each or value.num_frames * each != total:
        return value
    cut = copy.copy(value)
    cut.data = take(value.data, tuple((start // each, stop // each) for start, stop in rows))
    cut.num_frames = cut.data.shape[1]
    return cut


def _cut_mask(mask: Any, rows: Ranges) -> Any:
    """A mask [B, H, 1 or N, N], or the two that guides of other strengths come with, which stand behind the frames."""
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor):
        cut = take(mask, rows, dim=-1)
        return cut if mask.shape[-2] == 1 else take(cut, rows, dim=-2)
    cut, start = copy.copy(mask), mask.guide_start
    cut.guide_start = sum(min(b, start) - a for a, b in rows if a < start)
    cut.noisy_mask, cut.tracked_mask = (
        take(part, rows, dim=-1) for part in (mask.noisy_mask, mask.tracked_mask)
    )
    return cut


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


def frames_a_latent(model: Any) -> int | None:
    """Video frames that a latent frame of this model holds; its first holds one."""
    return int(model.vae_scale_factors[0]) if is_ltx(model) else None


def flops(model: Any, work: Work) -> float | None:
    """FLOPs of the transformer blocks, as PyTorch's counter counts them; None if the model is unknown, or its parts are."""
    sizes = _sizes(model.transformer_blocks[0]) if is_ltx(model) else None
    if sizes is None:
        return None
    count = {VIDEO: work.tokens.total, AUDIO: work.audio_tokens, TEXT: work.text_tokens}
    total = 0
    for block in range(work.blocks):
        for name, (of_queries, of_keys, width) in sizes.items():
            rows, keys = (count[tokens] for tokens in PARTS[name])
            # Without audio the model skips whatever would compute it or look at it.
            if not rows or not keys or _is_left_out(work, block, name):
                continue
            total += 2 * (rows * of_queries + keys * of_keys)
            if name in ROLES:
                total += 4 * width * work.pairs_of(ROLES[name], block, rows, keys)
    return total


def _sizes(block: torch.nn.Module) -> dict[str, tuple[int, int, int]] | None:
    """Weights of a block's sub-modules that each query token goes through, each key token, and the width of attention.

    Blocks of these models are all alike. None where another pack has put something of its own into them.
    """
    sizes = {}
    for name in PARTS:
        module = getattr(block, name, None)
        if module is None:
            continue
        weights = {
            path: linear.in_features * linear.out_features
            for path, linear in module.named_modules()
            if hasattr(linear, "in_features")
        }
        of_keys = sum(size for path, size in weights.items() if path.endswith(OF_KEYS))
        width = getattr(getattr(module, "to_q", None), "out_features", 0)
        if bool(width) != (name in ROLES):
            return None
        sizes[name] = sum(weights.values()) - of_keys, of_keys, width
    return sizes


def _is_left_out(work: Work, block: int, name: str) -> bool:
    whole = (block, VIDEO) in work.left_out and PARTS[name][0] == VIDEO
    return whole or ((block, PER_FRAME) in work.left_out and name in EACH_TOKEN)


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
