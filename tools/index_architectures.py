"""Write collapse_probe/data/architectures.json: digests of the names and shapes of every architecture that timm knows.

    python tools/index_architectures.py

Takes a few minutes. Run it again after a new version of timm, or after a change of `loading/signatures.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
from rich.progress import track

import collapse_probe.models  # noqa: F401 - registers the bundled architectures
from collapse_probe.files import write_atomically
from collapse_probe.loading.signatures import on_meta, shapes_of, signature

TARGET = Path(__file__).parents[1] / "collapse_probe" / "data" / "architectures.json"


def main() -> None:
    entries = {}
    for name in track(timm.list_models(), "Building"):
        found = signature(shapes_of(on_meta(name).state_dict()))
        entries[name] = [found.exact, found.loose, found.numbers]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
    write_atomically(TARGET, f'{{"timm": "{timm.__version__}", "architectures": {{\n{lines}\n}}}}\n')
    print(f"{len(entries)} architectures of timm {timm.__version__} in {TARGET.name}")


if __name__ == "__main__":
    main()
