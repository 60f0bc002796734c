"""The report: a self-contained HTML page, and the same as JSON."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

import gpkernels
from gpkernels.arguments import replacing
from gptrainer.reproduce.experiment import CONFIDENCE, Claim, Exhibits, Experiment, Judgement, Size, Verdict
from gptrainer.reproduce.pictures import Picture
from gptrainer.reproduce.runner import Outcome


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict. figure: the number of the picture that shows it; picture: set where it is placed."""

    claim: Claim
    judgement: Judgement
    figure: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Section:
    """An experiment on the page."""

    number: int
    experiment: Experiment
    outcome: Outcome
    claims: Sequence[Judged]
    exhibits: Exhibits

    @property
    def tally(self) -> str:
        """Such as "4 held, 1 failed"."""
        return tally(self.claims)


def sections(outcomes: Sequence[Outcome], size: Size) -> list[Section]:
    """Judge the claims and draw the pictures."""
    return [_section(number, outcome, size) for number, outcome in enumerate(outcomes, 1)]


def tally(claims: Sequence[Judged]) -> str:
    """Count the claims by verdict."""
    counts = Counter(judged.judgement.verdict for judged in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])


def write(out: Path, sections: Sequence[Section], size: Size) -> tuple[Path, Path]:
    """Write report.html and report.json to the folder ``out``; return their paths."""
    page, data = out / "report.html", out / "report.json"
    facts = _facts()
    everything = [judged for section in sections for judged in section.claims]
    known = [(section.experiment, claim) for section in sections for claim in section.experiment.known_failures]
    environment = Environment(
        loader=PackageLoader("gptrainer.reproduce", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = number
    html = environment.get_template("report.html.j2").render(
        sections=sections,
        facts=facts,
        size=size,
        summary=tally(everything),
        known_failures=known,
        confidence=f"{CONFIDENCE:.0%}",
    )
    with replacing(page) as part:
        part.write_text(html, encoding="utf-8")
    with replacing(data) as part:
        part.write_text(
            json.dumps(
                {
                    **facts,
                    "size": size,
                    "known_failures": {
                        claim.text: {"cause": claim.if_failed, "design": claim.design} for _, claim in known
                    },
                    "experiments": [_as_json(section) for section in sections],
                },
                indent=1,
            )
            + "\n"
        )
    return page, data


def number(value: float) -> str:
    """Format with three digits and a typographic minus sign."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _section(at: int, outcome: Outcome, size: Size) -> Section:
    experiment = outcome.experiment
    exhibits = experiment.exhibit(outcome.findings) if outcome.findings else Exhibits({})
    figures = {name: f"{at}.{index}" for index, name in enumerate(exhibits.pictures, 1)}
    claims, placed = [], set()
    for claim in experiment.claims:
        judgement = claim.judge(outcome.findings, size)
        if not outcome.findings:
            judgement = Judgement("not run", reason=outcome.reason)
        picture = None if claim.picture in placed else exhibits.pictures.get(claim.picture)
        placed.add(claim.picture)
        claims.append(Judged(claim, judgement, figures.get(claim.picture, ""), picture))
    return Section(at, experiment, outcome, claims, exhibits)


def _facts() -> dict[str, Any]:
    return {
        "gpkernels": gpkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _as_json(section: Section) -> dict[str, Any]:
    experiment = section.experiment
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "limits": experiment.limits,
        "seeds": len(section.outcome.findings),
        "seconds": round(section.outcome.seconds, 1),
        "reason": section.outcome.reason,
        "claims": [
            {
                "claim": judged.claim.text,
                "source": judged.claim.source,
                "published": judged.claim.published,
                "measured": judged.claim.what,
                "bound": f"{judged.claim.bound}, {judged.claim.bound.of}",
                "values": [_finite(value) for value in judged.judgement.values],
                "interval": judged.judgement.interval,
                "verdict": judged.judgement.verdict,
                "reason": judged.judgement.reason,
            }
            for judged in section.claims
        ],
        "tables": [vars(table) for table in section.exhibits.tables],
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
