"""Make the table of architectures: run each of timm's and the bundled ones once, on random weights.

    python tools/list_models.py [--force] [PATTERN ...]

writes `collapse_probe/data/models.csv` and `docs/models.md`. What the table has from the installed version of timm is
kept; `--force` runs it again, which is needed after a change to the capture. It can be interrupted at any time and goes
on from there without `--force`. About 1400 names take ten minutes on one core; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from collapse_probe.architecture import architecture_names, describe
from collapse_probe.capture.attention_map import KINDS
from collapse_probe.catalogue import TABLE, Row, in_words, read_table, row_of, select, timm_version, write_table
from collapse_probe.errors import CollapseProbeError
from collapse_probe.files import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_SAVE_EVERY = 50

_INTRO = """\
# Models

What `collapse_probe` finds in the architectures of timm {version}, run on random weights: {analysed} of {total} can be
analysed, {others} attend only in ways that are not analysed. `collapse-probe models NAME` shows every layer of one.

- **maps**: attention maps per image; the windows of a layer count as one. **kinds**: what asks what, see below.
- **mixed**: maps that the model changes after their softmax (re-attention, talking heads, differential attention).
- **compared**: layers in each group that are compared with each other: same kind, heads, queries, keys and partition.
  Lone layers still have entropy, head diversity and the rest. Kinds that no analysis measures are "not analysed".
- **gaps**: layers that attend, or look as if they did, and have no map; the reasons stand below the table.

A new model usually needs nothing: layers are found by the operators that run, not by their names. Where
`collapse-probe models NAME` lists a gap, its reason says what is not understood. `python tools/list_models.py` makes
this page and `collapse_probe/data/models.csv`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only names that match")
    parser.add_argument("--force", action="store_true", help="run also what the table has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of models whose names are deprecated
    names = architecture_names()
    table = {name: row for name, row in (read_table() if TABLE.exists() else {}).items() if name in set(names)}
    wanted = select(names, options.patterns)
    if options.force:
        table = {name: row for name, row in table.items() if name not in set(wanted)}
    else:
        wanted = [name for name in wanted if name not in table or not _current(table[name])]
    try:
        for number, name in enumerate(_with_progress(wanted), 1):
            table[name] = _row(name)
            if number % _SAVE_EVERY == 0:
                write_table(table.values())
    except KeyboardInterrupt:
        print("Interrupted; without --force it goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        write_table(table.values())
    write_atomically(PAGE, page(read_table().values()))
    failures = [row for row in table.values() if row.failure]
    print(f"{len(wanted)} run, {len(table)} in the table, {len(failures)} failed.")
    for row in failures:
        print(f"{row.name}: {row.failure}")


def page(rows: Iterable[Row]) -> str:
    """The table as Markdown, family by family."""
    rows = list(rows)
    timms = [row for row in rows if row.source != "collapse_probe"]
    analysed = sum(row.analysed > 0 for row in timms)
    others = sum(row.attends for row in timms) - analysed
    parts = [_INTRO.format(version=timm_version(rows), analysed=analysed, others=others, total=len(timms))]
    parts.append("\n".join(["## Kinds", "", *(f"- **{kind}**: {meaning}" for kind, meaning in KINDS.items())]) + "\n")
    families: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row.source != "collapse_probe", row.family), []).append(row)
    without = []
    for (foreign, family), members in sorted(families.items()):
        if any(row.attends or row.failure for row in members):
            parts.append("\n".join(_section(family if foreign else f"{family} (bundled)", members)))
        else:
            without.append(f"{family} ({len(members)})")
    parts.append(f"## Families without softmax attention\n\nWith the number of their names: {', '.join(without)}.\n")
    return "\n".join(parts)


def _section(title: str, rows: list[Row]) -> Iterator[str]:
    yield from (f"## {title}", "", "| name | input | maps | kinds | mixed | compared | gaps |")
    yield "|---|---|--:|---|--:|---|--:|"
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.failure:
            yield f"| {row.name} | | | could not be run: {row.failure} | | | |"
        elif row.attends:
            compared = " + ".join(map(str, row.groups)) or ("" if row.analysed else "not analysed")
            numbers = [str(number or "") for number in (row.mixed, row.gaps)]
            cells = (row.name, row.input_size, str(row.maps), in_words(row.kinds), numbers[0], compared, numbers[1])
            yield f"| {' | '.join(cells)} |"
        for reason in row.not_captured:
            reasons.setdefault(reason, []).append(row.name)
    yield ""
    for reason, names in reasons.items():
        yield f"Gaps in {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}.\n"
    absent = [row.name for row in rows if not row.attends and not row.failure]
    if absent:
        yield f"Without attention: {', '.join(absent)}.\n"


def _row(name: str) -> Row:
    try:
        return row_of(describe(name))
    except CollapseProbeError as error:
        home = timm.model_entrypoint(name).__module__
        source = "collapse_probe" if home.startswith("collapse_probe.") else f"timm {timm.__version__}"
        return Row(name, home.rpartition(".")[2], source, failure=str(error))


def _current(row: Row) -> bool:
    return not row.failure and row.source in ("collapse_probe", f"timm {timm.__version__}")


def _with_progress(names: list[str]) -> Iterator[str]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name
            progress.advance(task)


if __name__ == "__main__":
    main()
