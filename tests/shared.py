"""Results that one process of a test session makes and the others read, as tests of a file may be anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from emulated import ROOT, alone


def once(name: str, make: Callable[[], Any]) -> Any:
    """Return what ``make`` returns, as JSON keeps it: made once in a session, however many processes ask."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:
        return json.loads(json.dumps(make()))
    folder = ROOT / "build" / "sessions" / session / name
    made = folder / "made.json"
    with alone(folder):
        if not made.exists():
            text = json.dumps(make())
            made.write_text(text)
        return json.loads(made.read_text())
