"""Trains the tiny model, judges it with an independent probe, writes weights, report and contact sheets.

python -m tiny_ltx.train                     # with ComfyUI on PYTHONPATH; a quarter of an hour on one GPU
python -m tiny_ltx.train --fps 20 30 --seed 1 --out variant
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .captions import CAPTION_TOKENS, DIRECTIONS, SECOND_SHAPES, SHAPES, SPEEDS, caption_text, embed_captions
from .clips import FPS_RANGE, LENGTHS, SIZE, draw_clips, draw_ids
from .codec import BLOCK, CHANNELS, Codec
from .model import HERE, SHIFT, TRANSFORMER_CONFIG, read_weights
from .probe import HEADS, Probe, frechet_distance, load_probe, read_clips, save_probe, train_probe
from .twin import Twin, check_twin

GRID = (SIZE // BLOCK, SIZE // BLOCK)
# Clips of each length in a step: about equal tokens for every length, a little more for the longer ones.
CLIPS_PER_STEP = {4: 14, 5: 11, 7: 9, 9: 8, 13: 8, 17: 5, 25: 5}
STEPS = 24
CFG = 2.0
EMPTY_SHARE = 0.1
IMAGE_SHARE = 0.1
EMA = 0.9995


def build_model(device: torch.device, seed: int) -> Any:
    """ComfyUI's LTXVModel with fresh float32 weights."""
    import comfy.ldm.lightricks.model
    import comfy.ops

    model = comfy.ldm.lightricks.model.LTXVModel(
        **TRANSFORMER_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("norm.weight"):
            state[key] = torch.ones_like(noise)
        elif key.endswith("bias") or key.startswith("adaln_single.linear") or key.startswith("proj_out"):
            state[key] = torch.zeros_like(noise)
        elif key.endswith("scale_shift_table"):
            state[key] = noise / math.sqrt(noise.shape[-1])
            if noise.shape[0] == 6:
                # Open gates: a block that starts shut learns its first steps slowly.
                state[key][2], state[key][5] = 1, 1
        elif ".to_out." in key or ".ff.net.2" in key:
            state[key] = noise * 0.02
        else:
            state[key] = noise / math.sqrt(noise.shape[-1])
    model.load_state_dict(state)
    return model.to(device).requires_grad_(True)


class Muon:
    """Momentum with orthogonalised updates for weight matrices, one batched iteration per matrix shape."""

    def __init__(
        self, matrices: list[torch.nn.Parameter], rate: torch.Tensor, momentum: float = 0.95
    ) -> None:
        self.rate, self.momentum = rate, momentum
        shapes = sorted({tuple(m.shape) for m in matrices})
        self.stacks = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.velocity = [torch.zeros(len(s), *s[0].shape, device=s[0].device) for s in self.stacks]

    @torch.no_grad()
    def step(self) -> None:
        for stack, velocity in zip(self.stacks, self.velocity, strict=True):
            grad = torch.stack([m.grad for m in stack])
            velocity.lerp_(grad, 1 - self.momentum)
            update = _orthogonal(grad.lerp(velocity, self.momentum))
            scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_sub_(stack, list((update * (self.rate * scale)).unbind()))


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrices [n, r, c], roughly, by five Newton-Schulz steps in bfloat16."""
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


class Trainer:
    """Rectified flow as ComfyUI samples LTXV: x = (1 - s) x0 + s noise, the model gives noise - x0 at time s."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.is_cuda = device.type == "cuda"
        self.model = build_model(device, args.seed)
        if args.resume is not None:
            state, _ = read_weights(Path(args.resume))
            self.model.load_state_dict({key: value.float() for key, value in state.items()})
        self.twin_error = check_twin(self.model, device)
        if not self.twin_error < 1e-3:
            raise RuntimeError(f"Twin and stock forward differ by {self.twin_error:.2e} of the output.")
        self.codec = Codec().to(device)
        self.groups = tuple((max(1, round(n * args.scale)), length) for length, n in CLIPS_PER_STEP.items())
        self.twin = Twin(
            self.model,
            self.groups,
            GRID,
            device,
            torch.bfloat16 if self.is_cuda else torch.float32,
            compile_blocks=self.is_cuda and not args.no_compile,
        )
        self.rate = torch.zeros((), device=device)
        self.adam_rate = torch.zeros((), device=device)
        parameters = dict(self.model.named_parameters())
        matrices = [
            p for key, p in parameters.items() if "transformer_blocks" in key and "to_" in key and p.ndim == 2
        ]
        matrices += [p for key, p in parameters.items() if ".ff.net" in key and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices, self.rate)
        self.adam = torch.optim.AdamW(
            [p for p in parameters.values() if id(p) not in chosen],
            lr=self.adam_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            capturable=self.is_cuda,
        )
        self.parameters = list(parameters.values())
        self.names = list(parameters)
        self.ema = [p.detach().clone() for p in self.parameters]
        frames = self.twin.frame_clip.shape[0]
        self.rows = torch.zeros(frames, GRID[0] * GRID[1], CHANNELS, device=device)
        self.ids = torch.zeros(self.twin.clips, CAPTION_TOKENS, dtype=torch.int64, device=device)
        self.fps = torch.full((self.twin.clips,), 24.0, device=device)
        self.is_first = torch.cat([torch.arange(n * length) % length == 0 for n, length in self.groups]).to(
            device
        )
        self.loss = torch.zeros((), device=device)
        self.generator = torch.Generator(device).manual_seed(args.seed)

    @torch.no_grad()
    def draw(self) -> None:
        """Draws the next step's clips into the fixed buffers."""
        ids = draw_ids(self.twin.clips, self.generator)
        latents, fps, start = [], [], 0
        for count, length in self.groups:
            clips = draw_clips(
                count, length, self.generator, tuple(self.args.fps), ids=ids[start : start + count]
            )
            start += count
            latents.append(self.codec.encode_pixels(clips.pixels[:, None]) * self.codec.signal)
            fps.append(clips.fps)
        self.rows.copy_(self.twin.pack(latents))
        self.ids.copy_(ids)
        self.fps.copy_(torch.cat(fps))

    def step(self) -> None:
        """One optimizer step on the buffers; nothing in it waits for the host, so it can be a CUDA graph."""
        device, clips = self.device, self.twin.clips
        spread = torch.sigmoid(0.8 + 1.1 * torch.randn(clips, device=device))
        sigma = torch.where(torch.rand(clips, device=device) < 0.1, torch.rand(clips, device=device), spread)
        # Some clips keep their first frame clean, as image-to-video gives it.
        is_clean = (torch.rand(clips, device=device) < IMAGE_SHARE)[self.twin.frame_clip] & self.is_first
        sigma = sigma[self.twin.frame_clip].masked_fill(is_clean, 0.0)
        empty = torch.rand(clips, device=device) < EMPTY_SHARE
        noise = torch.randn_like(self.rows)
        level = sigma[:, None, None]
        noisy = (1 - level) * self.rows + level * noise
        velocity = self.twin(noisy, sigma, embed_captions(self.ids, empty), self.fps)
        error = (velocity - (noise - self.rows)).square().mean(dim=(1, 2))
        loss = (error * ~is_clean).sum() / (~is_clean).sum()
        loss.backward()
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - EMA)
            self.loss.lerp_(loss, 0.01)

    def set_rate(self, done: float, steps: int) -> None:
        """Learning rates after a share `done` of the time: short warm-up, constant, linear to zero."""
        level = min(1.0, steps / 200) * min(1.0, max(0.0, (1 - done) / 0.6)) * self.args.rate
        self.rate.fill_(0.01 * level)
        self.adam_rate.fill_(1e-3 * level)

    def run(self) -> dict[str, Any]:
        """Trains for the given time (or steps); returns what to report."""
        args = self.args
        log: list[dict[str, float]] = []
        begun = time.perf_counter()
        graph = None
        steps = 0
        while True:
            elapsed = time.perf_counter() - begun
            done = steps / args.steps if args.steps else elapsed / args.seconds
            if steps % 10 == 0:
                self.set_rate(done, steps)
            if done >= 1:
                break
            self.draw()
            if graph is not None:
                graph.replay()
            elif self.is_cuda and steps == 5:
                torch.cuda.synchronize()
                print(f"compiled in {elapsed:.0f} s", flush=True)
                self._clear()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
                graph.replay()
            else:
                self._clear()
                stream = torch.cuda.Stream() if self.is_cuda else None
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.step()
                if stream is not None:
                    torch.cuda.current_stream().wait_stream(stream)
            steps += 1
            if steps % args.log_every == 0:
                # Early on the running mean still holds its zero start.
                loss = float(self.loss) / (1 - 0.99**steps)
                log.append(
                    {"step": steps, "seconds": round(time.perf_counter() - begun, 1), "loss": round(loss, 5)}
                )
                print(f"step {steps:6d} {log[-1]['seconds']:7.1f} s loss {loss:.4f}", flush=True)
                if not math.isfinite(loss):
                    raise RuntimeError(f"training diverged at step {steps}: loss {loss}")
        if self.is_cuda:
            torch.cuda.synchronize()
        loss = float(self.loss) / (1 - 0.99**steps)
        print(f"step {steps:6d} done, loss {loss:.4f}", flush=True)
        return {
            "loss": round(loss, 5),
            "steps": steps,
            "clips": steps * self.twin.clips,
            "seconds": round(time.perf_counter() - begun, 1),
            "twin_max_relative_difference": self.twin_error,
            "log": log[:: max(1, len(log) // 20)],
        }

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def averaged(self) -> Any:
        """The model with its averaged weights, for judging and saving."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.ema)
        self._clear()
        return self.model.eval().requires_grad_(False)


def save_weights(model: Any, path: Path) -> None:
    """Writes float16 weights with the config that ComfyUI's model detection reads."""
    from safetensors.torch import save_file

    state = {key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, str(path), metadata={"config": json.dumps({"transformer": TRANSFORMER_CONFIG})})
    path.chmod(0o644)


@torch.no_grad()
def sample_latents(
    model: Any, ids: torch.Tensor, latent_frames: int, fps: float, generator: torch.Generator, batch: int = 64
) -> torch.Tensor:
    """Latents [B, 128, T, 8, 8] of captions ids [B, 4]: Euler through the stock forward, shift 3, CFG 2."""
    device = generator.device
    line = torch.linspace(1, 0, STEPS + 1)
    sigmas = (SHIFT * line / (1 + (SHIFT - 1) * line)).tolist()
    out = []
    for part in ids.split(batch):
        n = part.shape[0]
        x = torch.randn(n, CHANNELS, latent_frames, *GRID, generator=generator, device=device)
        context = embed_captions(part.repeat(2, 1), torch.arange(2 * n, device=device) >= n)
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                both = model(
                    x.repeat(2, 1, 1, 1, 1), x.new_full((2 * n,), now), context, None, frame_rate=fps
                )
            given, empty = both.float().chunk(2)
            x = x + (after - now) * (empty + CFG * (given - empty))
        out.append(x)
    return torch.cat(out)


def _right(words: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    share = (words == ids).float().mean(dim=0).tolist()
    single = ids[:, 1] == 0
    right = {name: round(value, 4) for name, value in zip(HEADS, share, strict=True)}
    right["shape_of_single"] = round(float((words[single, 0] == ids[single, 0]).float().mean()), 4)
    return right


@torch.no_grad()
def judge(model: Any, probe: Probe, clips: int, device: torch.device, seed: int) -> dict[str, Any]:
    """The probe's reading of real and sampled clips, and their Frechet distance, by length and frame rate."""
    codec = Codec().to(device)
    generator = torch.Generator(device).manual_seed(seed + 77)
    rows: dict[str, Any] = {}
    for latent_frames, fps in ((13, 24.0), (25, 24.0), (13, 8.0)):
        rate = torch.full((clips,), fps, device=device)
        ids = draw_ids(clips, generator)
        # Real clips of the same captions, as the codec's signal channels show them: the best a sample could look.
        words_real, features_real = [], []
        for _ in range(5):
            drawn = draw_clips(clips, latent_frames, generator, ids=ids, fps=rate)
            latent = codec.encode_pixels(drawn.pixels[:, None]) * codec.signal
            words, features = read_clips(probe, codec.decode_pixels(latent)[:, 0], rate)
            words_real.append(words)
            features_real.append(features)
        latents = sample_latents(model, ids, latent_frames, fps, generator)
        words, features = read_clips(probe, codec.decode_pixels(latents)[:, 0], rate)
        on_real, on_samples = _right(torch.cat(words_real), ids.repeat(5, 1)), _right(words, ids)
        reference = torch.cat(features_real[:4])
        rows[f"{latent_frames} latent frames, {fps:g} fps"] = {
            "clips": clips,
            "real": on_real,
            "sampled": on_samples,
            "sampled_over_real": {k: round(on_samples[k] / max(on_real[k], 1e-6), 4) for k in on_real},
            "frechet": round(frechet_distance(features, reference), 3),
            "frechet_real_to_real": round(frechet_distance(features_real[4], reference), 3),
        }
    return rows


def draw_sheet(model: Any, latent_frames: int, device: torch.device, seed: int) -> Any:
    """A contact sheet: one captioned row per clip, twelve frames spread over it."""
    from PIL import Image, ImageDraw

    captions = [(s, 0, s % 3, (s + 1) % 3) for s in range(4)] + [(s, 0, (s + 2) % 3, s % 3) for s in range(4)]
    captions += [(1, 1, 0, 0), (2, 4, 1, 1)]
    ids = torch.tensor(captions, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    latents = sample_latents(model, ids, latent_frames, 24.0, generator)
    pixels = Codec().to(device).decode_pixels(latents)[:, 0].clamp(0, 1).cpu()
    shown = torch.linspace(0, pixels.shape[1] - 1, 12).round().long()
    cell, label = 64, 210
    sheet = Image.new("L", (label + 12 * (cell + 2), 20 + len(captions) * (cell + 2)), 255)
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 4), f"{latent_frames} latent frames at 24 fps; video frames {shown.tolist()}", fill=0)
    for r, (clip, caption) in enumerate(zip(pixels, captions, strict=True)):
        top = 20 + r * (cell + 2)
        pen.text((4, top + cell // 2 - 6), caption_text(caption), fill=0)
        for c, frame in enumerate(shown.tolist()):
            tile = Image.fromarray((clip[frame] * 255).round().byte().numpy()).resize(
                (cell, cell), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (label + c * (cell + 2), top))
    return sheet


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfy", help="folder of a ComfyUI tree, if it is not on PYTHONPATH")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for weights, probe, report and sheets")
    parser.add_argument("--seconds", type=float, default=840.0, help="training time; the schedule follows it")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead of by time")
    parser.add_argument(
        "--fps", type=float, nargs=2, default=FPS_RANGE, help="range of frame rates in training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies all learning rates")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the clips in a step")
    parser.add_argument("--resume", help="start from this weights file")
    parser.add_argument("--probe", help="use this probe instead of training one (keeps variants comparable)")
    parser.add_argument("--probe-steps", type=int, default=2500)
    parser.add_argument(
        "--judge-clips", type=int, default=512, help="sampled clips for each row of the report"
    )
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.comfy:
        sys.path.insert(0, args.comfy)
    is_cuda = torch.cuda.is_available()
    if not is_cuda:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
    device = torch.device("cuda" if is_cuda else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    begun = time.perf_counter()
    # A resumed training reports the runs before it, too.
    earlier = []
    if args.resume and (before := Path(args.resume).parent / "report.json").is_file():
        report = json.loads(before.read_text())
        earlier = [*report.get("earlier_training", []), {**report["training"], "gpu": report["gpu"]}]

    trainer = Trainer(args, device)
    torch.backends.cuda.matmul.allow_tf32 = True
    training = trainer.run()
    model = trainer.averaged()
    save_weights(model, args.out / "weights.safetensors")
    if args.probe:
        probe = load_probe(Path(args.probe), device)
    else:
        probe = train_probe(args.probe_steps, 128, device, args.seed + 1000)
        save_probe(probe, args.out / "probe.safetensors")
    sheets = [draw_sheet(model, latent_frames, device, args.seed) for latent_frames in (13, 25)]
    samples = sheets[0].resize((sheets[0].width, 2 * sheets[0].height))
    for i, sheet in enumerate(sheets):
        samples.paste(sheet, (0, i * sheet.height))
    samples.save(args.out / "samples.png", optimize=True)
    rows = judge(model, probe, args.judge_clips, device, args.seed)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gpu": torch.cuda.get_device_name() if is_cuda else "none (CPU)",
        "torch": torch.__version__,
        "seed": args.seed,
        "fps_range": list(args.fps),
        "lengths": list(LENGTHS),
        "words": {"shape": SHAPES, "second_shape": SECOND_SHAPES, "direction": DIRECTIONS, "speed": SPEEDS},
        "sampling": {"sampler": "euler", "steps": STEPS, "shift": SHIFT, "cfg": CFG},
        "training": training,
        "earlier_training": earlier,
        "judged": rows,
        "total_seconds": round(time.perf_counter() - begun, 1),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    brief = {**report, "training": {k: v for k, v in training.items() if k != "log"}}
    print(json.dumps(brief, indent=1), flush=True)


if __name__ == "__main__":
    main()
