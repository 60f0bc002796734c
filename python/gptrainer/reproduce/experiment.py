"""Experiments, the claims that they test, and the verdicts that follow from measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from gptrainer.reproduce.pictures import Picture

Verdict = Literal["held", "failed", "undecided", "not run"]
Size = Literal["quick", "full"]
Settings = Mapping[str, Any]
CONFIDENCE = 0.95
FEWEST = 5  # seeds for an interval: of three it is wider than most effects


class NotRun(Exception):
    """Raised where an experiment cannot run on this machine; the text gives the reason and the remedy."""


@dataclass(frozen=True)
class Findings:
    """Results of one seed. measures: the numbers that claims are judged by; series: lists for pictures and tables."""

    measures: dict[str, float]
    series: dict[str, Any] = field(default_factory=dict)


def interval_of_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the mean of two or more independent values, by Student's t distribution."""
    from scipy.stats import t as student  # experiments are listed without it

    if len(values) < 2:
        raise ValueError(f"values: expected at least two, got {len(values)}")
    half = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


@dataclass(frozen=True)
class Bound:
    """Closed interval in which a measured number has to lie for its claim to hold.

    of: "the mean" is judged by its confidence interval where there are FEWEST seeds or more, and is undecided where an
    end of the bound lies within that interval.
    """

    at_least: float = -math.inf
    at_most: float = math.inf
    of: Literal["every seed", "the mean"] = "every seed"

    def judge(self, values: Sequence[float]) -> Verdict:
        """Judge the values over the seeds. NaN and infinity fail."""
        if not _finite(values):
            return "failed"
        if self.of == "every seed":
            return "held" if all(value in self for value in values) else "failed"
        if not self.by_interval(values):
            return "held" if fmean(values) in self else "failed"
        low, high = interval_of_mean(values)
        if low in self and high in self:
            return "held"
        return "failed" if high < self.at_least or low > self.at_most else "undecided"

    def by_interval(self, values: Sequence[float]) -> bool:
        """Whether the values are judged by the confidence interval of their mean."""
        return self.of == "the mean" and len(values) >= FEWEST and _finite(values)

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        ends = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        ends += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
        return " and ".join(ends)


@dataclass(frozen=True)
class Claim:
    """A published statement, and the bound by which it is judged.

    measure: the name in ``Findings.measures``; what: that number in words, with its unit; picture: the name of the
    picture that shows it; only_full: the reason why the quick size cannot show it, if there is one; if_failed: the
    known cause of its failure in the full set (the code, the budget or the claim), if it is known to fail; design: the
    experiment on two cores that could show the published effect in its place.
    """

    text: str
    source: str
    published: str
    measure: str
    what: str
    bound: Bound
    picture: str = ""
    only_full: str = ""
    if_failed: str = ""
    design: str = ""

    def judge(self, findings: Sequence[Findings], size: Size) -> Judgement:
        """Judge the claim by the findings of all seeds."""
        if not findings:
            return Judgement("not run", reason="no seed was run")
        values = tuple(one.measures.get(self.measure, math.nan) for one in findings)
        if size == "quick" and self.only_full:
            return Judgement("not run", values, f"judged only in the full set: {self.only_full}")
        verdict = self.bound.judge(values)
        interval = interval_of_mean(values) if self.bound.by_interval(values) else None
        cause = self.if_failed if size == "full" and verdict != "held" else ""
        return Judgement(verdict, values, cause, interval)


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the values over the seeds that it follows from.

    interval: the confidence interval of their mean, where the claim is judged by it.
    """

    verdict: Verdict
    values: tuple[float, ...] = ()
    reason: str = ""
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single seed, NaN where a value is not finite."""
        if not _finite(self.values):
            return math.nan
        return stdev(self.values) if len(self.values) > 1 else 0.0


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibits:
    """Pictures of an experiment by name, and its tables."""

    pictures: Mapping[str, Picture]
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Context:
    """Resources of an experiment besides its settings. data_dir: folder of image data."""

    data_dir: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """A measurement with its claims.

    settings: everything that a result depends on besides the seed, for each size. measure: maps (settings, seed,
    context) to findings, or raises NotRun. exhibit: maps the findings of all seeds to pictures. about: the method.
    limits: what the size for two cores cannot show. needs: data beyond what the package ships. version: incremented
    when ``measure`` changes.
    """

    name: str
    title: str
    source: str
    about: str
    settings: Mapping[Size, Settings]
    seeds: Mapping[Size, int]
    measure: Callable[[Settings, int, Context], Findings]
    claims: Sequence[Claim]
    exhibit: Callable[[Sequence[Findings]], Exhibits]
    limits: str = ""
    needs: str = ""
    version: int = 1

    @property
    def known_failures(self) -> list[Claim]:
        """Claims that are known to fail in the full set."""
        return [claim for claim in self.claims if claim.if_failed]
