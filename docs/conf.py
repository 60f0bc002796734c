"""Settings of the site, which `make docs` builds of docs/*.md; pages.py says what these take in."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import links  # noqa: E402
import mathml  # noqa: E402
import pages  # noqa: E402

from gpkernels.version import __version__  # noqa: E402

project, author, release = "gpkernels", "the gpkernels authors", __version__
html_title = f"gpkernels {release}"
html_theme = "furo"
highlight_language = "text"
html_show_copyright = html_show_sphinx = html_copy_source = html_show_sourcelink = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:func", r"torch\..*")]  # types such as "Tensor, optional"; PyTorch's
autodoc_typehints = "none"  # docstrings have them
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]


def fill(_: Sphinx, __: str, source: list[str]) -> None:
    source[0] = pages.filled(source[0])


def check_links(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        for link in links.broken(Path(app.outdir)):
            logging.getLogger(__name__).warning("broken link: %s", link)


def setup(app: Sphinx) -> None:
    mathml.register(app)
    app.connect("source-read", fill)
    app.connect("build-finished", check_links)
