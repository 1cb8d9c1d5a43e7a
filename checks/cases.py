"""What `nox -s same` runs on either commit: each node alone, and all of them in every order, on tiny models.

    python checks/cases.py PACK RESULTS [TEXT]

PACK is the folder of a pack of any commit; it is used through its public nodes alone. RESULTS is written with
torch.save: by the name of each case that contains TEXT, what became of it.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests" / "support")]
import comfyui_tree

comfyui_tree.use_comfyui()
import comfy.nested_tensor
import folder_paths
import tiny_models
import torch
from tiny_models import CUT, FORMS, build_model, conditioning, context_windows, sample

FRAMES, GRID, STEPS, RATE = 9, (2, 3), 6, 24.0
AUDIO = FRAMES * GRID[0] * GRID[1]

Settings = tuple[str, dict[str, Any]]


class Absent(Exception):
    """This pack has no such node, input or option."""


class Nodes:
    """`nodes("KeyframeStride", model=..., stride=2)`: the outputs of one of the pack's nodes."""

    def __init__(self, pack: Path) -> None:
        name = comfyui_tree.load_pack(folder=pack).__name__
        self._nodes = {node.__name__: node for node in importlib.import_module(f"{name}.nodes").NODES}

    def __call__(self, name: str, **values: Any) -> Any:
        if name not in self._nodes:
            raise Absent(f"no node {name}")
        inputs = {each.id: each for each in self._nodes[name].define_schema().inputs}
        for key, value in values.items():
            if key not in inputs:
                raise Absent(f"{name} has no input {key}")
            options = getattr(inputs[key], "options", None)
            if options and value not in options:
                raise Absent(f"{name} has no {key} {value}")
        return self._nodes[name].execute(**values).args


@dataclass(frozen=True)
class Case:
    """run(nodes) gives outputs of any kind; `flat` makes values of them that can be compared."""

    name: str
    run: Callable[[Nodes], dict[str, Any]]


def window(**settings: Any) -> Settings:
    base = {"window": 1, "sink_frames": 1, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}
    return "ApplyTemporalWindow", base | settings


def freeze(scope: str = "whole blocks", **settings: Any) -> Settings:
    base = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 3, "scope": scope}
    return "ScheduleSpatialFreeze", base | settings


def coarse(**settings: Any) -> Settings:
    base = {"near_frames": 1, "pool": 2, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}
    return "ThriftLowRankAttention", base | settings


def precision(dtype: str = "fp16") -> Settings:
    return "ThriftAttentionPrecision", {"self_attention": dtype, "text_attention": dtype}


def stride(by: int) -> Settings:
    return "KeyframeStride", {"stride": by}


def pace() -> Settings:
    return "ThriftPaceGPU", {"target_temperature": 0, "max_duty": 0.9}


SCOPES = ("whole blocks", "per-frame work", "spatial attention")


def orders(*applied: Settings) -> Iterator[list[Settings]]:
    """Every order of every two or more of them."""
    for count in range(2, len(applied) + 1):
        yield from map(list, itertools.permutations(applied, count))


FEW: list[list[Settings]] = [
    [],
    [window()],
    *([freeze(scope)] for scope in SCOPES),
    [stride(2)],
    [precision()],
    [pace()],
    *orders(window(), freeze(), stride(2)),
    [coarse()],
    *orders(window(window=3), coarse()),
    *orders(freeze(), coarse()),
]
MORE: list[list[Settings]] = [
    [window(sink_frames=0)],
    [window(window=2, sink_frames=2)],
    [window(start_percent=0.3, end_percent=0.8)],
    [window(dense_blocks=1)],
    [window(window=4)],
    [precision("bf16")],
    *orders(window(), precision()),
    *(order for scope in SCOPES for order in orders(freeze(scope), precision())),
    *([freeze(scope, forecast="hold")] for scope in SCOPES),
    *([freeze(scope, cache_dtype="fp8_e4m3fn")] for scope in SCOPES),
    [freeze(refresh_every=2, start_percent=0.1, end_percent=0.9)],
    [freeze(refresh_every=16)],
    [freeze(blocks_kept=1)],
    [freeze(cache_device="cpu")],
    [freeze(cache_limit_gb=1e-4)],
    [stride(3)],
    *(list(order) for order in itertools.permutations((window(), freeze(), stride(2), pace()))),
    [window(), window(window=2)],
    [freeze(), freeze(refresh_every=1)],
    [stride(2), ("KeyframeStride", {"stride": 1})],
    *(
        order
        for scope in SCOPES[1:]
        for order in orders(window(), freeze(scope), stride(2))
        if freeze(scope) in order
    ),
]


