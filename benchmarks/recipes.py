"""Times whole recipes at LTX-2 size on one GPU: sampling, decoding and what lies between them.

    python benchmarks/recipes.py [--parts two single guided] [--clips 121 241] [--only NAME ...] [--ground GROUND]
                                 [--first-steps N] [--seconds 300] [--out FILE]
    python benchmarks/recipes.py --merge A.json B.json ... [--out FILE]
    python benchmarks/recipes.py --device cpu --small --parts two single --out DIR/recipes.json      # for a look

LTXAVModel with 48 blocks, a video VAE of LTX's layout and core's latent upsampler, all with random bf16 weights.
two: the standard run of two stages, with sound: eight distilled steps at half the size, the upsampler, three steps at
full size, decoding. single: eight steps at full size. guided: 24 steps of LTXVScheduler at full size under CFG, which
the others lack. Every recipe ends with frames at the full rate.

The ground is a card of laptop size: eight multiprocessors of this one, flash attention. `streamed`: the same, and only as
much memory as a card of 8 GB has. Parts are timed by the wall clock, the GPU drained before and after. After a warm-up
with a small clip every row runs once; a first stage runs once a process, and its time stands in all rows that share
it. With --first-steps N so many steps of the first sampler run, and their time is scaled (a star in the table).
Random weights decode to noise, whose motion nobody could follow: what comes behind a decode gets a film of the same size,
a moving texture, in place of it. Several processes may share the work; --merge makes one report of all.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from runtime import PACK  # isort: split

import comfy.ldm.lightricks.latent_upsampler as latent_upsampler
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import lab
import ltx2
import results
import torch
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
from comfy_extras.nodes_lt import LTXVConcatAVLatent, LTXVSeparateAVLatent
from comfy_extras.nodes_lt_upsampler import LTXVLatentUpsampler
from freeze import BLOCKS, SHORT, setting
from freeze import WHOLE as EVERY_OTHER
from low_rank import ROUTED, check_it_acts, routed_nodes
from recipes_report import BASE, GUIDED, SINGLE, STREAMED, THROTTLED, TWO, WHOLE, merged, write_tables
from rows import scheduled_for
from sampling import nearest_step, patch
from throttle import seen_by_streams, throttled

from tiny_ltx.model import STUDENT_RECIPE

MULTIPROCESSORS = 8
SIGMAS = STUDENT_RECIPE.sigmas
# The makers' second stage of LTX-2.
SECOND_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
# The first stage of coarse to fine stops before the step from 0.725.
SWITCH = 6
GUIDED_STEPS, GUIDED_CFG = 24, 3.0
SMALL_VAE = {
    "dims": 3,
    "latent_channels": 128,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "encoder_base_channels": 8,
    "decoder_base_channels": 8,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 2}],
        ["compress_time_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 2}],
        ["compress_all_res", {"multiplier": 2}],
    ],
    "decoder_blocks": [
        *(["compress_all", {"residual": True, "multiplier": 2}] for _ in range(3)),
        ["res_x", {"num_layers": 1}],
    ],
}
ROUTED_NODES = routed_nodes(ROUTED["routed by threshold 1"])
# Pixels that the film moves a frame at full size.
PAN = 4


@dataclass(frozen=True)
class TwoStage:
    """Strides of both stages against the full rate, and what becomes of the second."""

    name: str
    first: int = 1
    second: int = 1
    routed: bool = False
    refined: bool = True


TWO_STAGE = (
    TwoStage(BASE),
    TwoStage("no second stage", refined=False),
    TwoStage("routed", routed=True),
    TwoStage("stride 2", second=2),
    TwoStage("stride 3", second=3),
    TwoStage("stride 4", second=4),
    TwoStage("stride 8", second=8),
    TwoStage("routed, stride 2", second=2, routed=True),
    TwoStage("both stages at stride 2, blind", first=2, second=2),
    TwoStage("both stages at stride 3, blind", first=3, second=3),
    TwoStage("first stage at stride 2, then 4", first=2, second=4),
    TwoStage("first stage at stride 2, then 8", first=2, second=8),
)
ON_STREAMED = (BASE, "stride 4")
TWO_CLIPS = (ltx2.Clip(121, 1280, 704), ltx2.Clip(241, 1280, 704), ltx2.Clip(129, 1280, 704))
SINGLE_CLIPS = (ltx2.Clip(97, 896, 512), ltx2.Clip(121, 1280, 704))
SMALL_CLIP = ltx2.Clip(65, 128, 128)


def build_vae(config: dict[str, Any] | None = None) -> Any:
    """comfy.sd.VAE with random weights, of LTX's layout (0.9.5) or another one."""
    with torch.device(mm.get_torch_device()):
        inner = VideoVAE(version=2, config=config).to(torch.bfloat16)
    randomize(inner)
    inner.per_channel_statistics.get_buffer("std-of-means").fill_(1)
    inner.per_channel_statistics.get_buffer("mean-of-means").zero_()
    metadata = None if config is None else {"config": json.dumps({"vae": config})}
    return comfy.sd.VAE(sd=inner.state_dict(), metadata=metadata)


