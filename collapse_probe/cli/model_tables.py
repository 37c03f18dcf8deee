"""What `collapse-probe models` prints: aligned lines of at most 80 columns, in plain ASCII, which any pipe takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from collapse_probe.catalogue import Selection, in_words
from collapse_probe.cli.output import PipeConsole, printing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from collapse_probe.architecture import Architecture
    from collapse_probe.catalogue import Row

_WIDTH = 80
_MOST_NAMES = 3

#: Where the longest cells of all columns do not fit side by side: widths that suffice for nearly every row.
_COMMON_WIDTHS = (33, 4, 20, 15, 4)


def print_listing(everything: Selection, chosen: Selection, versions: Mapping[str, str], filtered: bool) -> None:
    """A line per attending architecture.

    Args:
        everything: all names of the installed timm and the bundled ones.
        chosen: those to show.
        versions: of timm: the ``"installed"`` one and that of the ``"table"``.
        filtered: whether patterns were given; without them, names without attention are only counted.
    """
    shown: list[RenderableType] = [_headline(everything, versions), ""]
    if chosen.attending:
        shown += [*_rows(chosen.attending), ""]
    _print([*shown, *_legend(chosen, filtered)])


def print_architecture(architecture: Architecture) -> None:
    """A line per attention map of one architecture, then what has no map and why."""
    size = " x ".join(map(str, architecture.input_size))
    head = f"{architecture.name}: {_plural(len(architecture.layers), 'attention map')}, images of {size}"
    shown: list[RenderableType] = [Text(head, "bold"), ""]
    if architecture.layers:
        shown += [_layers(architecture), "", *_remarks(architecture)]
    if architecture.not_captured:
        shown += [Text("Not captured", "bold"), _grouped(architecture.not_captured)]
    _print(shown)


def _headline(everything: Selection, versions: Mapping[str, str]) -> str:
    same = versions["table"] == versions["installed"]
    installed = "the one installed" if same else f"installed is {versions['installed']}"
    analysed = sum(row.analysed > 0 for row in everything.attending)
    counts = [
        f"{analysed} can be analysed",
        f"{len(everything.attending) - analysed} attend only in ways that are not analysed",
        f"{len(everything.without_attention)} do not attend",
        *([f"{len(everything.failed)} could not be run"] if everything.failed else []),
        f"{len(everything.unknown)} are unknown to the table",
    ]
    total = sum(len(group) for group in vars(everything).values())
    return f"Table made with timm {versions['table']}, {installed}. Of {total} names, {', '.join(counts)}."


def _rows(rows: Sequence[Row]) -> Iterator[RenderableType]:
    """The heading and one line per row, however many there are: so can they be searched."""
    lines = [("name", "maps", "kinds", "compared", "gaps")]
    for row in rows:
        compared = "+".join(map(str, row.groups)) or ("lone layers" if row.analysed else "not analysed")
        lines.append((row.name, str(row.maps), in_words(row.kinds) or "-", compared, str(row.gaps or "-")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    space = 2 if sum(widths) + 2 * (len(widths) - 1) <= _WIDTH else 1
    if sum(widths) + len(widths) - 1 > _WIDTH:
        widths = list(_COMMON_WIDTHS)
    heading, *others = (_aligned(cells, widths, space) for cells in lines)
    yield Text(heading, "bold")
    yield from map(Text, others)


def _aligned(cells: Sequence[str], widths: Sequence[int], space: int) -> str:
    """Cells under each other; one that is too long moves what follows it to the right, in its line alone."""
    line, start = "", 0
    for cell, width, number in zip(cells, widths, (False, True, False, False, True), strict=True):
        if line:
            line = f"{line} ".ljust(start)
        line += cell.rjust(width - (len(line) - start)) if number else cell
        start += width + space
    return line


def _legend(chosen: Selection, filtered: bool) -> Iterator[RenderableType]:
    if filtered and chosen.without_attention:
        yield f"No attention in {_some(chosen.without_attention)}."
    if filtered and chosen.failed:
        yield f"Could not be run: {_some(list(chosen.failed))}."
    if chosen.unknown:
        yield f"Not in the table: {_some(chosen.unknown)}. Give one name to have it run."
    if chosen.attending:
        yield Text("compared: layers in each group that are compared; lone layers: no two are alike", "dim")
        if not all(row.analysed for row in chosen.attending):
            yield Text("not analysed: gates, channels and gaps are listed, and no analysis measures them", "dim")
        yield Text("gaps: layers that attend, or look as if they did, and have no map", "dim")
        yield Text(f"The layers of one: collapse-probe models {chosen.attending[0].name}", "dim")


def _layers(architecture: Architecture) -> Table:
    """Columns that would say the same of every layer are left out; :func:`_remarks` says it once."""
    layers = architecture.layers
    windows = any(layer.windows > 1 or layer.partition for layer in layers)
    mixed = any(not layer.is_probability for layer in layers)
    columns = {"group": "left", "layer": "left", "kind": "left", "[H, Q, K]": "left"}
    table = _table(**columns, **({"windows": "left"} if windows else {}), **({"rows": "left"} if mixed else {}))
    for layer in layers:
        cells = [layer.group or "-", layer.name, layer.kind, f"[{layer.heads}, {layer.queries}, {layer.keys}]"]
        if windows:
            cells.append(f"{layer.windows} {layer.partition}".strip())
        if mixed:
            cells.append("probabilities" if layer.is_probability else "mixed")
        table.add_row(*cells)
    return table


def _remarks(architecture: Architecture) -> Iterator[RenderableType]:
    yield Text("group: layers of one letter are compared; [H, Q, K]: heads, queries, keys", "dim")
    mixed = sum(not layer.is_probability for layer in architecture.layers)
    if mixed:
        yield Text("mixed: the model mixes its heads or changes the map after the softmax", "dim")
    else:
        yield Text("Rows of all maps are probabilities.", "dim")
    for kind, why in architecture.not_compared.items():
        yield f"Not compared: {kind}: {why}."
    if architecture.device == "cpu":
        yield Text("Run on the CPU, because it reads values of its tensors.", "dim")
    yield ""


def _grouped(reasons: Mapping[str, str]) -> Table:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    grid = Table.grid(padding=(0, 1))
    for reason, layers in names.items():
        grid.add_row("-", f"{_some(layers)}: {reason}")
    return grid


def _table(**columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name, justify in columns.items():
        table.add_column(name, justify=justify, no_wrap=name != "layer", overflow="fold")  # type: ignore[arg-type]
    return table


def _print(what: Sequence[RenderableType]) -> None:
    with printing():
        console = PipeConsole()
        console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
        for item in what:
            spare = console.width - len(item.columns) if isinstance(item, Table) and item.show_header else 0
            if isinstance(item, Table) and console.measure(item).maximum <= spare:
                item.padding = (0, 2, 0, 0)
            console.print(item, markup=False, highlight=False, emoji=False)


def _some(names: Sequence[str]) -> str:
    if len(names) <= _MOST_NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
