"""One training: fresh weights, optimizers, the training step, and the loop around it."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from .captions import CAPTION_TOKENS, embed_captions
from .clips import SIZE, draw_clips, draw_ids
from .codec import BLOCK, CHANNELS, Codec
from .model import TRANSFORMER_CONFIG, read_weights
from .twin import Twin, check_twin

GRID = (SIZE // BLOCK, SIZE // BLOCK)
# Clips of each length in a step: about equal tokens for every length, a little more for the longer ones.
CLIPS_PER_STEP = {4: 14, 5: 11, 7: 9, 9: 8, 13: 8, 17: 5, 25: 5}
EMPTY_SHARE = 0.1
IMAGE_SHARE = 0.1


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

    ema_decay = 0.9995

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

    def draw_real(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New clips of every group: rows of the codec's signal channels, ids [clips, 4], fps [clips]."""
        ids = draw_ids(self.twin.clips, self.generator)
        latents, fps, start = [], [], 0
        for count, length in self.groups:
            clips = draw_clips(
                count, length, self.generator, tuple(self.args.fps), ids=ids[start : start + count]
            )
            start += count
            latents.append(self.codec.encode_pixels(clips.pixels[:, None]) * self.codec.signal)
            fps.append(clips.fps)
        return self.twin.pack(latents), ids, torch.cat(fps)

    @torch.no_grad()
    def draw(self) -> None:
        """Draws the next step's clips into the fixed buffers."""
        for buffer, drawn in zip((self.rows, self.ids, self.fps), self.draw_real(), strict=True):
            buffer.copy_(drawn)

    def step(self) -> None:
        """One optimizer step on the buffers; nothing in it waits for the host, so it can be a CUDA graph."""
        loss = self.lose()
        loss.backward()
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.ema_decay)
            self.loss.lerp_(loss, 0.01)

    def lose(self) -> torch.Tensor:
        """Loss of the buffers at random noise levels."""
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
        return (error * ~is_clean).sum() / (~is_clean).sum()

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
