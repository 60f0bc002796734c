"""Result of `gpkernels explain`, and its format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of the critic that depends on the input.

    layer: name of the module that made it; "" for the critic itself. function: the function called, or autograd's name
    where no PyTorch function was seen. method: "rule", "rule, curved" for a call with second-order terms, or "generic:
    ..." with the reason why the call is left to autograd. flops: of its products and convolutions; None where they
    could not be attributed.
    """

    layer: str
    function: str
    method: str
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; ``str`` formats it as a table.

    calls: in order. method: summary for the whole critic. samples: whether they are independent, and the consequence
    for groups of them. meet: the call in which samples may interact; "" if there is none. forward_flops: of one call of
    the critic. eager_flops, flops: of a gradient penalty with its weight gradients in eager PyTorch and here; None
    where that is not possible, for the reason in eager_refusal or refusal. uncounted: an operation with products of
    which PyTorch counts no FLOPs; "" if there is none.
    """

    calls: list[Call]
    method: str
    samples: str
    meet: str
    forward_flops: int
    eager_flops: int | None
    flops: int | None
    eager_refusal: str = ""
    refusal: str = ""
    uncounted: str = ""

    def __str__(self) -> str:
        rows = [("layer", "call", "MFLOP", "method")]
        rows += [(c.layer or "(critic)", c.function, _mega(c.flops), c.method) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for layer, function, count, method in rows:
            lines.append(f"{layer:{widths[0]}}  {function:{widths[1]}}  {count:>{widths[2]}}  {method}")
        unit = self.forward_flops
        eager = self._passes(self.eager_flops, self.eager_refusal)
        ours = self._passes(self.flops, self.refusal)
        lines += ["", f"the critic: {self.method}", f"samples: {self.samples}", "penalty with weight gradients:"]
        lines += [f"  in eager PyTorch: {eager}", f"  here: {ours}"]
        if self.uncounted:
            lines.append(f"  without the products of {self.uncounted}, of which PyTorch counts no FLOPs")
        elif unit:
            lines.append(f"  L, the FLOPs of products in one call of the critic: {_mega(unit)} MFLOP")
        return "\n".join(lines)

    def _passes(self, count: int | None, refusal: str) -> str:
        if count is None:
            return f"not possible: {refusal}"
        if self.uncounted or not self.forward_flops:
            return f"{_mega(count)} MFLOP"
        return f"{count / self.forward_flops:.2f} L"


def _mega(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.3f}"
