"""The notebooks: `make notebooks`.

    python tools/notebooks.py                  executes all of notebooks/*.py, each in its own kernel, offline
    python tools/notebooks.py NAME…            some of them
    python tools/notebooks.py --render         and writes them with outputs and figures to docs/notebooks

Sources are jupytext's percent format: a Python file is the notebook. An .ipynb of each, with its outputs, is in
build/notebooks. A cell that fails stops the command with its traceback.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES, BUILT, PAGES = ROOT / "notebooks", ROOT / "build" / "notebooks", ROOT / "docs" / "notebooks"
WIDEST = 900  # px of a figure on a page


def executed(source: Path) -> Any:
    """The notebook of a source, with the outputs of every cell. Raises nbclient's `CellExecutionError`."""
    import jupytext
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = jupytext.read(source)
    options = Config(KernelManager={"transport": "ipc"})  # no port that others could read
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources, config=options).execute()
    return notebook


def markdown(notebook: Any, name: str, folder: Path) -> str:
    """A page: text, code, printed lines, and figures as JPEGs beside it."""
    from PIL import Image

    parts: list[str] = []
    figures = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            elif (png := output.get("data", {}).get("image/png")) is not None:
                image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
                if image.width > WIDEST:
                    image = image.resize((WIDEST, round(image.height * WIDEST / image.width)))
                file = folder / f"{name}-{figures}.jpg"
                image.save(file, quality=80)
                parts.append(f"![{alternative(parts)}]({file.name})")
                figures += 1
    head = f"*This page is `notebooks/{name}.py`, executed by `make notebooks`.*"
    return "\n\n".join([parts[0], head, *parts[1:]]) + "\n"


def alternative(parts: list[str]) -> str:
    """What a figure shows, for those who do not see it: the last sentence above its code."""
    text = next((p for p in reversed(parts) if not p.startswith(("```", "!["))), "figure")
    plain = re.sub(r"[*#`\[\]\n]+", " ", text).strip()
    return re.split(r"(?<=[.:]) ", plain)[-1].rstrip(".:")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--render", action="store_true", help="write docs/notebooks")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sources = sorted(SOURCES.glob("*.py"))
    chosen = [s for s in sources if not args.names or s.stem in args.names]
    if unknown := set(args.names) - {s.stem for s in sources}:
        sys.exit(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(s.stem for s in sources)}")
    BUILT.mkdir(parents=True, exist_ok=True)
    import nbformat

    begin = time.monotonic()
    for source in chosen:
        start = time.monotonic()
        notebook = executed(source)
        nbformat.write(notebook, BUILT / f"{source.stem}.ipynb")
        if args.render:
            PAGES.mkdir(exist_ok=True)
            for old in PAGES.glob(f"{source.stem}-*.jpg"):
                old.unlink()
            (PAGES / f"{source.stem}.md").write_text(markdown(notebook, source.stem, PAGES))
        print(f"{source.stem:26s} {time.monotonic() - start:5.1f} s", flush=True)
    print(f"{len(chosen)} notebooks, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
