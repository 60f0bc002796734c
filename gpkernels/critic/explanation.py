"""What `gpkernels explain` says of a critic, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of the critic that the input goes through.

    layer: the module that made it, by its name in the critic; "" for the critic itself. function: what was called, or
    autograd's name where no function of PyTorch was seen. way: "rule", "rule, curved" where activations have adjoints
    to be pulled down once more, or "generic: ..." with the reason why the call is left to autograd. flops: of the
    products and convolutions in it; None where they could not be told apart from other calls'.
    """

    layer: str
    function: str
    way: str
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` says; ``str`` of it is a table.

    calls: in order. way: of the whole critic. samples: whether these keep to themselves, and what follows for groups
    of them. meet: the call in which samples meet, or in which it cannot be told that they do not; "" if there is none.
    forward_flops: of one call of the critic. eager_flops, flops: of a gradient penalty with its weight
    gradients in eager PyTorch and here; None where that is not possible, for the reason in eager_refusal or refusal.
    uncounted: an operation of which PyTorch counts no FLOPs though it has products; "" if there is none.
    """

    calls: list[Call]
    way: str
    samples: str
    meet: str
    forward_flops: int
    eager_flops: int | None
    flops: int | None
    eager_refusal: str = ""
    refusal: str = ""
    uncounted: str = ""

    def __str__(self) -> str:
        rows = [("layer", "call", "MFLOP", "way")]
        rows += [(c.layer or "(critic)", c.function, _mega(c.flops), c.way) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for layer, function, count, way in rows:
            lines.append(f"{layer:{widths[0]}}  {function:{widths[1]}}  {count:>{widths[2]}}  {way}")
        unit = self.forward_flops
        eager = self._passes(self.eager_flops, self.eager_refusal)
        ours = self._passes(self.flops, self.refusal)
        lines += ["", f"the critic: {self.way}", f"samples: {self.samples}", "penalty with weight gradients:"]
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
