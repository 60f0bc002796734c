"""What the pages of the site take in: sections of other files of the repository, tables, navigation.

A comment such as <!-- README.md: Speed --> stands for that section, <!-- README.md --> for the file, and
<!-- table: programs --> for a table of tables.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import tables

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {
    "Use": ["migration", "how-it-works", "when-it-pays", "beyond-gans", "compile", "distributed", "examples", "api"],
    "Trust": ["verifying", "limits", "approximate"],
    "Project": ["architecture", "contributing", "changelog"],
}
TAKEN_IN = {  # pages that have what these paths have
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples": "examples.md",
    "examples/README.md": "examples.md",
    "bench/results": "when-it-pays.md",
}


def navigation() -> str:
    """List the pages that exist; those that PAGES does not name come last."""
    there = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    groups = {caption: [page for page in pages if page in there] for caption, pages in PAGES.items()}
    if more := sorted(there - {page for pages in groups.values() for page in pages}):
        groups["More"] = more
    head = ["```{toctree}", ":hidden:"]
    return "\n".join("\n".join([*head, f":caption: {name}", "", *pages, "```"]) for name, pages in groups.items())


def taken_in(name: str, title: str | None) -> str:
    """Return a file of the repository or one section of it, with links as they are from docs/."""
    text = (ROOT / name).read_text()
    if title:
        found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.M | re.S)
        if not found:
            raise ValueError(f"{name} has no section {title!r}")
        text = found[0]
    return relinked(text, (ROOT / name).parent)


def first_screen() -> str:
    """Return the README until its second heading."""
    return taken_in("README.md", None).partition("\n## ")[0]


def relinked(text: str, folder: Path) -> str:
    """Return a text of a file in a folder with links as they are from docs/."""

    def link(match: re.Match[str]) -> str:
        path = folder / match[1]
        inside = TAKEN_IN.get(os.path.relpath(path, ROOT), os.path.relpath(path, DOCS))
        return f"]({match[1] if '://' in match[1] else inside}"

    return re.sub(r"\]\(([^)#\s]+)", link, text)


def filled(text: str) -> str:
    """Replace the comments that stand for something."""
    text = relinked(text, DOCS).replace("<!-- pages -->", navigation()).replace("<!-- first screen -->", first_screen())
    text = re.sub(r"<!-- table: (\w+) -->", lambda match: getattr(tables, match[1])(), text)
    return re.sub(r"<!-- ([\w/]+\.md)(?:: (.*?))? -->", lambda match: taken_in(match[1], match[2]), text)
