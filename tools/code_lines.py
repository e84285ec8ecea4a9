"""Code lines of the package per room: lines that hold at least one token, without blanks, comments and docstrings.

    python tools/code_lines.py              a table of the working tree
    python tools/code_lines.py REV [REV…]   the same for commits, side by side

Tokens are counted too: lines can be made fewer by packing them, tokens cannot. Commas are left out of the tokens, since
a formatter adds and removes them.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path, PurePosixPath

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
PACKAGE = "dinov3"


def code_size(source: str) -> tuple[int, int]:
    """(code lines, tokens) of one Python source."""
    docstrings = docstring_lines(source)
    lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.start[0] in docstrings:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        tokens += token.string != ","
    return len(lines), tokens


def docstring_lines(source: str) -> set[int]:
    """The lines taken by docstrings of the module, its classes and its functions."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def room(path: str) -> str:
    """The room a file belongs to: its folder right below the package, or the package itself."""
    parts = PurePosixPath(path).parts
    return f"{parts[1]}/" if len(parts) > 2 else "*.py"


def sources(revision: str | None) -> dict[str, str]:
    """Path → text of the package's Python files, in the working tree or in a commit."""
    if revision is None:
        return {str(path): path.read_text() for path in sorted(Path(PACKAGE).rglob("*.py"))}
    names = git("ls-tree", "-r", "--name-only", revision, PACKAGE).splitlines()
    return {name: git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def main(revisions: list[str]) -> None:
    columns: list[tuple[str, Counter[str], int, int]] = []
    for revision in revisions or [None]:
        lines: Counter[str] = Counter()
        files = sources(revision)
        total_tokens = 0
        for path, text in files.items():
            n, tokens = code_size(text)
            lines[room(path)] += n
            total_tokens += tokens
        columns.append((revision or "working tree", lines, len(files), total_tokens))
    rooms = sorted(set().union(*(lines for _, lines, _, _ in columns)))
    print("".join([f"{'room':<14}", *(f"{name:>14}" for name, *_ in columns)]))
    for name in rooms:
        print("".join([f"{name:<14}", *(f"{lines[name]:>14,}" for _, lines, _, _ in columns)]))
    print("".join([f"{'code lines':<14}", *(f"{sum(lines.values()):>14,}" for _, lines, _, _ in columns)]))
    print("".join([f"{'files':<14}", *(f"{n:>14,}" for _, _, n, _ in columns)]))
    print("".join([f"{'tokens':<14}", *(f"{n:>14,}" for *_, n in columns)]))


if __name__ == "__main__":
    main(sys.argv[1:])
