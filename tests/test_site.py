"""The site: what its pages take in exists, and, where its tools are installed, it builds without a warning."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpkernels

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOOLS = ("sphinx", "myst_parser", "furo", "sphinxcontrib.mermaid", "latex2mathml")  # requirements-docs.txt
sys.path.insert(0, str(DOCS))

import draw_passes  # noqa: E402
import links  # noqa: E402
import pages  # noqa: E402

MARKDOWN = sorted(path.stem for path in DOCS.glob("*.md"))


def missing() -> list[str]:
    found = []
    for tool in TOOLS:
        parent = tool.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(tool) is None:
            found.append(tool)
    return found


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if without := missing():
        pytest.skip(f"the site needs {', '.join(without)}: pip install -r requirements-docs.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize("page", MARKDOWN)
def test_what_a_page_takes_in_exists(page: str) -> None:
    text = pages.filled((DOCS / f"{page}.md").read_text())
    assert text.startswith("# ")
    assert "<!--" not in text


def test_a_section_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        pages.filled("<!-- README.md: Nothing -->")


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^[\w-]+$", pages.navigation(), re.M)
    assert sorted([*named, "index"]) == MARKDOWN


def test_links_of_the_repository_are_those_of_the_site() -> None:
    assert "](approximate.md)" in pages.taken_in("README.md", "The critic step")
    assert "](../bench/results/" in pages.taken_in("examples/README.md", None)
    assert "](when-it-pays.md)" in pages.taken_in("README.md", "Speed")
    assert pages.filled("[a](../README.md#install) [b](limits.md)") == "[a](index.md#install) [b](limits.md)"


def test_tables_have_the_measured_figures() -> None:
    text = pages.filled((DOCS / "when-it-pays.md").read_text())
    with (ROOT / "bench/results/xeon-avx512-1-thread-programs.csv").open(newline="") as file:
        tables = [list(csv.DictReader(file))]
    report = json.loads((ROOT / "bench/results/nvidia-h200-report.json").read_text(encoding="utf-8"))
    tables += [report["parts"]["programs"]["results"]]
    measured = [{row["program"]: list(row.values())[1:] for row in table} for table in tables]
    assert set(measured[0]) <= set(measured[1])
    for name in measured[0]:
        assert f"| {' | '.join([name, *measured[0][name], *measured[1][name]])} |" in text
    assert not re.search(r"\d", re.sub(r"^\|.*$|`.*?`|R1|R2|WGAN|above 1", "", text, flags=re.M))  # none is typed


def test_the_drawing_is_that_of_its_script() -> None:
    assert draw_passes.FILE.read_text() == draw_passes.drawn()
    assert [sum(one.units for one in passes) for _, passes in draw_passes.ROWS] == [6, 4]


def test_the_api_page_names_everything_that_is_public() -> None:
    text = (DOCS / "api.md").read_text()
    named = re.findall(r"^\.\. (?:autofunction|autoclass|data|module):: (?:gpkernels\.)?(\w+)$", text, re.M)
    assert sorted(named) == sorted([*gpkernels.__all__, "RMSprop"])


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="there"><a href="#there">1</a><a href="#gone">2</a><a href="b.html">3</a>')
    (tmp_path / "c.html").write_text('<a href="a.html#there">1</a><a href="a.html#gone">2</a><img src="d.svg">')
    assert sorted(links.broken(tmp_path)) == [
        "a.html: #gone",
        "a.html: b.html",
        "c.html: a.html#gone",
        "c.html: d.svg",
    ]


def test_the_site_builds_and_has_an_entry_for_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in gpkernels.__all__:
        where = "module-gpkernels.optim" if name == "optim" else f"gpkernels.{name}"
        assert f'id="{where}"' in text, name
    assert "<math" in text
    assert not [*links.broken(site)]
    assert not [path.name for path in site.glob("*.html") if "&lt;!--" in path.read_text()]


@pytest.mark.parametrize(("page", "title"), [("index", "gpkernels"), ("api", "API")])
def test_a_browser_shows_a_page_without_an_error(browser: str, site: Path, page: str, title: str) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    shown = subprocess.run(
        [browser, *options, f"file://{site}/{page}.html"], capture_output=True, text=True, timeout=120
    )
    assert f"<h1>{title}<" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if ":CONSOLE" in line] == []
