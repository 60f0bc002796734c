"""What a user can put right; the commands of gpkernels say it the same way."""

from __future__ import annotations

from gpkernels.arguments import UserError

__all__ = ["UserError"]
