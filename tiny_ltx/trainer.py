"""One training: fresh weights, optimizers, the training step, and the loop around it."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from .captions import CAPTION_TOKENS, embed_captions
from .clips import FPS_RANGE, FULL, HIGH_FPS_RANGE, SMALL, Scene, draw_scene, render
from .codec import BLOCK, CHANNELS, Codec, upscaled
from .lora import add_lora
from .model import TRANSFORMER_CONFIG, read_weights
from .twin import Twin, check_twin
from .workers import Workers

# Clips of each length in a step: about equal tokens for every length, a little more for the longer ones, and about equal
# work for both sizes.
CLIPS_PER_STEP = {
    SMALL: {3: 14, 4: 15, 5: 15, 7: 13, 9: 12, 13: 11, 17: 8, 25: 7},
    FULL: {3: 6, 5: 5, 9: 4, 13: 3, 17: 3},
}
# Large clips are only ever refined: they begin as noisy as this.
LARGEST_SIGMA = {SMALL: 1.0, FULL: 0.95}
EMPTY_SHARE = 0.1
IMAGE_SHARE = 0.1


def grid_of(size: int) -> tuple[int, int]:
    """Tokens of a latent frame, of clips with so many pixels to a side."""
    return size // BLOCK, size // BLOCK


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
    """Momentum with orthogonalised updates for weight matrices, one batched iteration per matrix shape.

    torch.optim.Muon takes its rate as a number, which a CUDA graph cannot follow, and every matrix by itself.
    """

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


class Clipset:
    """The clips of one size that a step sees: their model twin, and the buffers that every draw fills anew."""

    def __init__(self, size: int, model: Any, scale: float, device: torch.device, is_compiled: bool) -> None:
        self.size, self.device = size, device
        self.groups = tuple((max(1, round(n * scale)), length) for length, n in CLIPS_PER_STEP[size].items())
        self.twin = self.twin_of(model, is_compiled)
        self.codec = Codec().to(device)
        self.signals = {drawn_at: self.codec.signal(drawn_at) for drawn_at in (SMALL, FULL)}
        clips, frame_clip = self.twin.clips, self.twin.frame_clip
        rows, columns = grid_of(size)
        self.rows = torch.zeros(frame_clip.shape[0], rows * columns, CHANNELS, device=device)
        self.ids = torch.zeros(clips, CAPTION_TOKENS, dtype=torch.int64, device=device)
        self.fps = torch.full((clips,), 24.0, device=device)
        self.is_first = torch.cat([torch.arange(n * length) % length == 0 for n, length in self.groups]).to(
            device
        )

    def twin_of(self, model: Any, is_compiled: bool) -> Twin:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return Twin(model, self.groups, grid_of(self.size), self.device, dtype, is_compiled)

    def draw_scenes(self, generator: torch.Generator, fps_range: tuple[float, float]) -> list[Scene]:
        """New scenes, one of each group."""
        return [draw_scene(count, generator, fps_range) for count, _ in self.groups]

    def rows_of(self, scenes: list[Scene], drawn_at: int) -> torch.Tensor:
        """Rows of the codec's signal channels; clips drawn smaller are brought to this size."""
        latents = []
        for scene, (_, length) in zip(scenes, self.groups, strict=True):
            pixels = render(scene, length, drawn_at).pixels
            latent = self.codec.encode_pixels(pixels[:, None]) * self.signals[drawn_at]
            is_small = drawn_at != self.size
            latents.append(upscaled(self.codec, latent, self.size // drawn_at) if is_small else latent)
        return self.twin.pack(latents)

    def draw(self, generator: torch.Generator, fps_range: tuple[float, float]) -> None:
        """Draws the next step's clips."""
        scenes = self.draw_scenes(generator, fps_range)
        self.rows.copy_(self.rows_of(scenes, self.size))
        torch.cat([scene.ids for scene in scenes], out=self.ids)
        torch.cat([scene.fps for scene in scenes], out=self.fps)

    def lose(self) -> torch.Tensor:
        """Loss of the clips at random noise levels."""
        twin, device, clips = self.twin, self.device, self.twin.clips
        spread = torch.sigmoid(1.5 + 1.1 * torch.randn(clips, device=device))
        sigma = torch.where(torch.rand(clips, device=device) < 0.1, torch.rand(clips, device=device), spread)
        # Some clips keep their first frame clean, as image-to-video gives it.
        is_clean = (torch.rand(clips, device=device) < IMAGE_SHARE)[twin.frame_clip] & self.is_first
        sigma = (sigma * LARGEST_SIGMA[self.size])[twin.frame_clip].masked_fill(is_clean, 0.0)
        empty = torch.rand(clips, device=device) < EMPTY_SHARE
        noise = torch.randn_like(self.rows)
        level = sigma[:, None, None]
        noisy = (1 - level) * self.rows + level * noise
        velocity = twin(noisy, sigma, embed_captions(self.ids, empty), self.fps)
        error = (velocity - (noise - self.rows)).square().mean(dim=(1, 2))
        return (error * ~is_clean).sum() / (~is_clean).sum()


class Trainer:
    """Rectified flow as ComfyUI samples LTXV: x = (1 - s) x0 + s noise, the model gives noise - x0 at time s.

    `part` is what is trained: the base, or a low-rank difference from the model that `origin` names.
    """

    def __init__(
        self,
        part: str,
        origin: str | None,
        sizes: tuple[int, ...],
        args: argparse.Namespace,
        workers: Workers,
    ) -> None:
        self.part, self.args, self.workers = part, args, workers
        self.device = device = workers.device
        self.is_cuda = device.type == "cuda"
        self.model = build_model(device, args.seed)
        self.ema_decay = 0.9995 if origin is None else 0.998
        self.fps_range = HIGH_FPS_RANGE if origin is None else FPS_RANGE
        if origin is not None:
            self.model.load_state_dict(read_weights(origin)[0])
        elif args.go_on:
            self.model.load_state_dict(read_weights("pessimist")[0])
        self.twin_error = check_twin(self.model, device)
        if not self.twin_error < 1e-3:
            raise RuntimeError(f"Twin and stock forward differ by {self.twin_error:.2e} of the output.")
        matrices: list[torch.nn.Parameter] = []
        if origin is None:
            matrices = [
                p
                for key, p in self.model.named_parameters()
                if "transformer_blocks" in key and ("to_" in key or ".ff.net" in key) and p.ndim == 2
            ]
            self.parameters = list(self.model.parameters())
        else:
            self.parameters = add_lora(self.model, args.seed)
        self.is_compiled = self.is_cuda and not args.no_compile
        self.sets = [self.clipset(size) for size in self.share(sizes)]
        self.rate = torch.zeros((), device=device)
        self.adam_rate = torch.zeros((), device=device)
        chosen = {id(p) for p in matrices}
        # One vector, so that one message tells the other processes all of it.
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        for p, part_of in zip(
            self.parameters, self.gradient.split([p.numel() for p in self.parameters]), strict=True
        ):
            p.grad = part_of.view_as(p)
        self.muon = Muon(matrices, self.rate)
        self.adam = torch.optim.AdamW(
            [p for p in self.parameters if id(p) not in chosen],
            lr=self.adam_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            capturable=self.is_cuda,
        )
        self.ema = [p.detach().clone() for p in self.parameters]
        self.loss = torch.zeros((), device=device)
        self.generator = torch.Generator(device).manual_seed(args.seed + 1000 * workers.rank)
        torch.manual_seed(args.seed + 1000 * workers.rank)
        self.steps, self.seconds = 0, 0.0
        if args.resume:
            self.restore()

    def share(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes that this process trains: all of them, or one where there are processes enough."""
        return sizes if self.workers.count < len(sizes) else (sizes[self.workers.rank % len(sizes)],)

    def clipset(self, size: int) -> Clipset:
        return Clipset(size, self.model, self.args.scale, self.device, self.is_compiled)

    def draw(self) -> None:
        """New clips in the buffers; as capturable as `differentiate`."""
        with torch.no_grad():
            for clips in self.sets:
                clips.draw(self.generator, self.fps_range)

    def differentiate(self) -> None:
        """Gradient of the buffers' loss; nothing in it waits for the host, so it can be a CUDA graph."""
        self.gradient.zero_()
        loss = torch.stack([clips.lose() for clips in self.sets]).mean()
        loss.backward()
        with torch.no_grad():
            self.loss.lerp_(loss, 0.01)

    def update(self) -> None:
        """One step of the optimizers, as capturable as `differentiate`."""
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.ema_decay)

    def set_rate(self, done: float) -> None:
        """Learning rates after a share `done` of the time: short warm-up, constant, linear to zero."""
        level = min(1.0, self.steps / 200) * min(1.0, max(0.0, (1 - done) / 0.6)) * self.args.rate
        self.rate.fill_(0.01 * level)
        self.adam_rate.fill_(1e-3 * level)

    def run(self) -> dict[str, Any]:
        """Trains for the given time (or steps), earlier runs included; returns what to report."""
        args = self.args
        log: list[dict[str, float]] = []
        begun = time.perf_counter() - self.seconds
        saved = self.seconds
        first = self.steps
        graphs: tuple[Any, ...] = ()
        while True:
            if self.steps % 10 == 0 or self.steps == first:
                self.seconds = self.workers.told_by_first(time.perf_counter() - begun)
                done = self.steps / args.steps if args.steps else self.seconds / args.seconds
                self.set_rate(done)
                if done >= 1:
                    break
                if self.seconds - saved > args.save_every:
                    saved = self.seconds
                    self.save()
            if self.is_cuda and self.steps == first + 5:
                print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
                graphs = tuple(
                    captured(work, self.generator) for work in (self.draw, self.differentiate, self.update)
                )
                self.show_times(graphs)
            if graphs:
                graphs[0].replay()
                graphs[1].replay()
                self.workers.average(self.gradient)
                graphs[2].replay()
            else:
                self.step_eagerly()
            self.steps += 1
            if self.steps % args.log_every == 0:
                # Early on the running mean still holds its zero start.
                loss = float(self.loss) / (1 - 0.99 ** (self.steps - first))
                log.append(
                    {
                        "step": self.steps,
                        "seconds": round(time.perf_counter() - begun, 1),
                        "loss": round(loss, 5),
                    }
                )
                print(
                    f"{self.workers.rank}: step {self.steps:6d} {log[-1]['seconds']:7.1f} s loss {loss:.4f}",
                    flush=True,
                )
                if not math.isfinite(loss):
                    raise RuntimeError(f"training diverged at step {self.steps}: loss {loss}")
        if self.is_cuda:
            torch.cuda.synchronize()
        self.save()
        loss = float(self.loss) / (1 - 0.99 ** max(1, self.steps - first))
        print(f"{self.workers.rank}: step {self.steps:6d} done, loss {loss:.4f}", flush=True)
        return {
            "part": self.part,
            "processes": self.workers.count,
            "loss_of_first_process": round(loss, 5),
            "steps": self.steps,
            "clips_a_step_of_first_process": sum(clips.twin.clips for clips in self.sets),
            "seconds": round(self.seconds, 1),
            "twin_max_relative_difference": self.twin_error,
            "log": log[:: max(1, len(log) // 20)],
        }

    def show_times(self, graphs: tuple[Any, ...]) -> None:
        """Prints what drawing, differentiating and updating take, in milliseconds."""
        spent = [0.0, 0.0]
        for _ in range(5):
            # In turn, as in training: states that nobody draws anew would run past the end of their schedule.
            for i, graph in enumerate(graphs[:2]):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                graph.replay()
                torch.cuda.synchronize()
                spent[i] += (time.perf_counter() - begun) * 200
        print(
            f"{self.workers.rank}: drawing {spent[0]:.1f} ms, differentiating {spent[1]:.1f} ms", flush=True
        )

    def step_eagerly(self) -> None:
        stream = torch.cuda.Stream() if self.is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.draw()
            self.differentiate()
            self.workers.average(self.gradient)
            self.update()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)

    @property
    def state_file(self) -> Path:
        return Path(self.args.out) / f"{self.part}.state.pt"

    def save(self) -> None:
        """What an interrupted training goes on from."""
        if self.workers.is_first:
            state = {
                "parameters": [p.detach() for p in self.parameters],
                "ema": self.ema,
                "adam": self.adam.state_dict(),
                "muon": self.muon.velocity,
                "steps": self.steps,
                "seconds": self.seconds,
            }
            torch.save(state, self.state_file.with_suffix(".new"))
            self.state_file.with_suffix(".new").replace(self.state_file)

    def restore(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
            torch._foreach_copy_(self.ema, state["ema"])
            if state["muon"]:
                torch._foreach_copy_(self.muon.velocity, state["muon"])
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate
        self.steps, self.seconds = state["steps"], state["seconds"]

    def averaged(self) -> Any:
        """The model with its averaged weights, for judging and saving."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.ema)
        return self.model.eval().requires_grad_(False)


def captured(work: Any, generator: torch.Generator) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    # Other threads, such as those that pass messages between processes, may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph
