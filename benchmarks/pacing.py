"""What pacing does to a GPU: power, temperature and the share of time it computes, at max_duty 1, 0.7 and 0.4.

    python benchmarks/pacing.py [--out FILE] [--seconds 90] [--blocks 24]
    python benchmarks/pacing.py --table                               # table and picture of what was measured
    python benchmarks/pacing.py --device cpu --blocks 1 --frames 1 --size 256 128 --seconds 30    # for a look

LTX-2's width with random bf16 weights on eight multiprocessors of the GPU, which is the work of a laptop's card (on all of
them with `--multiprocessors 0`), Euler without CFG, sampled through ComfyUI for `--span` seconds a row. The duty is measured
apart from the pack: by CUDA events before every forward and block and behind each part of a block, on the device's own clock;
what passes from one block to the next counts as busy if it is shorter than 20 ms, which is less than any pause. Power,
temperature and utilisation come from nvidia-smi. One row has a sensor that is made up, of a GPU that gets hot and cools
down within seconds: it shows that pauses follow a temperature. The overhead is that of pacing that never pauses, and of every
technique of the pack mounted and none acting, step by step in turn with stock.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import PACK  # isort: split

import lab
import ltx2
import results
import torch
from overhead import OUTSIDE, pairs_of, settings_of, summed_up
from throttle import throttled

DUTIES = (1.0, 0.7, 0.4)
FAKED, IDLE, STOCK = "faked sensor, 75 °C to 70 °C", "nothing to do", "stock"
DUTY, OVERHEAD = "duty", "overhead"
# Seconds between two blocks that are no pause.
GAP = 0.02
QUERY = ("timestamp", "power.draw", "temperature.gpu", "utilization.gpu")


class Smi:
    """What nvidia-smi says every 100 ms, as (seconds, W, °C, %)."""

    def __init__(self, device: str) -> None:
        self.samples: list[list[float]] = []
        self._process: subprocess.Popen[str] | None = None
        if device == "cuda":
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            command = ["nvidia-smi", f"--id=GPU-{uuid}", "--loop-ms=100", "--format=csv,noheader,nounits"]
            command.append(f"--query-gpu={','.join(QUERY[1:])}")
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            except OSError as error:
                print(f"no nvidia-smi: {error}")
        if self._process is not None:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.samples.append([time.perf_counter(), *map(float, line.split(","))])
            except ValueError:
                print(f"nvidia-smi: {line.strip()}")

    def between(self, begin: float, end: float) -> list[list[float]]:
        return [[round(at - begin, 2), *values] for at, *values in list(self.samples) if begin <= at <= end]

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class Blocks:
    """Device times of the blocks of one run: before each, and behind the last of its parts; and before each forward."""

    def __init__(self, model: Any, device: str) -> None:
        self._device = device
        self._spans: list[list[Any]] = []
        network = model.model.diffusion_model
        self._hooks = [network.register_forward_pre_hook(self._enter)]
        for block in network.transformer_blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enter))
            self._hooks += [part.register_forward_hook(self._leave) for part in block.children()]
        self._begin = self._now()

    def _enter(self, *_: Any) -> None:
        now = self._now()
        if self._spans and self._spans[-1][1] is None:
            # From the forward to its first block.
            self._spans[-1][1] = now
        self._spans.append([now, None])

    def _leave(self, *_: Any) -> None:
        self._spans[-1][1] = self._now()

    def _now(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_idle(self) -> bool:
        """Whether the device has done all that these blocks gave it."""
        last = self._spans[-1][1] if self._spans else None
        if last is None or self._device == "cuda":
            return last is None or last.query()
        return time.perf_counter() - last > 0.2

    def share(self) -> float:
        """Of the time since this was made, the part in which the device computed."""
        end = self._now()
        if self._device == "cuda":
            torch.cuda.synchronize()
        for hook in self._hooks:
            hook.remove()
        times = [[self._since(mark) for mark in span] for span in self._spans]
        gaps = [after[0] - before[1] for before, after in zip(times, times[1:], strict=False)]
        busy = sum(stop - start for start, stop in times) + sum(gap for gap in gaps if gap < GAP)
        return busy / self._since(end)

    def _since(self, mark: Any) -> float:
        return self._begin.elapsed_time(mark) / 1000 if self._device == "cuda" else mark - self._begin


class Die:
    """A made-up sensor: 40 °C when idle, 100 °C in the end under load, half way there after some seconds."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._read, self._value = blocks, time.perf_counter(), 68.0
        self._begun = self._read
        self.trace: list[tuple[float, float]] = []

    def __call__(self) -> float:
        now = time.perf_counter()
        end = 40.0 if self._blocks.is_idle() else 100.0
        self._value += (end - self._value) * (1 - 2 ** ((self._read - now) / 4))
        self._read = now
        self.trace.append((round(now - self._begun, 2), round(self._value, 2)))
        return self._value


