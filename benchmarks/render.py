"""Writes README.md and docs/ from the pages in benchmarks/pages/: every figure in their prose comes from a JSON of this folder.

    python benchmarks/render.py            # or: nox -s docs

Pages are Jinja templates. What they may ask for:

    quality(model, frames, row)       a row of quality.json: cost, figures by name, and the same `of_dense` and of `fewer` steps
    two_stage(row, base, frames)      a row of two_stage.json: cost by clip, figures by name, and `of_dense`
    find(name, key=value, ...)        the one row of NAME.json that has these values; of another list than `rows`, with among=
    table(name, only=[...])           NAME.md as it is, or those of its rows
    claim(what)                       nothing, but rendering fails where it is false: what a sentence says has to hold

Links are written relative to the page. In docs/docs/, which ComfyUI shows as help, they become addresses of the repository.
"""

from __future__ import annotations

import os.path
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import jinja2
import report
import results
import two_stage_report

PAGES = HERE / "pages"
HELP = "docs/docs/"
LINK = re.compile(r"(?<!!)(\[[^]]*\]\()(?!https?:)([^)#]*)")
REFINER, USUAL = "refiner", 17


@cache
def content(name: str) -> Any:
    return results.read(HERE / f"{name}.json")


@cache
def group(model: str, frames: int) -> tuple[dict[str, Any], report.Rival]:
    """Rows of one model and length by name, and dense with fewer steps."""
    rows = [row for row in content("quality")["rows"] if (row["model"], row["frames"]) == (model, frames)]
    return {row["row"]: row for row in rows}, report.Rival(rows)


def multiples(figures: dict[str, float], of: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(**{name: figures[name] / of[name] for name in figures if of.get(name)})


def quality(model: str, frames: int, row: str) -> SimpleNamespace:
    """cost as a share of dense's FLOPs at the size that stands for the length; figures; of_dense, fewer likewise."""
    rows, rival = group(model, frames)
    if row not in rows:
        raise LookupError(f"quality.json has no row {row!r} of {model} at {frames} latent frames.")
    own, dense = report.figures_of(rows[row]), report.figures_of(rows["dense"])
    cost = rows[row]["cost"][report.PRICED_AS[frames]]
    fewer = rival.of(rows[row], cost)
    return SimpleNamespace(
        **own,
        cost=cost,
        of_dense=multiples(own, dense),
        fewer=SimpleNamespace(**fewer, of_dense=multiples(fewer, dense)),
    )


def two_stage(row: str, base: str = REFINER, frames: int = USUAL) -> SimpleNamespace:
    found = {
        entry["row"]: entry
        for entry in content("two_stage")["rows"]
        if (entry["base"], entry["frames"]) == (base, frames)
    }
    if row not in found:
        raise LookupError(f"two_stage.json has no row {row!r} of {base} at {frames} latent frames.")
    dense = two_stage_report.baseline(found[row], found)
    figures = found[row]["figures"]
    return SimpleNamespace(
        **figures, cost=found[row]["cost"], of_dense=multiples(figures, dense["figures"] if dense else {})
    )


def find(name: str, among: str = "rows", **wanted: Any) -> SimpleNamespace:
    """`among`: the list, as a path with dots."""
    rows = content(name)
    for part in among.split("."):
        rows = rows[part]
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"expected one of {among} in {name}.json with {wanted}, found {len(found)}.")
    return SimpleNamespace(**found[0])


def table(name: str, only: list[str] | None = None) -> str:
    """A table as its script wrote it; `only`: with the rows that are named so in the first cell, all of them in each part."""
    text = (HERE / f"{name}.md").read_text(encoding="utf-8").strip()
    if only is None:
        return text
    named = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    if missing := [row for row in only if row not in named]:
        raise LookupError(f"{name}.md has no row {missing[0]!r}.")
    lines = text.splitlines()
    # The line above the rule names the columns.
    heads = {lines[i - 1] for i, line in enumerate(lines) if line.startswith("|---")}
    return "\n".join(
        line
        for line in lines
        if not line.startswith("| ") or line in heads or line.split("|")[1].strip() in only
    )


def claim(what: object) -> str:
    if not what:
        raise ValueError("a page claims what the figures do not say.")
    return ""


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def fixed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}"


def environment() -> jinja2.Environment:
    out = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    out.filters |= {"percent": percent, "fixed": fixed}
    out.globals |= {
        "quality": quality,
        "two_stage": two_stage,
        "find": find,
        "table": table,
        "claim": claim,
        "content": content,
    }
    return out


@cache
def repository() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # Python 3.10 has no tomllib.
    return re.search(r'^Repository = "(.+)"$', text, re.MULTILINE)[1]


def leading_anywhere(name: str, text: str) -> str:
    """A page of help with links that work in ComfyUI, too, where relative ones would lead to its own server.

    Images stay relative: ComfyUI looks for them beside the page, as GitHub does.
    """

    def absolute(found: re.Match[str]) -> str:
        path = os.path.normpath(f"{HELP}{found[2]}" if found[2] else name)
        return f"{found[1]}{repository()}/blob/HEAD/{Path(path).as_posix()}"

    return LINK.sub(absolute, text)


def page(name: str, templates: jinja2.Environment) -> str:
    text = templates.get_template(name).render()
    return leading_anywhere(name, text) if name.startswith(HELP) else text


def pages() -> dict[str, str]:
    """What each page says, by its path from the root."""
    templates = environment()
    names = sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))
    out = {}
    for name in names:
        try:
            out[name] = page(name, templates)
        except Exception as error:
            # Python 3.10 has no notes on errors.
            raise RuntimeError(f"{PAGES / name}: {error}") from error
    return out


def main() -> None:
    for name, text in pages().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
