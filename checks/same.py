"""Which outputs of two commits differ, be it by one bit.

    nox -s same -- OLD [NEW] [--only TEXT] [--log] [--all]

Runs `cases.py` of this checkout on the pack of either commit, at the same time, one thread each, on the ComfyUI that
COMFYUI_PATH or FRAMETHRIFT_COMFYUI names. NEW is the checkout as it lies here if it is left out. Ends with 1 if
anything differs. Bits depend on the processor, on torch and on the number of threads, so none are kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
SAME = "same"


@dataclass(frozen=True)
class Row:
    """One output of one case, and how it compares; is_comparable: both commits can run the case."""

    case: str
    output: str
    verdict: str
    is_comparable: bool = True

    @property
    def differs(self) -> bool:
        return self.is_comparable and self.verdict != SAME


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """Rows of all cases of two results that `cases.py` wrote."""
    return [row for name in old | new for row in _compare_case(name, old.get(name), new.get(name))]


def _compare_case(name: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Iterator[Row]:
    lacks = {
        side: "no such case" if case is None else case["absent"]
        for side, case in (("OLD", old), ("NEW", new))
        if case is None or case["absent"]
    }
    if lacks or old is None or new is None:
        verdict = "; ".join(f"not in {side}: {lack}" for side, lack in lacks.items())
        yield Row(name, "", verdict, is_comparable=False)
        return
    for output in old["outputs"] | new["outputs"]:
        if output in old["outputs"] and output in new["outputs"]:
            yield Row(name, output, difference(old["outputs"][output], new["outputs"][output]))
        else:
            yield Row(name, output, f"only in {'OLD' if output in old['outputs'] else 'NEW'}")


def difference(old: Any, new: Any) -> str:
    """SAME if two values agree in every bit, else how they differ."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return SAME if type(old) is type(new) and repr(old) == repr(new) else f"differs: {old!r}, {new!r}"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"differs: {old.dtype} {list(old.shape)}, {new.dtype} {list(new.shape)}"
    bits_differ = _bytes(old) != _bytes(new)
    if not bits_differ.any():
        return SAME
    largest = (old.double() - new.double()).abs().max().item()
    values = bits_differ.view(old.numel(), -1).any(dim=1).sum().item()
    return f"differs by up to {largest:.3g} in {values} of {old.numel()} values"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def compare_logs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The pack's log lines that only one side has, by case."""
    lines = []
    for name in old:
        if name not in new or old[name]["log"] == new[name]["log"]:
            continue
        lines.append(name)
        lines += [f"  - {line}" for line in old[name]["log"] if line not in new[name]["log"]]
        lines += [f"  + {line}" for line in new[name]["log"] if line not in old[name]["log"]]
    return lines


def table(rows: list[Row]) -> str:
    return "\n".join(
        [
            "| case | output | |",
            "|---|---|---|",
            *(f"| {row.case} | {row.output} | {row.verdict} |" for row in rows),
        ]
    )


@contextmanager
def checkout(commit: str | None, folder: Path) -> Iterator[Path]:
    """A worktree of `commit` in `folder`, or this checkout for None."""
    if commit is None:
        yield REPO
        return
    git = ["git", "-C", str(REPO), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(pack: Path, results: Path, text: str) -> subprocess.Popen[bytes]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, str(REPO / "checks" / "cases.py"), str(pack), str(results), text]
    with results.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=os.environ | one_thread, stdout=log, stderr=subprocess.STDOUT)


def results_of(process: subprocess.Popen[bytes], results: Path, commit: str | None) -> dict[str, Any]:
    if process.wait() != 0:
        tail = results.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        sys.exit(
            "\n".join([*tail, f"The cases of {commit or 'this checkout'} ended with {process.returncode}."])
        )
    return torch.load(results)


def run(old: str, new: str | None, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of both commits."""
    with tempfile.TemporaryDirectory(prefix="frame-thrift-same-") as name:
        folder = Path(name)
        with checkout(old, folder / "old") as old_pack, checkout(new, folder / "new") as new_pack:
            results = folder / "old.pt", folder / "new.pt"
            processes = [
                start(pack, file, text) for pack, file in zip((old_pack, new_pack), results, strict=True)
            ]
            try:
                one, other = map(results_of, processes, results, (old, new))
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        return one, other


def main() -> int:
    description, *_ = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="nox -s same --", description=description)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit; the checkout as it lies here if left out")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--log", action="store_true", help="compare the pack's log lines, too")
    parser.add_argument("--all", action="store_true", help="list what is the same, too")
    given = parser.parse_args()
    old, new = run(given.old, given.new, given.only)
    rows = compare(old, new)
    listed = [row for row in rows if given.all or row.verdict != SAME]
    if listed:
        print(table(listed))
    said = compare_logs(old, new) if given.log else []
    if said:
        print("\nLog lines, - only in OLD, + only in NEW:", *said, sep="\n")
    differing = [row for row in rows if row.differs]
    failing = sum("error" in case["outputs"] for case in new.values())
    alone = len(rows) - sum(row.is_comparable for row in rows)
    verdict = "Different" if differing or said else "Same"
    print(
        f"\n{verdict}: {len(differing)} of {len(rows) - alone} outputs differ, in {len({row.case for row in differing})} of "
        f"{len(old | new)} cases; {alone} cases cannot be compared; {failing} cases end with an error in NEW."
    )
    if not rows:
        sys.exit(f"No case contains {given.only!r}.")
    return 0 if verdict == "Same" else 1


if __name__ == "__main__":
    sys.exit(main())
