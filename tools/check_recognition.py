"""Make docs/recognition.md: whose weights are recognised, when they are saved without a word about the architecture.

    python tools/check_recognition.py

Every architecture of timm that can be analysed, and every bundled one, is built without memory; names and shapes of its
state dict are all that is looked at. Takes a few minutes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import timm
from rich.progress import track

import collapse_probe.models  # noqa: F401 - registers the bundled architectures
from collapse_probe.catalogue import read_table
from collapse_probe.files import write_atomically
from collapse_probe.loading.recognition import recognise_architecture
from collapse_probe.loading.signatures import on_meta

PAGE = Path(__file__).parents[1] / "docs" / "recognition.md"

_INTRO = """\
# Recognising architectures

`collapse-probe analyze model.pt` and `inspect` find out which architecture a file's weights belong to when the file
does not say (docstrings of `collapse_probe/loading/recognition.py` and `signatures.py`). Made by
`tools/check_recognition.py` with timm {version}: of {total} architectures that can be analysed, each saved as a bare
state dict with 17 classes, {exact} come back under their own name, {same} as the same network under a plainer name
(the other names are listed, and a warning says where their preprocessing differs), {listed} in a list of networks that
take the same weights and compute something else (the command stops and asks for `--model`), and {missed} not at all.

What shapes cannot show is not guessed in silence: the number of heads is that of the matched architecture, checked
against position-bias tables, norms of queries, logit scales and re-attention matrices where there are any; a ViT or
DeepViT of sizes that nobody registered is built from its anatomy, with heads of 64, 32 or 16 channels *assumed* and a
warning that `--num-heads` sets them.

| module of timm | architectures | own name | same network | listed among several | missed |
|---|---|---|---|---|---|
"""


def main() -> None:
    names = [row.name for row in read_table().values() if row.maps and timm.is_model(row.name)]
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    several: dict[tuple[str, ...], None] = {}
    for name in track(names, "Recognising"):
        model = on_meta(name, num_classes=17)
        found = recognise_architecture(model.state_dict()).candidates
        outcome = _outcome(name, [(item.name, item.same) for item in found])
        outcomes[type(model).__module__.rpartition(".")[2]][outcome] += 1
        if outcome == "listed":
            several[tuple(sorted(other for item in found for other in (item.name, *item.same)))] = None
    total = sum(outcomes.values(), Counter[str]())
    text = _INTRO.format(
        version=timm.__version__, total=len(names), exact=total["own"], same=total["same"], listed=total["listed"],
        missed=total["missed"],
    )  # fmt: skip
    for module, counts in sorted(outcomes.items()):
        cells = [sum(counts.values()), *(counts[key] for key in ("own", "same", "listed", "missed"))]
        text += f"| {module} | " + " | ".join(str(cell or "") for cell in cells) + " |\n"
    text += "\nWeights that several different networks take:\n\n"
    text += "".join(f"- {', '.join(names)}\n" for names in sorted(several))
    write_atomically(PAGE, text)
    print(dict(total))


def _outcome(name: str, found: list[tuple[str, list[str]]]) -> str:
    if [item for item, _ in found] == [name]:
        return "own"
    if len(found) == 1 and name in found[0][1]:
        return "same"
    return "listed" if any(name in (item, *same) for item, same in found) else "missed"


if __name__ == "__main__":
    main()