def title(applied: list[Settings]) -> str:
    usual = dict((window(), freeze()))
    parts = []
    for name, settings in applied:
        told = {key: value for key, value in settings.items() if value != usual.get(name, {}).get(key)}
        parts.append(" ".join([name, *(f"{key}={value}" for key, value in told.items())]))
    return " → ".join(parts) or "stock"


@cache
def model_of(family: str, dtype: torch.dtype) -> Any:
    return build_model(family, dtype=dtype)


def has_audio(family: str) -> bool:
    return family != "ltxv"


def random_latent(family: str, frames: int, batch: int, seed: int = 2) -> Any:
    """Video of so many frames; sound, where there is any, is as long as the whole clip."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 128, frames, *GRID, generator=generator)
    if not has_audio(family):
        return video
    return comfy.nested_tensor.NestedTensor((video, torch.randn(batch, 8, AUDIO, 16, generator=generator)))


def with_audio(family: str, video: torch.Tensor, audio: torch.Tensor | None) -> Any:
    return comfy.nested_tensor.NestedTensor((video, audio)) if has_audio(family) else video


def video_of(samples: Any) -> torch.Tensor:
    return samples.unbind()[0] if samples.is_nested else samples


@dataclass(frozen=True)
class Given:
    """What a sampler is given beside the model.

    guide: strength of a guide frame behind the clip. dropped: so many of its tokens are masked away. negative_text: how
    many times as long as the positive one. is_split: conds are evaluated one by one, as where memory is short.
    """

    cfg: float = 2.0
    sampler: str = "euler"
    dtype: torch.dtype = torch.float32
    frames: int = FRAMES
    batch: int = 1
    guide: float | None = None
    dropped: int = 0
    negative_text: int = 1
    is_split: bool = False
    holds_image: bool = False
    holds_audio: bool = False
    in_windows: bool = False

    def suits(self, family: str) -> bool:
        return (not self.holds_audio or has_audio(family)) and (not self.in_windows or family in CUT)

    def sampled(self, model: Any, family: str, frames: int) -> dict[str, Any]:
        """The samples of a clip that has so many latent frames after all nodes."""
        values: dict[str, Any] = {"frame_rate": RATE}
        mask = torch.ones(1, 1, frames, *GRID)
        if self.holds_image:
            mask[:, :, 0] = 0.0
        if self.guide is not None:
            values |= guide_values(self.guide)
            held = torch.zeros(1, 1, 1, *GRID)
            held.flatten()[: self.dropped] = -1.0
            mask = torch.cat([mask, held], dim=2)
        audio_mask = torch.full((1, 1, AUDIO, 16), 0.0 if self.holds_audio else 1.0)
        positive, negative = (conditioning(family, seed=seed, **values) for seed in (1, 7))
        lengthen(negative, self.negative_text)
        out = sample(
            context_windows(model) if self.in_windows else model,
            family,
            random_latent(family, mask.shape[2], self.batch),
            STEPS,
            self.cfg,
            self.sampler,
            positive=positive,
            negative=negative,
            noise_mask=with_audio(family, mask, audio_mask),
        )
        return dict(zip(("video", "audio"), out, strict=False))


def guide_values(strength: float) -> dict[str, Any]:
    """Conditioning of a guide frame, as LTXVAddGuide makes it."""
    height, width = GRID
    y, x = torch.meshgrid(torch.arange(height) * 32.0, torch.arange(width) * 32.0, indexing="ij")
    starts = torch.stack([torch.full_like(y, 16.0), y, x]).flatten(1)
    coordinates = torch.stack([starts, starts + torch.tensor([[8.0], [32.0], [32.0]])], dim=-1)[None]
    entry = {
        "pre_filter_count": height * width,
        "strength": strength,
        "pixel_mask": None,
        "latent_shape": [1, height, width],
    }
    return {"keyframe_idxs": coordinates, "guide_attention_entries": [entry]}


def lengthen(cond: list[list[Any]], times: int) -> None:
    for entry in cond:
        entry[0] = entry[0].repeat(1, times, 1)
        if "attention_mask" in entry[1]:
            entry[1]["attention_mask"] = entry[1]["attention_mask"].repeat(1, times)


GIVEN = {
    "batched": Given(),
    "no guidance": Given(cfg=1.0),
    "texts of two lengths": Given(negative_text=2),
    "conds one by one": Given(is_split=True),
    "batch of 2": Given(batch=2),
    "guide": Given(guide=1.0),
    "guide at strength 0.4": Given(guide=0.4),
    "guide with dropped tokens": Given(guide=1.0, dropped=2),
    "image in place": Given(holds_image=True),
    "sound in place": Given(holds_audio=True),
    "context windows": Given(in_windows=True, frames=15),
    "heun": Given(sampler="heun"),
    "bfloat16": Given(dtype=torch.bfloat16),
}


def applied_to(nodes: Nodes, model: Any, family: str, frames: int, applied: list[Settings]) -> Any:
    """(model, latent) behind these nodes, for a full-length clip of so many latent frames."""
    video, audio = torch.zeros(1, 128, frames, *GRID), torch.zeros(1, 8, AUDIO, 16)
    latent = {"samples": with_audio(family, video, audio)}
    for name, settings in applied:
        if name == "KeyframeStride":
            model, latent, *_ = nodes(name, model=model, latent=latent, frame_rate=RATE, **settings)
        else:
            (model,) = nodes(name, model=model, **settings)
    return model, latent


@contextmanager
def short_of_memory(model: Any) -> Iterator[None]:
    """ComfyUI then evaluates one cond after the other."""
    model.model.memory_required = lambda *args, **kwargs: 1e30
    try:
        yield
    finally:
        del model.model.memory_required


def sampling(family: str, given: Given, applied: list[Settings]) -> Callable[[Nodes], dict[str, Any]]:
    def run(nodes: Nodes) -> dict[str, Any]:
        stock = model_of(family, given.dtype)
        model, latent = applied_to(nodes, stock, family, given.frames, applied)
        frames = video_of(latent["samples"]).shape[2]
        if not given.is_split:
            return given.sampled(model, family, frames)
        with short_of_memory(stock):
            return given.sampled(model, family, frames)

    return run


def at_full_length(family: str, applied: list[Settings]) -> Callable[[Nodes], dict[str, Any]]:
    """The strided MODEL on the clip that was not strided."""

    def run(nodes: Nodes) -> dict[str, Any]:
        model, _ = applied_to(nodes, model_of(family, torch.float32), family, FRAMES, applied)
        return Given().sampled(model, family, FRAMES)

    return run


def in_two_stages(family: str, applied: list[Settings]) -> Callable[[Nodes], dict[str, Any]]:
    """Strided, filled in on latents, and sampled on at full length by the same MODEL."""

    def run(nodes: Nodes) -> dict[str, Any]:
        model, latent = applied_to(nodes, model_of(family, torch.float32), family, FRAMES, applied)
        first = Given().sampled(model, family, video_of(latent["samples"]).shape[2])
        samples = with_audio(family, first["video"], first.get("audio"))
        filled, _ = nodes("LatentFlowInterpolate", latent={**latent, "samples": samples}, method="linear")
        out = sample(model, family, filled["samples"], sigmas=torch.linspace(0.7, 0, 5))
        return {"first": first, "filled": filled, **dict(zip(("video", "audio"), out, strict=False))}

    return run


def sampling_cases() -> Iterator[Case]:
    for family in FORMS:
        for name, given in GIVEN.items():
            if given.suits(family):
                for applied in [*FEW, *(MORE if name == "batched" else [])]:
                    yield Case(f"{family}, {name}: {title(applied)}", sampling(family, given, applied))
        for applied in [[stride(2)], [window(), freeze(), stride(2)]]:
            yield Case(f"{family}, full length: {title(applied)}", at_full_length(family, applied))
            yield Case(f"{family}, two stages: {title(applied)}", in_two_stages(family, applied))


def clip(frames: int = 33, size: int = 64) -> torch.Tensor:
    """[F, H, W, 3]: noise that pans and a square that moves against it, with a cut in the second half."""
    ground = torch.rand(size, 2 * size, generator=torch.Generator().manual_seed(4))
    out = []
    for frame in range(frames):
        picture = ground[:, frame : frame + size].clone()
        place = max(0, size - 20 - frame)
        picture[20:32, place : place + 12] = 1.0
        out.append(1 - picture if frame > 0.7 * frames else picture)
    return torch.stack(out)[..., None].repeat(1, 1, 1, 3)


@cache
def vae() -> Any:
    comfyui_tree.load_tiny()
    return importlib.import_module("tiny_ltx.vae").CodecVAE(zoom=1)


def thinned(nodes: Nodes, by: int = 2) -> dict[str, Any]:
    latent = {"samples": vae().encode(clip())}
    model = model_of("ltxv", torch.float32)
    return nodes("KeyframeStride", model=model, latent=latent, stride=by, vae=vae())[1]


def optical_flow(nodes: Nodes) -> Any:
    extensions = folder_paths.supported_pt_extensions
    folder_paths.folder_names_and_paths["optical_flow"] = ([str(REPO / "tiny_ltx")], extensions)
    return nodes("ThriftLoadOpticalFlow", model_name="raft_small.safetensors")[0]


def filled(method: str, has_vae: bool, by: int = 2, **settings: Any) -> Callable[[Nodes], dict[str, Any]]:
    def run(nodes: Nodes) -> dict[str, Any]:
        given = {"vae": vae()} if has_vae else {}
        if method == "optical_flow":
            given["optical_flow"] = optical_flow(nodes)
        latent = thinned(nodes, by)
        out = nodes("LatentFlowInterpolate", latent=latent, method=method, **given, **settings)
        return dict(zip(("latent", "images"), out, strict=True))

    return run


def without_note(nodes: Nodes) -> dict[str, Any]:
    latent = {"samples": thinned(nodes)["samples"]}
    out = nodes("LatentFlowInterpolate", latent=latent, method="motion", vae=vae(), stride=2, length=31)
    return dict(zip(("latent", "images"), out, strict=True))


def strided(family: str, by: int, frames: int, batch: int = 1) -> Callable[[Nodes], dict[str, Any]]:
    def run(nodes: Nodes) -> dict[str, Any]:
        video, audio = torch.zeros(batch, 128, frames, *GRID), torch.rand(batch, 8, AUDIO, 16)
        mask = torch.ones(1, 1, frames, 1, 1)
        mask[:, :, 0] = 0.25
        video[:, :, 0] = 0.5
        latent = {
            "samples": with_audio(family, video, audio),
            "noise_mask": with_audio(family, mask, torch.ones_like(audio)),
        }
        model = model_of(family, torch.float32)
        out = nodes("KeyframeStride", model=model, latent=latent, stride=by, frame_rate=RATE)
        return {"latent": out[1], "frame_rate": out[2]}

    return run


def thinned_guide(nodes: Nodes, by: int) -> dict[str, Any]:
    return {"image": nodes("ThriftThinGuide", image=clip(), stride=by)[0]}


def latent_cases() -> Iterator[Case]:
    for family in tiny_models.FAMILIES:
        for by, frames, batch in (
            (1, 9, 1),
            (2, 9, 1),
            (2, 10, 2),
            (3, 9, 1),
            (8, 9, 1),
            (9, 9, 1),
            (2, 1, 1),
        ):
            name = f"KeyframeStride stride={by} on {frames} latent frames of {family}, batch of {batch}"
            yield Case(name, strided(family, by, frames, batch))
    for by in (2, 4):
        yield Case(f"KeyframeStride stride={by} on a video", partial(thinned, by=by))
        for method in ("linear", "smooth", "motion", "optical_flow"):
            for has_vae in (True, False):
                place = "frames" if has_vae else "latents"
                name = f"LatentFlowInterpolate method={method} on {place}, stride {by}"
                yield Case(name, filled(method, has_vae, by))
    yield Case("LatentFlowInterpolate encode=False", filled("motion", True, encode=False))
    yield Case("LatentFlowInterpolate without a note", without_note)
    for by in (1, 2, 3, 8):
        yield Case(f"ThriftThinGuide stride={by}", partial(thinned_guide, by=by))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Tensors, numbers and texts by their place in an output."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, comfy.nested_tensor.NestedTensor):
        value = dict(zip(("video", "audio"), value.unbind(), strict=False))
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        parts = (flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
        return {key: inner for part in parts for key, inner in part.items()}
    if type(value).__name__ == "ExecutionBlocker":
        value = f"blocked: {value.message}"
    return {name: value if isinstance(value, (str, int, float, type(None))) else type(value).__name__}


class Said(logging.Handler):
    """The pack's lines in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("FrameThrift"):
            self.lines.append(f"{record.levelname} {text}")


def outcome(case: Case, nodes: Nodes, said: Said) -> dict[str, Any]:
    """What became of a case: its outputs, or the error, or what the pack lacks for it."""
    said.lines.clear()
    torch.manual_seed(0)
    result: dict[str, Any] = {"outputs": {}, "absent": None}
    try:
        result["outputs"] = flat(case.run(nodes))
    except Absent as lack:
        result["absent"] = str(lack)
    except Exception as error:
        result["outputs"] = {"error": f"{type(error).__name__}: {error}"}
    result["log"] = list(said.lines)
    return result


def main(pack: Path, results: Path, text: str = "") -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    said = Said()
    logging.getLogger().addHandler(said)
    logging.getLogger().setLevel(logging.INFO)
    nodes = Nodes(pack)
    cases = {case.name: case for case in (*sampling_cases(), *latent_cases())}
    torch.save({name: outcome(case, nodes, said) for name, case in cases.items() if text in name}, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), *sys.argv[3:])
