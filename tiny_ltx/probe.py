"""An independent judge of clips: reads the words of their captions; trained on real clips only.

It looks at triples of frames a quarter of a second apart, so that it sees speed per second at any frame rate. Each size of
clips has a probe of its own; only that of the large ones reads the texture.
No ComfyUI import.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .captions import DIRECTIONS, SECOND_SHAPES, SHAPES, SPEEDS, TEXTURES
from .clips import FPS_RANGE, FULL, LENGTHS, SMALL, draw_clips, video_frames

HERE = Path(__file__).resolve().parent / "weights"
PROBE, FULL_PROBE = HERE / "probe.safetensors", HERE / "probe_full.safetensors"
# In caption order; small clips have no texture to read.
HEADS = {
    "shape": len(SHAPES),
    "second_shape": len(SECOND_SHAPES),
    "direction": len(DIRECTIONS),
    "speed": len(SPEEDS),
    "texture": len(TEXTURES),
}
FEATURES = 128
_LOOKS = 8
_STEP_SECONDS = 0.25


def triples(pixels: torch.Tensor, fps: torch.Tensor) -> torch.Tensor:
    """[B, F, h, w] and fps [B] -> [B, 8, 3, h, w]: 8 looks spread over the clip, 3 frames 0.25 s apart each."""
    batch, frames = pixels.shape[:2]
    step = (fps * _STEP_SECONDS).round().clamp(min=1).long().clamp(max=(frames - 1) // 2)
    spread = torch.linspace(0, 1, _LOOKS, device=pixels.device)
    start = ((frames - 1 - 2 * step)[:, None] * spread).round().long()
    index = start[..., None] + step[:, None, None] * torch.arange(3, device=pixels.device)
    picked = pixels[torch.arange(batch, device=pixels.device)[:, None], index.flatten(1)]
    return picked.unflatten(1, (_LOOKS, 3))


class Probe(nn.Module):
    """Convolutional classifier of clips: [B, F, size, size] pixels in 0..1 and fps [B]."""

    def __init__(self, size: int = SMALL) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        last = 2 if size == FULL else 1
        for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 96, 2), (96, 128, 2), (128, 128, last)):
            layers += [
                nn.Conv2d(c_in, c_out, 5 if c_in == 3 else 3, stride, padding="same" if stride == 1 else 1)
            ]
            layers += [nn.GroupNorm(8, c_out), nn.GELU()]
        self.look = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(128 * 3, FEATURES), nn.GELU())
        read = [name for name in HEADS if name != "texture" or size == FULL]
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, HEADS[name]) for name in read})

    def features(self, pixels: torch.Tensor, fps: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, 128], for the heads and for Frechet distances."""
        looks = triples(pixels - 0.45, fps)
        seen = self.look(looks.flatten(0, 1))
        seen = torch.cat([seen.mean(dim=(2, 3)), seen.amax(dim=(2, 3))], dim=1).unflatten(0, (-1, _LOOKS))
        mean = seen.mean(dim=1)
        return self.mix(torch.cat([mean, seen[..., :128].std(dim=1)], dim=1))

    def forward(self, pixels: torch.Tensor, fps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [B, words] by caption slot."""
        features = self.features(pixels, fps)
        return {name: head(features) for name, head in self.heads.items()}


def train_probe(size: int, steps: int, batch: int, device: torch.device, seed: int) -> Probe:
    """Trains a probe on freshly drawn real clips of all lengths and frame rates."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    probe = Probe(size).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        length = LENGTHS[size][step % len(LENGTHS[size])]
        count = max(8, batch * 97 // max(97, video_frames(length)))
        clips = draw_clips(count, length, generator, FPS_RANGE, size=size)
        # A little noise and grey shift, so that the probe leans on shapes and not on exact tones.
        noise = torch.randn(clips.pixels.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = probe(clips.pixels + 0.02 * noise, clips.fps)
        losses = [
            nn.functional.cross_entropy(logits[name].float(), clips.ids[:, slot])
            for slot, name in enumerate(HEADS)
            if name in logits
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"probe of {size} pixels, step {step:5d} loss {loss.item():.3f}", flush=True)
    return probe.eval().requires_grad_(False)


def save_probe(probe: Probe, path: Path) -> None:
    """Writes the probe's weights in float16."""
    from safetensors.torch import save_file

    save_file({key: value.half().cpu().contiguous() for key, value in probe.state_dict().items()}, str(path))
    path.chmod(0o644)


def load_probe(path: Path = PROBE, device: torch.device | str = "cpu") -> Probe:
    """The trained probe in float32, ready to read clips."""
    from safetensors.torch import load_file

    state = {key: value.float() for key, value in load_file(str(path)).items()}
    probe = Probe(FULL if "heads.texture.weight" in state else SMALL)
    probe.load_state_dict(state)
    return probe.eval().requires_grad_(False).to(device)


@torch.no_grad()
def read_clips(
    probe: Probe, pixels: torch.Tensor, fps: torch.Tensor, batch: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the probe reads: word indices [B, 4 or 5] in caption order, and features [B, 128]."""
    words, features = [], []
    for part, part_fps in zip(pixels.split(batch), fps.split(batch), strict=True):
        seen = probe.features(part.clamp(0, 1), part_fps)
        features.append(seen)
        words.append(torch.stack([head(seen).argmax(dim=1) for head in probe.heads.values()], dim=1))
    return torch.cat(words), torch.cat(features)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two feature sets [N, C] and [M, C], each taken as a Gaussian."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))
