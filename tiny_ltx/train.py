"""Trains one part of the tiny model, or judges what is there; goes on where it was stopped.

torchrun --nproc-per-node=4 -m tiny_ltx.train base --seconds 400
torchrun --nproc-per-node=4 -m tiny_ltx.train low_rates --seconds 120
torchrun --nproc-per-node=2 -m tiny_ltx.train student --seconds 240
torchrun --nproc-per-node=2 -m tiny_ltx.train refiner --seconds 240
python -m tiny_ltx.train probe
python -m tiny_ltx.train probe_full
python -m tiny_ltx.train judge               # reads all of them; figures and contact sheets go to --out

ComfyUI is looked for on PYTHONPATH. Without torchrun one process trains both sizes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import model as models
from .clips import FULL, SMALL
from .model import BASE, REFINER_SIGMAS, STUDENT_RECIPE, TEACHER_RECIPE, TRANSFORMER_CONFIG, Recipe
from .probe import FULL_PROBE, PROBE, load_probe, save_probe, train_probe
from .workers import Workers

# What each part is a difference from, and the sizes it is trained at.
PARTS: dict[str, tuple[str | None, tuple[int, ...]]] = {
    BASE: (None, (SMALL, FULL)),
    "low_rates": ("pessimist", (SMALL, FULL)),
    "student": ("teacher", (SMALL,)),
    "refiner": ("teacher", (FULL,)),
}
DISTILLED = ("student", "refiner")
PROBES = {"probe": (SMALL, PROBE), "probe_full": (FULL, FULL_PROBE)}


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes float16 weights with the config that ComfyUI's model detection reads."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().half().cpu().contiguous() for key, value in tensors.items()}
    save_file(state, str(path), metadata={"config": json.dumps({"transformer": TRANSFORMER_CONFIG})})
    path.chmod(0o644)


def train(part: str, args: argparse.Namespace, workers: Workers) -> None:
    from .distill import Distiller
    from .lora import lora_of
    from .trainer import Trainer

    origin, sizes = PARTS[part]
    torch.backends.cuda.matmul.allow_tf32 = False
    trainer = (Distiller if part in DISTILLED else Trainer)(part, origin, sizes, args, workers)
    torch.backends.cuda.matmul.allow_tf32 = True
    told = trainer.run()
    model = trainer.averaged()
    if workers.is_first:
        save_weights(model.state_dict() if origin is None else lora_of(model), models.file_of(part))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
        note = {"gpu": device, "torch": torch.__version__, "seed": args.seed, **told}
        (args.out / f"{part}.json").write_text(json.dumps(note, indent=1) + "\n")


def judge(args: argparse.Namespace, workers: Workers) -> None:
    from .judge import REFINING_FROM, below, draw_sheet
    from .judge import judge as judged
    from .trainer import build_model

    refiner = Recipe(REFINER_SIGMAS["ltx-2"], 1.0)
    asked = [
        ("pessimist", SMALL, TEACHER_RECIPE),
        ("teacher", SMALL, TEACHER_RECIPE),
        ("student", SMALL, STUDENT_RECIPE),
        ("pessimist", FULL, below(TEACHER_RECIPE, REFINING_FROM)),
        ("teacher", FULL, below(TEACHER_RECIPE, REFINING_FROM)),
        ("refiner", FULL, refiner),
    ]
    for name, size, recipe in asked[workers.rank :: workers.count]:
        model = build_model(workers.device, 0)
        model.load_state_dict(models.read_weights(name)[0])
        model.eval().requires_grad_(False)
        probe = load_probe(PROBE if size == SMALL else FULL_PROBE, workers.device)
        rows = judged(model, probe, args.judge_clips, workers.device, args.seed, recipe)
        told = {"model": name, "size": size, "steps": len(recipe.sigmas) - 1, "cfg": recipe.cfg, "rows": rows}
        (args.out / f"judged_{name}_{size}.json").write_text(json.dumps(told, indent=1) + "\n")
        for row, figures in rows.items():
            print(name, size, row, {k: v for k, v in figures.items() if k != "real"}, flush=True)
        draw_sheet(model, size, 17, workers.device, args.seed, recipe).save(args.out / f"{name}_{size}.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*PARTS, *PROBES, "judge"])
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for states, notes and contact sheets"
    )
    parser.add_argument("--seconds", type=float, default=400.0, help="training time; the schedule follows it")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead of by time")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between states to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--go-on", action="store_true", help="train the base anew from its present weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies all learning rates")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the clips in a step")
    parser.add_argument("--batch", type=int, default=64, help="clips of 97 frames in a step of a probe")
    parser.add_argument("--judge-clips", type=int, default=384)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
    args.out.mkdir(parents=True, exist_ok=True)
    workers = Workers()
    if args.what in PARTS:
        train(args.what, args, workers)
    elif args.what in PROBES:
        size, path = PROBES[args.what]
        save_probe(train_probe(size, args.steps or 2500, args.batch, workers.device, args.seed), path)
    else:
        judge(args, workers)
    workers.close()


if __name__ == "__main__":
    main()
