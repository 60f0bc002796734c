"""The report in a browser: headless Chromium, by its command line alone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_reproduce import Counting, findings_of, made_up

from gptrainer.reproduce import report
from gptrainer.reproduce.experiments import find
from gptrainer.reproduce.runner import Outcome

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = 390
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: Debian's package chromium has one")

# Answers in the page's own text, which --dump-dom prints. A frame of phone width stands for a phone: a window of
# Chromium's cannot be as narrow.
PROBE = """
<script>
const seen = {errors: []};
addEventListener("error", event => seen.errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  seen.images = [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
  seen.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
  seen.clipped = [...document.querySelectorAll("h1, h2, h3, p, dd, li, figure")]
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1).length;
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(seen);
  document.body.replaceChildren(answer);
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with two experiments, one of them with a real picture of eigenvalues, and a wide table."""
    out = tmp_path_factory.mktemp("report")
    made = made_up(Counting())
    crowded = made_up(Counting(), *find("dirac-gan").claims[:2], name="dirac-gan")
    outcomes = [Outcome(made, findings_of(0.5, 0.7)), Outcome(crowded, findings_of(1)), Outcome(find("unrolled"))]
    return report.write(out, report.sections(outcomes, "quick"), "quick")[0]


def chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def asked(page: Path, width: int) -> tuple[dict[str, Any], str]:
    """What the page says of itself in a frame of a width, and the browser's log."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<head>", "<head>" + PROBE, 1))
    frame = page.with_name(f"frame-{width}.html")
    # srcdoc shares the frame's origin, so that the answer can be read from outside.
    inside = html.escape(probed.read_text(), quote=True)
    copy = (
        "<script>const look = setInterval(() => {"
        "const answer = document.querySelector('iframe').contentDocument.getElementById('answer');"
        "if (answer) { clearInterval(look); document.body.append(answer.cloneNode(true)); }}, 50);</script>"
    )
    frame.write_text(
        f'<!doctype html><body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{inside}"></iframe>{copy}'
    )
    done = chromium("--virtual-time-budget=15000", "--window-size=1200,1000", "--dump-dom", frame.as_uri())
    (answer,) = re.findall(r'<pre id="answer">(.*?)</pre>', done.stdout.rpartition("</iframe>")[2])
    return json.loads(html.unescape(answer)), done.stderr


@pytest.mark.parametrize("width", [PHONE, 1100])
def test_every_picture_is_drawn_and_nothing_is_wider_than_the_page(page: Path, width: int) -> None:
    seen, log = asked(page, width)
    assert seen["errors"] == []
    assert "CONSOLE" not in log
    assert seen["images"]
    assert all(natural > 0 and 100 < shown <= width for natural, shown in seen["images"])
    assert seen["width"][0] == seen["width"][1] <= width
    assert seen["clipped"] == 0


def test_the_page_prints(page: Path) -> None:
    pdf = page.with_name("report.pdf")
    chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type/Page\n") >= 1
    assert len(content) > 10_000


def test_a_page_with_a_broken_picture_or_a_wide_line_would_be_seen(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = page.read_text()
    text = re.sub(r'src="data:image/svg[^"]*"', 'src="data:image/svg+xml;base64,AAAA"', text, count=1)
    broken.write_text(text.replace("</main>", '<p style="width:700px;max-width:none">wide</p></main>'))
    seen, _ = asked(broken, PHONE)
    assert seen["errors"]
    assert any(natural == 0 for natural, _ in seen["images"])
    assert seen["width"][0] > seen["width"][1]
