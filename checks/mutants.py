"""Whether the tests notice: the pack is broken in one place at a time, and named tests have to fail.

    nox -s mutants [-- NAME ...]

A mutant is one replacement in one file of the pack, made in a copy of this checkout. The first check is none:
`dead_seam.py` switches the whole pack off. Two run at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import comfyui_tree

ROOMS = ("nodes", "patches", "presets", "latents")
DEAD_SEAM = "dead call seam"


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in the whole pack, becomes `new`; then one of `tests` has to fail."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "window off by one frame",
        "max(0, min(frame - window, ",
        "max(0, min(frame - window + 1, ",
        ("tests/comfy/test_window.py::test_equals_a_masked_reference",),
    ),
    Mutant(
        "sinks that nobody sees",
        "anchors + min(sink_frames, ",
        "anchors + min(0, ",
        ("tests/comfy/test_window.py::test_image_to_video_mask",),
    ),
    Mutant(
        "guides counted as frames of the clip",
        "        frames -= guide_frames\n",
        "",
        ("tests/comfy/test_window.py::test_guides_see_all_and_are_seen_by_all",),
    ),
    Mutant(
        "attention of another pack left out",
        "below, foreign = partial(options[OVERRIDE], func), FOREIGN_OVERRIDE",
        "foreign = FOREIGN_OVERRIDE",
        ("tests/comfy/test_beside_others.py::test_attention_slot_overwritten",),
    ),
    Mutant(
        "freeze that reuses one step too long",
        "step - full < self.refresh_every",
        "step - full <= self.refresh_every",
        ("tests/comfy/test_freeze.py::test_equals_a_reference_that_stores_and_adds_again",),
    ),
    Mutant(
        "forecast with the wrong sign",
        "1 + ahead",
        "1 - ahead",
        ("tests/comfy/test_freeze.py::test_equals_a_reference_that_stores_and_adds_again",),
    ),
    Mutant(
        "last step not full",
        "if step == self.steps - 1:",
        "if step == self.steps:",
        ("tests/comfy/test_freeze.py::test_equals_a_reference_that_stores_and_adds_again",),
    ),
    Mutant(
        "passes of one evaluation share entries",
        "key.device, self._seen[key])",
        "key.device, 0)",
        (
            "tests/comfy/test_freeze_beside_others.py::test_passes_of_one_evaluation_at_two_sigmas_keep_their_own",
        ),
    ),
    Mutant(
        "stride that does not stretch",
        '{"frame_rate": rate / factor}',
        '{"frame_rate": rate}',
        ("tests/comfy/test_keyframe_stride.py::test_it_is_the_stock_graph_at_the_low_rate",),
    ),
    Mutant(
        "strided latents thinned by the whole stride",
        "stride // earlier.stride",
        "stride",
        ("tests/latents/test_stride.py::test_a_strided_latent_is_thinned_further",),
    ),
    Mutant(
        "attention of the checkpoint left out",
        "= own or func",
        "= func",
        ("tests/comfy/test_newer_comfyui.py::test_the_checkpoints_own_attention_is_the_backend",),
    ),
    Mutant(
        "memory of a block that is stored",
        "return nullcontext() if pause is None else pause()",
        "return nullcontext()",
        ("tests/comfy/test_newer_comfyui.py::test_nothing_that_is_kept_is_memory_of_a_block",),
    ),
    Mutant(
        "compiled blocks told by options",
        "partial(uncompiled, original)",
        "original",
        ("tests/comfy/test_compile.py::test_frozen_steps_are_told_to_compiled_blocks",),
    ),
    Mutant(
        "blocks frozen while their attention calls are counted",
        "is_exchanged = block in self.cache.exchanged_blocks",
        "is_exchanged = False",
        ("tests/comfy/test_guiders.py::test_the_same_calls_are_perturbed_with_and_without_freeze",),
    ),
    Mutant(
        "run wrapper inside of those before it",
        "{KEY: runs.pop(KEY), **runs}",
        "runs",
        ("tests/comfy/test_pieces.py::test_pieces_within_one_run_are_one_run_in_either_order",),
    ),
    Mutant(
        "short pieces at the full rate",
        "return 1 if frames > own.strided_frames else None",
        "return 1",
        ("tests/comfy/test_pieces.py::test_a_short_piece_of_unknown_rate_is_refused",),
    ),
    Mutant(
        "replaced forwards that stay",
        'vars(module).pop("forward", None)',
        "pass",
        ("tests/comfy/test_runs.py::test_interrupt_and_error_leave_nothing_behind",),
    ),
    Mutant(
        "segments that a stage before narrowed are dense again",
        "state.see(attention.segments, attention)",
        "state.see(Segments.dense(attention.segments.queries, attention.segments.total), attention)",
        (
            "tests/comfy/test_techniques.py::"
            "test_one_that_does_nothing_sees_the_segments_as_the_window_left_them",
        ),
    ),
    Mutant(
        "techniques nested the wrong way round",
        "for state in reversed(having)))",
        "for state in having))",
        ("tests/comfy/test_techniques.py::test_one_that_replaces_a_module_inside_those_of_freeze",),
    ),
    Mutant(
        "counts of a failed forward kept",
        "            _let_go(state, call, error)\n        raise\n",
        "            _let_go(state, call, error)\n        run.absorb(call)\n        raise\n",
        ("tests/comfy/test_techniques.py::test_one_that_asks_for_memory_and_frees_it",),
    ),
    Mutant(
        "window told of frames that are left out",
        "with self._narrow(within):",
        "with self._narrow(tokens):",
        ("tests/comfy/test_techniques.py::test_some_frames_beside_guides_under_the_window",),
    ),
    Mutant(
        "a full queue counted as idle",
        "            self.queue.drain()\n",
        "",
        ("tests/comfy/test_pacing.py::test_it_is_busy_for_its_share_however_far_ahead_the_host_is",),
    ),
    Mutant(
        "pauses that go on for as long as it is hot",
        "end = begun + min(seconds, self._left())",
        "end = begun + seconds",
        ("tests/comfy/test_pacing.py::test_no_step_pauses_longer_than_max_pause",),
    ),
    Mutant(
        "options overwritten by those of ComfyUI",
        "given.update(changes)",
        "pass",
        ("tests/comfy/test_techniques.py::test_options_that_change_behind_those_of_comfyui",),
    ),
    Mutant(
        "pooled keys that stand for one",
        "lse + math.log(call.piece.keys)",
        "lse + math.log(1)",
        ("tests/comfy/test_low_rank.py::test_equals_the_definition",),
    ),
    Mutant(
        "near frames on one side only",
        "grid.frames_of(group)[-1] < frame - near",
        "grid.frames_of(group)[-1] < frame",
        ("tests/comfy/test_low_rank.py::test_equals_the_definition",),
    ),
    Mutant(
        "packed tokens not put back",
        "return packing.unpack(rearrange(out.to(v.dtype)",
        "return packing.pack(rearrange(out.to(v.dtype)",
        (
            "tests/comfy/test_low_rank.py::test_routed_by_its_reference",
            "tests/kernels/test_routed.py::test_seeing_every_block_is_dense_attention",
        ),
    ),
    Mutant(
        "large values in float16 as they are",
        "large.clamp(min=1)",
        "large.clamp(min=1, max=1)",
        ("tests/comfy/test_precision.py::test_large_values_in_float16",),
    ),
    Mutant(
        "results that are not finite counted by nobody",
        "self._counter(q.device).add_(is_broken)",
        "self._counter(q.device)",
        ("tests/comfy/test_precision.py::test_results_that_are_not_finite_are_counted_and_warned_about",),
    ),
]


def copy_of(folder: Path) -> Path:
    """This checkout as it lies here, without what git ignores."""
    listed = ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)
    return folder


def mutate(mutant: Mutant, pack: Path) -> str | None:
    """Break `pack`; what is wrong if that is not possible."""
    files = [path for room in ROOMS for path in sorted((pack / room).rglob("*.py"))]
    places = [path for path in files for _ in range(path.read_text(encoding="utf-8").count(mutant.old))]
    if len(places) != 1:
        return f"no longer fits: expected {mutant.old!r} once in the pack, found it {len(places)} times. Update it."
    text = places[0].read_text(encoding="utf-8")
    places[0].write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return None


def pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "COMFYUI_PATH": str(comfyui_tree.find_comfyui(os.environ.get("FRAMETHRIFT_COMFYUI") or None)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder / "checks"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def complaint_about_dead_seam() -> str | None:
    """Interpolation samples nothing, and takes its time."""
    beside = "--ignore=tests/comfy/test_latent_flow_interpolate.py"
    done = pytest(REPO, "-p", "dead_seam", "tests/comfy", "tests/patches", beside)
    return None if done.returncode == 0 else f"not all tests notice:\n{done.stdout}{done.stderr}"


def complaint_about(mutant: Mutant) -> str | None:
    """Why the mutant is not caught as it should, or None."""
    with tempfile.TemporaryDirectory(prefix="frame-thrift-mutant-") as name:
        pack = copy_of(Path(name))
        problem = mutate(mutant, pack)
        if problem is not None:
            return problem
        done = pytest(pack, "-x", "--tb=line", *mutant.tests)
        if done.returncode == 1:
            return None
        return f"nobody notices, pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def main(names: list[str]) -> int:
    known: dict[str, Callable[[], str | None]] = {DEAD_SEAM: complaint_about_dead_seam}
    known |= {mutant.name: partial(complaint_about, mutant) for mutant in MUTANTS}
    unknown = set(names) - known.keys()
    if unknown:
        sys.exit(f"No mutant {', '.join(sorted(unknown))}; there are: {', '.join(known)}.")
    is_caught = True
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(known[name]) for name in names or known}
        for name, result in running.items():
            complaint = result.result()
            print(f"{name}: {'caught' if complaint is None else complaint}", flush=True)
            is_caught &= complaint is None
    return 0 if is_caught else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
