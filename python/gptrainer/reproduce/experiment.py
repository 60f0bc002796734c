"""Experiments, the claims they test, and how a verdict follows from what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from gptrainer.reproduce.pictures import Picture

Verdict = Literal["held", "failed", "not run"]
Size = Literal["quick", "full"]
Settings = Mapping[str, Any]


class NotRun(Exception):
    """An experiment cannot run on this machine; its text says why, and what would change that."""


@dataclass(frozen=True)
class Findings:
    """What one seed gave. measures: the numbers claims are judged by; series: plain lists, for pictures and tables."""

    measures: dict[str, float]
    series: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """What a measured number has to satisfy for its claim to hold; both ends belong to it."""

    at_least: float = -math.inf
    at_most: float = math.inf
    of: Literal["every seed", "the mean"] = "every seed"

    def holds(self, values: Sequence[float]) -> bool:
        """Whether it does, over the seeds; never for a value that is not a number."""
        judged = [fmean(values)] if self.of == "the mean" else values
        return all(self.at_least <= value <= self.at_most for value in judged)

    def __str__(self) -> str:
        ends = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        ends += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
        return " and ".join(ends)


@dataclass(frozen=True)
class Claim:
    """One published statement, and the bound by which ours is judged.

    measure: the name in ``Findings.measures``; what: that number in words, with its unit; picture: the picture that
    shows it, by its name; only_full: why the quick size cannot show it, if it cannot; if_failed: whether a failure in
    the full size owes to the code, the budget or the claim, where that was found out.
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

    def judge(self, findings: Sequence[Findings], size: Size) -> Judgement:
        """The verdict over seeds."""
        if not findings:
            return Judgement("not run", reason="no seed was run")
        values = tuple(one.measures.get(self.measure, math.nan) for one in findings)
        if size == "quick" and self.only_full:
            return Judgement("not run", values, f"judged only in the full set: {self.only_full}")
        if self.bound.holds(values):
            return Judgement("held", values)
        return Judgement("failed", values, self.if_failed if size == "full" else "")


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the values over seeds that it rests on."""

    verdict: Verdict
    values: tuple[float, ...] = ()
    reason: str = ""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 where there is one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Table:
    """Numbers a picture cannot carry; cells are text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibits:
    """What is shown of an experiment: pictures by name, and tables."""

    pictures: Mapping[str, Picture]
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Context:
    """What an experiment may use beside its settings: where image data lies, and what it may keep between runs."""

    data_dir: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """settings: all that a result depends on beside the seed; with seeds, for either size.

    measure: (settings, seed, context) to findings, or raises NotRun. exhibit: findings over the seeds to pictures.
    about: what is done. limits: what the size on two cores cannot show. version: raised when ``measure`` changes.
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
    version: int = 1
