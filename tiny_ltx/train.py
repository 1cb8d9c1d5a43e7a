"""Trains the tiny model, judges it with an independent probe, writes weights, report and contact sheets.

python -m tiny_ltx.train                     # with ComfyUI on PYTHONPATH; a quarter of an hour on one GPU
python -m tiny_ltx.train --fps 20 30 --seed 1 --out tiny_ltx/pessimist --probe tiny_ltx/probe.safetensors
python -m tiny_ltx.train --student --out tiny_ltx/student --probe tiny_ltx/probe.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .captions import DIRECTIONS, SECOND_SHAPES, SHAPES, SPEEDS
from .clips import FPS_RANGE, LENGTHS
from .distill import Distiller
from .judge import draw_sheet, judge
from .model import HERE, STUDENT_RECIPE, TEACHER_RECIPE, TRANSFORMER_CONFIG, WEIGHTS
from .probe import load_probe, save_probe, train_probe
from .trainer import Trainer


def save_weights(model: Any, path: Path) -> None:
    """Writes float16 weights with the config that ComfyUI's model detection reads."""
    from safetensors.torch import save_file

    state = {key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, str(path), metadata={"config": json.dumps({"transformer": TRANSFORMER_CONFIG})})
    path.chmod(0o644)


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
    parser.add_argument(
        "--student",
        action="store_true",
        help="distil --teacher into the 8 steps of LTX-2's distilled sigmas",
    )
    parser.add_argument("--teacher", default=str(WEIGHTS), help="weights file that --student learns from")
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
    args = parser.parse_args()
    if args.student and args.resume is None:
        args.resume = args.teacher
    return args


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
    recipe = STUDENT_RECIPE if args.student else TEACHER_RECIPE
    # A resumed training reports the runs before it, too.
    earlier = []
    if (
        args.resume not in (None, args.teacher)
        and (before := Path(args.resume).parent / "report.json").is_file()
    ):
        report = json.loads(before.read_text())
        earlier = [*report.get("earlier_training", []), {**report["training"], "gpu": report["gpu"]}]

    trainer = (Distiller if args.student else Trainer)(args, device)
    torch.backends.cuda.matmul.allow_tf32 = True
    training = trainer.run()
    model = trainer.averaged()
    save_weights(model, args.out / "weights.safetensors")
    if args.probe:
        probe = load_probe(Path(args.probe), device)
    else:
        probe = train_probe(args.probe_steps, 128, device, args.seed + 1000)
        save_probe(probe, args.out / "probe.safetensors")
    sheets = [draw_sheet(model, latent_frames, device, args.seed, recipe) for latent_frames in (13, 25)]
    samples = sheets[0].resize((sheets[0].width, 2 * sheets[0].height))
    for i, sheet in enumerate(sheets):
        samples.paste(sheet, (0, i * sheet.height))
    samples.save(args.out / "samples.png", optimize=True)
    rows = judge(model, probe, args.judge_clips, device, args.seed, recipe)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gpu": torch.cuda.get_device_name() if is_cuda else "none (CPU)",
        "torch": torch.__version__,
        "seed": args.seed,
        "fps_range": list(args.fps),
        "lengths": list(LENGTHS),
        "words": {"shape": SHAPES, "second_shape": SECOND_SHAPES, "direction": DIRECTIONS, "speed": SPEEDS},
        "sampling": {"sampler": "euler", "sigmas": [round(s, 6) for s in recipe.sigmas], "cfg": recipe.cfg},
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