def build_upsampler(channels: int) -> Any:
    """Core's latent upsampler as its loader makes it, three-dimensional."""
    model = latent_upsampler.LatentUpsampler(comfy.ops.disable_weight_init, mid_channels=channels)
    model.to(mm.vae_dtype(allowed_dtypes=[torch.bfloat16, torch.float32]))
    randomize(model)
    mm.archive_model_dtypes(model)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.normal_(std=0.02)


def build_flow() -> Any:
    from torchvision.models.optical_flow import raft_large

    device = mm.get_torch_device()
    model = raft_large(weights=None, progress=False).eval().to(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


class Film:
    """A texture that moves sideways, `PAN` pixels a full-rate frame; smaller pictures are means of the large one."""

    def __init__(self, clip: ltx2.Clip) -> None:
        self.clip = clip
        size = clip.height, clip.width + PAN * clip.frames
        generator = torch.Generator().manual_seed(0)
        scales = [
            torch.nn.functional.interpolate(
                torch.rand(1, 3, size[0] // step, size[1] // step, generator=generator), size, mode="bilinear"
            )
            for step in (4, 8, 16, 32)
        ]
        texture = torch.stack(scales).mean(dim=0)
        self.textures = {
            scale: torch.nn.functional.avg_pool2d(texture, scale)[0].movedim(0, -1).contiguous()
            for scale in (1, 2)
        }

    def show(self, frames: torch.Tensor, stride: int) -> None:
        """Fills frames [1, F, H, W, 3], one of `stride` full-rate ones each; the clip's last one is repeated."""
        scale = self.clip.width // frames.shape[3]
        for k in range(frames.shape[1]):
            begins = PAN // scale * min(k * stride, self.clip.frames - 1)
            frames[0, k] = self.textures[scale][:, begins : begins + frames.shape[3]]


@dataclass
class Part:
    """A part of a recipe while it lasts: what the parts within it took, and the most memory it saw."""

    inner: float = 0.0
    peak: int = 0


@dataclass
class Spent:
    """Seconds and peak bytes of the parts of one run; a part does not count what others within it take."""

    is_cuda: bool
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    open: list[Part] = field(default_factory=list)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        self.note_peak()
        self.open.append(Part())
        begun = time.perf_counter()
        try:
            yield
        finally:
            # What fails counts as well: another attempt may follow.
            if self.is_cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - begun
            self.note_peak()
            part = self.open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + took - part.inner
            self.peaks[name] = max(self.peaks.get(name, 0), part.peak)
            if self.open:
                self.open[-1].inner += took

    def note_peak(self) -> None:
        """What the GPU held at most since the last call goes to the part that is open."""
        if not self.is_cuda:
            return
        torch.cuda.synchronize()
        if self.open:
            self.open[-1].peak = max(self.open[-1].peak, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


class Recipes:
    """Models and nodes, and the recipes made of them; `spent` tells what the last one took."""

    def __init__(self, device: str, blocks: int, is_small: bool) -> None:
        self.device = device
        self.model = ltx2.build_ltx2(device, blocks=blocks)
        self.vae = build_vae(SMALL_VAE if is_small else None)
        self.upsampler = build_upsampler(32 if is_small else 1024)
        self.vae.decode, self.vae.encode = self.around(self.vae.decode), self.around(self.vae.encode)
        nodes = importlib.import_module(f"{PACK}.nodes")
        self.stride, self.fill = nodes.KeyframeStride.execute, nodes.LatentFlowInterpolate.execute
        self.plan_of = importlib.import_module(f"{PACK}.patches.mount").plan_of
        self.spent = Spent(device == "cuda")
        self.first_steps: int | None = None
        self.first_stages: dict[tuple[ltx2.Clip, int], tuple[Any, Spent]] = {}
        self.is_finite = True
        # What a decode that comes now is called, and how many full-rate frames one of its frames stands for where some
        # node looks at them.
        self.decoding: tuple[str, int | None] = "decode", None
        self.film_of = functools.cache(Film)

    @functools.cached_property
    def flow(self) -> Any:
        return build_flow()

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the VAE, timed; what it decodes is the film's from there on."""
        is_decode = work.__name__ == "decode"

        def timed(*args: Any, **kwargs: Any) -> Any:
            name, stride = self.decoding if is_decode else ("encode", None)
            with self.spent.on(name):
                out = work(*args, **kwargs)
            if stride is not None:
                with self.spent.on("film"):
                    self.film_of(self.clip).show(out, stride)
            return out

        return timed

    def begin(self, clip: ltx2.Clip) -> None:
        self.clip, self.spent = clip, Spent(self.device == "cuda")
        self.decoding = "decode", None

    def sample(
        self,
        part: str,
        model: Any,
        latent: Any,
        sigmas: tuple[float, ...],
        most: int | None = None,
        cfg: float = 1.0,
    ) -> Any:
        """Samples [video, audio] of `latent`. most: so many steps run, and the time of them all is told from theirs."""
        steps = len(sigmas) - 1
        ran = min(most or steps, steps)
        before = self.spent.seconds.get(part, 0.0)
        with self.spent.on(part):
            samples = comfy.sample.sample_custom(
                model,
                comfy.sample.prepare_noise(latent["samples"], 0),
                cfg,
                comfy.samplers.sampler_object("euler"),
                torch.tensor(sigmas[: ran + 1]),
                ltx2.conditioning(self.device),
                ltx2.conditioning(self.device),
                latent["samples"],
                disable_pbar=True,
                seed=0,
            )
        if self.plan_of(model):
            check_it_acts(part, model)
        self.spent.seconds[part] = before + (self.spent.seconds[part] - before) * steps / ran
        self.is_finite = all(bool(part.isfinite().all()) for part in samples.unbind())
        return {**latent, "samples": samples}

    def restore(self, latent: Any, stride: int, method: str = "motion", **given: Any) -> Any:
        """What LatentFlowInterpolate makes of a strided latent: (latent, frames)."""
        self.decoding = "decode", stride
        with self.spent.on("in-betweening"):
            return self.fill(latent, method, vae=self.vae, **given).args

    # Two stages.

    def first_stage(self, clip: ltx2.Clip, stride: int) -> Any:
        """The audio-video latent of the first stage; from an earlier row where that made the same."""
        if (clip, stride) not in self.first_stages:
            half = ltx2.Clip(clip.frames, clip.width // 2, clip.height // 2)
            model, latent = self.model, {"samples": ltx2.empty(half, "cpu")}
            if stride > 1:
                model, latent = self.stride(model, latent, stride).args[:2]
            made = self.sample("stage 1", model, latent, SIGMAS, self.first_steps)
            self.first_stages[clip, stride] = made, self.spent
        latent, spent = self.first_stages[clip, stride]
        self.spent.seconds["stage 1"] = spent.seconds["stage 1"]
        self.spent.peaks["stage 1"] = spent.peaks["stage 1"]
        return latent

    def two_stage(self, clip: ltx2.Clip, recipe: TwoStage) -> Any:
        latent = self.first_stage(clip, recipe.first)
        model, reference = self.model, None
        if recipe.first > 1:
            model = self.stride(model, {"samples": ltx2.empty(clip, "cpu")}, recipe.first).args[0]
        if recipe.second > recipe.first:
            self.decoding = "decode small", recipe.first
            with self.spent.on("encode"):
                model, latent, _, reference = self.stride(
                    self.model, latent, recipe.second, vae=self.vae
                ).args
        with self.spent.on("upscale"):
            video, audio = LTXVSeparateAVLatent.execute(latent).args
            video = LTXVLatentUpsampler.execute(video, self.upsampler, self.vae).args[0]
            latent = LTXVConcatAVLatent.execute(video, audio).args[0]
        if recipe.refined:
            model = patch(PACK, model, ROUTED_NODES if recipe.routed else [])
            latent = self.sample("stage 2", model, latent, SECOND_SIGMAS)
            video = LTXVSeparateAVLatent.execute(latent).args[0]
        if recipe.second > 1:
            return self.restore(video, recipe.second, reference=reference, encode=False)[1]
        self.decoding = "decode", None
        return self.vae.decode(video["samples"])

    # One stage.

    def dense(self, clip: ltx2.Clip, nodes: Any = (), most: int | None = None) -> Any:
        model = patch(PACK, self.model, nodes)
        latent = self.sample("sampling", model, {"samples": ltx2.empty(clip, "cpu")}, SIGMAS, most)
        return self.vae.decode(latent["samples"].unbind()[0])

    def strided(self, clip: ltx2.Clip, stride: int, method: str) -> Any:
        model, latent = self.stride(self.model, {"samples": ltx2.empty(clip, "cpu")}, stride).args[:2]
        latent = self.sample("sampling", model, latent, SIGMAS, self.first_steps)
        flow = self.flow if method == "optical_flow" else None
        return self.restore(latent, stride, method, optical_flow=flow, encode=False)[1]

    def coarse_to_fine(self, clip: ltx2.Clip) -> Any:
        model, latent = self.stride(self.model, {"samples": ltx2.empty(clip, "cpu")}, 2).args[:2]
        latent = self.sample("sampling", model, latent, SIGMAS[: SWITCH + 1], self.first_steps)
        filled = self.restore(latent, 2)[0]
        self.decoding = "decode", None
        latent = self.sample("sampling", self.model, filled, SIGMAS[SWITCH:])
        return self.vae.decode(latent["samples"].unbind()[0])

    def guided(
        self,
        clip: ltx2.Clip,
        stride: int = 1,
        nodes: Any = (),
        steps: int = GUIDED_STEPS,
        again_from: float | None = None,
        most: int | None = None,
    ) -> Any:
        """Under CFG. again_from: the finished clip is noised up to there and refined at full length."""
        sigmas = scheduled_for(math.prod(clip.grid), steps)
        model, latent = self.model, {"samples": ltx2.empty(clip, "cpu")}
        if stride > 1:
            model, latent = self.stride(model, latent, stride).args[:2]
        latent = self.sample("sampling", patch(PACK, model, nodes), latent, sigmas, most, GUIDED_CFG)
        if again_from is None and stride > 1:
            return self.restore(latent, stride, encode=False)[1]
        if again_from is not None:
            filled, rest = self.restore(latent, stride)[0], sigmas[nearest_step(sigmas, again_from) :]
            latent = self.sample("sampling", self.model, filled, rest, cfg=GUIDED_CFG)
        self.decoding = "decode", None
        return self.vae.decode(latent["samples"].unbind()[0])


def frozen(when: dict[str, Any]) -> Any:
    return [("ScheduleSpatialFreeze", setting(BLOCKS, "linear", "gpu", when))]


# Rows whose steps differ run in full.
SINGLE_STAGE: dict[str, Callable[[Recipes, ltx2.Clip], Any]] = {
    BASE: lambda recipes, clip: recipes.dense(clip, most=recipes.first_steps),
    "stride 2, motion": lambda recipes, clip: recipes.strided(clip, 2, "motion"),
    "stride 4, motion": lambda recipes, clip: recipes.strided(clip, 4, "motion"),
    "whole blocks frozen every other step": lambda recipes, clip: recipes.dense(clip, frozen(EVERY_OTHER)),
    "the same from 0.2 on": lambda recipes, clip: recipes.dense(clip, frozen(SHORT)),
    "stride 2, full length from σ 0.725": Recipes.coarse_to_fine,
    "stride 2, RAFT large": lambda recipes, clip: recipes.strided(clip, 2, "optical_flow"),
}
MANY_STEPS: dict[str, Callable[[Recipes, ltx2.Clip], Any]] = {
    BASE: lambda recipes, clip: recipes.guided(clip, most=recipes.first_steps),
    "stride 2, frozen from 0.2 on": lambda recipes, clip: recipes.guided(clip, 2, frozen(SHORT)),
    "stride 3, frozen from 0.2 on": lambda recipes, clip: recipes.guided(clip, 3, frozen(SHORT)),
    "stride 3, 12 steps, refined from σ 0.8": lambda recipes, clip: recipes.guided(
        clip, 3, steps=12, again_from=0.8
    ),
}
IN_FULL = (*list(MANY_STEPS)[1:], "whole blocks frozen every other step", "the same from 0.2 on")


@dataclass(frozen=True)
class Job:
    part: str
    clip: ltx2.Clip
    name: str
    order: int
    run: Callable[[Recipes], Any]


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """What was asked for, clip by clip, so that first stages are shared."""

    def clips(known: tuple[ltx2.Clip, ...], usual: tuple[int, ...]) -> list[ltx2.Clip]:
        if options.small:
            return [SMALL_CLIP]
        return [clip for clip in known if clip.frames in (options.clips or usual)]

    out = []
    for clip in clips(TWO_CLIPS, (121, 241)) if "two" in options.parts else ():
        for order, recipe in enumerate(TWO_STAGE):
            if options.ground == STREAMED and recipe.name not in ON_STREAMED and not options.only:
                continue
            run = functools.partial(Recipes.two_stage, clip=clip, recipe=recipe)
            out.append(Job(TWO, clip, recipe.name, order, run))
    for clip in clips(SINGLE_CLIPS, (97,)) if "single" in options.parts else ():
        for order, (name, method) in enumerate(SINGLE_STAGE.items()):
            out.append(Job(SINGLE, clip, name, order, functools.partial(method, clip=clip)))
    for clip in clips(SINGLE_CLIPS, (97,)) if "guided" in options.parts else ():
        for order, (name, method) in enumerate(MANY_STEPS.items()):
            out.append(Job(GUIDED, clip, name, order, functools.partial(method, clip=clip)))
    return [job for job in out if not options.only or job.name in options.only]


@contextmanager
def standing(ground: str, recipes: Recipes) -> Iterator[dict[str, float] | None]:
    """Within, the model lies and the GPU is as the ground has it; yields what the throttle does to streams."""
    if recipes.device != "cuda":
        yield None
        return
    from gpu import standing_on
    from gpu_settings import Ground
    from torch.nn.attention import SDPBackend

    placing = Ground(ground, SDPBackend.FLASH_ATTENTION, (), is_streamed=ground == STREAMED)
    with standing_on(placing, recipes.model) as recipes.model:
        seen = None if ground == WHOLE else seen_by_streams(MULTIPROCESSORS)
        with throttled(None if ground == WHOLE else MULTIPROCESSORS):
            yield seen


def measure(job: Job, recipes: Recipes) -> dict[str, Any]:
    """A row: seconds and peaks of the recipe's parts."""
    recipes.begin(job.clip)
    frames = job.run(recipes)
    assert frames.shape[-4] == job.clip.frames, f"{job.name}: {tuple(frames.shape)}"
    parts = {name: seconds for name, seconds in recipes.spent.seconds.items() if name != "film"}
    peaks = {name: peak / 2**30 for name, peak in recipes.spent.peaks.items() if name != "film"}
    is_cuda = recipes.device == "cuda"
    return {
        "clip": job.clip.name,
        "recipe": job.name,
        "order": job.order,
        "seconds": sum(parts.values()),
        "parts": parts,
        "peak_gib": max(peaks.values()) if is_cuda else None,
        "peaks_gib": peaks if is_cuda else None,
        "steps_timed": recipes.first_steps if job.name not in IN_FULL else None,
        "pinned_gib": getattr(mm, "TOTAL_PINNED_MEMORY", 0) / 2**30,
        "is_finite": recipes.is_finite,
    }


def main() -> None:
    parser = results.asking(__doc__, "recipes", seconds=300, device="cuda", merge=True)
    parser.add_argument("--parts", nargs="+", default=["two"], choices=["two", "single", "guided"])
    parser.add_argument(
        "--clips", type=int, nargs="+", help="by their frames: 121 241 129, single stage 97 121"
    )
    parser.add_argument("--only", nargs="+", help="recipes by name")
    parser.add_argument("--ground", default=THROTTLED, choices=[THROTTLED, STREAMED, WHOLE])
    parser.add_argument(
        "--first-steps", type=int, help="so many steps of the first sampler run, timed for all"
    )
    parser.add_argument("--blocks", type=int, default=ltx2.BLOCKS)
    parser.add_argument("--small", action="store_true", help="tiny sizes and one block, to see that it runs")
    options = parser.parse_args()
    if options.merge:
        report = merged(list(map(results.read, options.merge)))
        results.save(report, options.out)
        print(write_tables(report, options.out))
        return
    begun = time.monotonic()
    process: dict[str, Any] = {"ground": options.ground, "first_steps": options.first_steps}
    process["comfy_kitchen"] = importlib.metadata.version("comfy-kitchen")
    report = {
        **lab.machine(options.device),
        "device": options.device,
        "sigmas": SIGMAS,
        "second_sigmas": SECOND_SIGMAS,
        "processes": [process],
        SINGLE: [],
        GUIDED: [],
        TWO: [],
        "left_out": [],
    }
    recipes = Recipes(options.device, 1 if options.small else options.blocks, options.small)
    recipes.first_steps = options.first_steps

    def attempt(job: Job) -> dict[str, Any] | None:
        """One recipe that fails, such as a routed one without its kernel, leaves the others their turn."""
        try:
            return {"ground": options.ground, **measure(job, recipes)}
        except Exception as error:
            report["left_out"].append(f"{name_of(job)}: {type(error).__name__}: {error}")
            print(report["left_out"][-1], flush=True)
            return None

    def name_of(job: Job) -> str:
        return ", ".join((options.ground, job.clip.name, job.name))

    with standing(options.ground, recipes) as process["streams_ms"], torch.inference_mode():
        print(f"milliseconds of a matrix product: {process['streams_ms']}", flush=True)
        warm_up = TwoStage("warm-up", first=2, second=4)
        attempt(Job(TWO, SMALL_CLIP, warm_up.name, 0, lambda own: own.two_stage(SMALL_CLIP, warm_up)))
        recipes.first_stages.clear()
        process["set_up_seconds"] = time.monotonic() - begun
        for job in jobs_of(options):
            if time.monotonic() - begun > options.seconds:
                report["left_out"].append(name_of(job))
                continue
            row = attempt(job)
            if row is not None:
                report[job.part].append(row)
                print(row, flush=True)
            results.save(report, options.out)
        report = merged([report])
        results.save(report, options.out)
        print(write_tables(report, options.out), flush=True)


if __name__ == "__main__":
    main()