def paced(model: Any, read: Callable[[], float] | None = None, **settings: Any) -> Any:
    """The model paced, by a sensor that is made up where one is given."""
    pacing = importlib.import_module(f"{PACK}.patches.techniques.pacing")
    sensor = importlib.import_module(f"{PACK}.patches.sensors").Sensor

    @dataclass(frozen=True)
    class Sensed(pacing.GpuPacing):
        def begin(self, run: Any) -> Any:
            return pacing.Pacing(self, run, sensors=lambda device: iter([sensor("made up", read)]))

    kind = pacing.GpuPacing if read is None else Sensed
    return importlib.import_module(f"{PACK}.patches.mount").mount(model, kind(**settings))


def journal(model: Any) -> dict[str, Any]:
    """What the last run says of its device."""
    records = importlib.import_module(f"{PACK}.patches.mount").journal_of(model).records()
    (told,) = records[-1]["techniques"]["GPU pacing"]["devices"].values()
    return dict(told)


def measured(
    model: Any,
    options: argparse.Namespace,
    clip: ltx2.Clip,
    smi: Smi,
    duty: float,
    step: float,
    is_faked: bool,
) -> dict[str, Any]:
    """One run at this duty, or with the sensor that is made up."""
    blocks = Blocks(model, options.device)
    die = Die(blocks)
    settings = {} if is_faked else {"target_temperature": 0, "max_duty": duty}
    ours = paced(model, die if is_faked else None, **settings) if is_faked or duty < 1 else model
    begun = time.perf_counter()
    steps = max(2, round(options.span * (0.5 if is_faked else duty) / step))
    ltx2.sample(ours, clip, steps, options.device)
    share = blocks.share()
    ended = time.perf_counter()
    samples = smi.between(begun, ended)
    row = {
        "row": FAKED if is_faked else f"max_duty {duty:g}",
        "max_duty": duty,
        "duty": share,
        "steps": steps,
        "seconds": ended - begun,
        "samples": samples,
        **({} if ours is model else {"pacing": journal(ours)}),
        **({"sensor": die.trace} if is_faked else {}),
    }
    # At the beginning what came before still shows.
    late = [sample for sample in samples if sample[0] > 2]
    if late:
        names = ("power_w", "temperature_c", "utilisation")
        row |= {name: statistics.fmean(values) for name, values in zip(names, list(zip(*late, strict=True))[1:], strict=True)}  # fmt: skip
    return row


