"""A small RAFT for tests: torchvision's raft_small trained on layers of moving textures, in minutes on one GPU.

    python -m tiny_ltx.flow [--seconds 240] [--out tiny_ltx/weights/raft_small.safetensors]

It stands in for torchvision's weights where nothing can be downloaded. Pairs are 128 x 128: a textured background
and up to three textured shapes, each under its own shift, turn and zoom, so that the flow is known exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights" / "raft_small.safetensors"
SIZE = 128
LAYERS = 4
LARGEST_SHIFT = 24.0


def load_flow(path: Path = WEIGHTS) -> Any:
    """The trained net as OPTICAL_FLOW: a ModelPatcher around torchvision's raft_small."""
    import comfy.model_management as mm
    import comfy.model_patcher
    from safetensors.torch import load_file
    from torchvision.models.optical_flow import raft_small

    model = raft_small(weights=None, progress=False)
    model.load_state_dict({key: value.float() for key, value in load_file(str(path)).items()})
    return comfy.model_patcher.ModelPatcher(
        model.eval().requires_grad_(False),
        load_device=mm.get_torch_device(),
        offload_device=mm.unet_offload_device(),
    )


def draw_textures(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 3, 2 SIZE, 2 SIZE] in 0..1, from coarse and soft to fine and hard."""
    device = generator.device
    steepness = 0.4 + 1.2 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    out = torch.zeros(count, 3, 2 * SIZE, 2 * SIZE, device=device)
    for side in (8, 16, 32, 64, 128, 256):
        noise = torch.randn(count, 3, side, side, generator=generator, device=device)
        grey = torch.randn(count, 1, side, side, generator=generator, device=device)
        detail = F.interpolate(0.3 * noise + grey, 2 * SIZE, mode="bicubic", align_corners=False)
        out += detail * (8 / side) ** steepness
    out = out / out.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    contrast = 0.02 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    level = 0.1 + 0.8 * torch.rand(count, 3, 1, 1, generator=generator, device=device)
    return (level + contrast * out).clamp(0, 1)


def draw_masks(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 1, 2 SIZE, 2 SIZE]: an ellipse or a rectangle somewhere near the middle, antialiased."""
    device = generator.device
    u = torch.rand(6, count, 1, 1, generator=generator, device=device)
    place = torch.arange(2 * SIZE, device=device) - SIZE + 0.5
    x = (place.view(1, 1, -1) - (u[0] - 0.5) * SIZE) / (6 + 30 * u[1])
    y = (place.view(1, -1, 1) - (u[2] - 0.5) * SIZE) / (6 + 30 * u[3])
    round_, square = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    return ((1 - torch.where(u[4] < 0.5, round_, square)) * 20).clamp(0, 1)[:, None]


def draw_motions(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 2, 3] affine maps of pixel offsets from the middle; most are small."""
    device = generator.device
    u = torch.rand(4, count, generator=generator, device=device)
    shift = LARGEST_SHIFT * u[0] ** 3
    way = 2 * math.pi * u[1]
    turn, zoom = 0.25 * (2 * u[2] - 1) ** 3, torch.exp(0.2 * (2 * u[3] - 1) ** 3)
    c, s = zoom * torch.cos(turn), zoom * torch.sin(turn)
    rows = [
        torch.stack((c, -s, shift * torch.cos(way)), dim=1),
        torch.stack((s, c, shift * torch.sin(way)), dim=1),
    ]
    return torch.stack(rows, dim=1)


def seen_through(picture: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """The middle SIZE x SIZE of pictures [n, c, 2 SIZE, 2 SIZE] after `motion`: at q lies what was at its inverse."""
    linear = torch.linalg.inv(motion[:, :, :2])
    shift = -(linear @ motion[:, :, 2:])[..., 0] / SIZE
    grid = F.affine_grid(
        torch.cat((linear / 2, shift[..., None]), dim=2), (len(motion), 1, SIZE, SIZE), align_corners=False
    )
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def draw_pairs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a, b, flow): pictures [count, 3, SIZE, SIZE] in 0..1 and the flow from a to b [count, 2, SIZE, SIZE]."""
    device = generator.device
    still = torch.eye(2, 3, device=device).expand(count, 2, 3)
    place = torch.arange(SIZE, device=device) - SIZE / 2 + 0.5
    points = torch.stack(torch.meshgrid(place, place, indexing="xy")).flatten(1)
    a = b = flow = torch.zeros(count, 1, 1, 1, device=device)
    for layer in range(LAYERS):
        texture, motion = draw_textures(count, generator), draw_motions(count, generator)
        mask = draw_masks(count, generator) if layer else torch.ones_like(texture[:, :1])
        # Not every scene has all shapes.
        is_there = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.6
        mask = mask * (is_there if layer else 1)
        cover_a, cover_b = (seen_through(mask, m) for m in (still, motion))
        a = a + (seen_through(texture, still) - a) * cover_a
        b = b + (seen_through(texture, motion) - b) * cover_b
        moved = motion[:, :, :2] @ points + motion[:, :, 2:] - points
        flow = torch.where(cover_a > 0.5, moved.view(count, 2, SIZE, SIZE), flow)
    # As often soft as sharp: small pictures are shown enlarged.
    for factor in (2, 4):
        if float(torch.rand((), generator=generator, device=device)) < 0.3:
            a, b = (
                F.interpolate(F.avg_pool2d(p, factor), SIZE, mode="bicubic", align_corners=False)
                for p in (a, b)
            )
            break
    return a.clamp(0, 1), b.clamp(0, 1), flow


def train(
    seconds: float, batch: int, device: torch.device, seed: int, steps: int = 0
) -> tuple[Any, dict[str, Any]]:
    """RAFT as its authors train it: L1 over all refinements, later ones counting more."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = raft_small(weights=None, progress=False).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    begun, step, log = time.perf_counter(), 0, []
    while True:
        done = step / steps if steps else (time.perf_counter() - begun) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        with torch.no_grad():
            a, b, flow = draw_pairs(batch, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            guesses = model(2 * a - 1, 2 * b - 1, num_flow_updates=8)
        weights = [0.8 ** (len(guesses) - 1 - i) for i in range(len(guesses))]
        loss = sum(w * (guess.float() - flow).abs().mean() for w, guess in zip(weights, guesses, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0 or step == steps:
            error = (guesses[-1].float() - flow).square().sum(dim=1).sqrt().mean()
            log.append(
                {
                    "step": step,
                    "seconds": round(time.perf_counter() - begun, 1),
                    "error_px": round(error.item(), 3),
                }
            )
            print(log[-1], flush=True)
    return model.eval(), {
        "steps": step,
        "batch": batch,
        "seconds": round(time.perf_counter() - begun, 1),
        "log": log,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead of by time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, report = train(options.seconds, options.batch, device, options.seed, options.steps)
    from safetensors.torch import save_file

    state = {key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, str(options.out))
    options.out.chmod(0o644)
    with torch.no_grad():
        a, b, flow = draw_pairs(64, torch.Generator(device).manual_seed(options.seed + 1))
        error = (model(2 * a - 1, 2 * b - 1)[-1] - flow).square().sum(dim=1).sqrt()
    report |= {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none (CPU)",
        "torch": torch.__version__,
        "seed": options.seed,
        "error_px_on_new_pairs": {
            "mean": round(error.mean().item(), 3),
            "median": round(error.median().item(), 3),
        },
    }
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["error_px_on_new_pairs"]))


if __name__ == "__main__":
    main()
