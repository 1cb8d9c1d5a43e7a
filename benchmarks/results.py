"""What every script here does alike: the report it writes and reads, its tables, and what it may be asked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import DataRow, TableFormat, tabulate

HERE = Path(__file__).resolve().parent
Report = dict[str, Any]


def text_of(report: Report) -> str:
    """As JSON in which every row is one line, be it in a list or by name."""
    return _laid_out(report) + "\n"


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(report), encoding="utf-8")


def read(path: Path, default: Report | None = None) -> Report:
    """The report at `path`; `default` where there is none, if one is given."""
    if default is not None and not path.is_file():
        return default
    return json.loads(path.read_text(encoding="utf-8"))


def latest(rows: Iterable[Mapping[str, Any]], *names: str) -> list[Any]:
    """`rows`, of those that are alike in these entries the last one, in the place of the first."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


_in_line = partial(json.dumps, ensure_ascii=False)


def _laid_out(value: Any, margin: str = "") -> str:
    inside = margin + " "
    if margin and _holds_rows(value):
        show = _in_line
    elif isinstance(value, dict) and (not margin or any(map(_holds_rows, value.values()))):
        show = partial(_laid_out, margin=inside)
    else:
        return _in_line(value)
    if isinstance(value, dict):
        left, right, entries = *"{}", [f"{_in_line(name)}: {show(entry)}" for name, entry in value.items()]
    else:
        left, right, entries = *"[]", list(map(show, value))
    return f"{left}\n" + ",\n".join(inside + entry for entry in entries) + f"\n{margin}{right}"


def _holds_rows(value: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return bool(entries) and all(isinstance(entry, dict) for entry in entries)


def _rule(widths: Sequence[int], _: Any) -> str:
    return "|---" * len(widths) + "|"


_LINE = DataRow("|", "|", "|")
# No column is filled up with blanks: a longer cell would change every line.
_COMPACT = TableFormat(None, _rule, None, None, _LINE, _LINE, padding=1, with_header_hide=None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, without a line break behind it."""
    return tabulate(rows, head, _COMPACT, stralign=None, numalign=None, disable_numparse=True)


def write_tables(path: Path, texts: Mapping[str, str]) -> None:
    """Beside the report at `path`: `texts` by what their file names end in, behind the report's."""
    for ending, text in texts.items():
        path.with_name(f"{path.stem}{ending}.md").write_text(text, encoding="utf-8")


def asking(
    about: str | None,
    out: str,
    *,
    seconds: float | None = None,
    device: str | None = None,
    table: bool = False,
    merge: bool = False,
) -> argparse.ArgumentParser:
    """A parser of what a script may be asked; of what several know, the options that are given here.

    about: the script's own words. out: its report's name. seconds, device: what they are unless asked.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / f"{out}.json")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="start nothing later than that")
    if device is not None:
        parser.add_argument("--device", default=device)
    if table:
        parser.add_argument("--table", action="store_true", help="measure nothing, only write what is there")
    if merge:
        parser.add_argument("--merge", type=Path, nargs="+", help="only make one report of these")
    return parser