def measure(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    logging.disable(logging.INFO)
    device = options.device
    clip = ltx2.Clip(options.frames, *options.size)
    report: dict[str, Any] = {
        **lab.machine(device),
        "multiprocessors": options.multiprocessors if device == "cuda" else 0,
        "blocks": options.blocks,
        "clip": clip.name,
        "rows": [],
        "overhead": [],
    }
    sensors = importlib.import_module(f"{PACK}.patches.sensors").sensors_of(torch.device(device, 0))
    report["sensors"] = {sensor.name: sensor.read() for sensor in sensors}

    def save() -> None:
        results.save(report, options.out)

    smi = Smi(device)
    try:
        is_part = device == "cuda" and options.multiprocessors
        with torch.inference_mode(), throttled(options.multiprocessors if is_part else None):
            model = ltx2.build_ltx2(device, blocks=options.blocks)
            for _ in range(2):
                begun = time.perf_counter()
                ltx2.sample(model, clip, 1, device)
                if device == "cuda":
                    torch.cuda.synchronize()
                step = time.perf_counter() - begun
            report["step_s"] = step
            asked = [(duty, False) for duty in DUTIES] + [(1.0, True)]
            for duty, is_faked in asked if DUTY in options.parts else ():
                if time.monotonic() - begin + options.span > options.seconds:
                    print(f"no time left for max_duty {duty:g}, made-up sensor: {is_faked}")
                    continue
                report["rows"].append(measured(model, options, clip, smi, duty, step, is_faked))
                save()
            neutral = {setting.name: setting for setting in settings_of("", PACK, clip)}[OUTSIDE]
            mounted = {
                STOCK: lambda: model,
                IDLE: lambda: paced(model, lambda: 40.0),
                OUTSIDE: lambda: neutral.mounted(model),
            }
            for number, name in enumerate(mounted if OVERHEAD in options.parts else ()):
                # Pairs of neighbouring steps, and the one before them.
                left = (options.seconds - (time.monotonic() - begin)) / (len(mounted) - number)
                steps = 2 * int(left / step / 2) + 1
                if steps < 5:
                    print(f"no time left for {name}")
                    continue
                pairs = pairs_of(mounted[name](), clip, steps, device)
                report["overhead"].append({"row": name, "pairs": pairs, **summed_up(pairs)})
                save()
    finally:
        smi.close()
    return report


def table(report: dict[str, Any]) -> str:
    """Markdown: what was asked and measured; and the cost of pacing with nothing to do."""
    lines = []
    for row in report["rows"]:
        cells = [row["row"], f"{row['duty']:.1%}"]
        for name, unit in (("power_w", "W"), ("temperature_c", "°C"), ("utilisation", "%")):
            cells.append(f"{row[name]:.0f} {unit}" if name in row else "–")
        paused = sum(row.get("pacing", {}).get("paused", {}).values())
        cells.append(f"{paused:.1f} of {row['seconds']:.1f} s")
        lines.append(cells)
    head = ["", "measured duty", "power", "temperature", "utilisation by nvidia-smi", "paused"]
    out = [results.table(head, lines)]
    for row in report.get("overhead", []):
        out += [
            "",
            f"{row['row']}: step {row['ratio']:.2%} of stock ({row['low']:.2%} to {row['high']:.2%}), {len(row['pairs'])} pairs",
        ]
    return "\n".join(out) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Power, temperature and utilisation over time, a column a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    labels = ("power, W", "temperature, °C", "utilisation, %")
    figure, axes = plt.subplots(
        3, len(rows), figsize=(3.6 * len(rows), 7), sharex="col", sharey="row", squeeze=False
    )
    for column, row in enumerate(rows):
        for number, (axis, label) in enumerate(zip(axes[:, column], labels, strict=True), 1):
            if row["samples"]:
                axis.plot(
                    [each[0] for each in row["samples"]], [each[number] for each in row["samples"]], lw=1
                )
            if number == 2 and "sensor" in row:
                axis.plot(*zip(*row["sensor"], strict=True), lw=1.2, color="tab:red", label="made-up sensor")
                axis.axhline(75, lw=0.8, ls="--", color="gray")
                axis.axhline(70, lw=0.8, ls=":", color="gray")
                axis.legend(fontsize=7)
            if column == 0:
                axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{row['row']}\nbusy {row['duty']:.0%}", fontsize=10)
        axes[-1, column].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = results.asking(__doc__, "pacing", seconds=90, device="cuda", table=True)
    parser.add_argument("--parts", nargs="+", choices=(DUTY, OVERHEAD), default=[DUTY, OVERHEAD])
    parser.add_argument("--span", type=float, default=10, help="seconds a row")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--frames", type=int, default=97)
    parser.add_argument("--size", type=int, nargs=2, default=(896, 512), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--multiprocessors", type=int, default=8, help="0: all")
    options = parser.parse_args()
    report = results.read(options.out) if options.table else measure(options)
    results.write_tables(options.out, {"": table(report)})
    if options.table:
        draw(report, options.out.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()
