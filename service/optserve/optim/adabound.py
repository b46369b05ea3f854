"""AdaBound that can take another group later."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer


class AdaBound(pytorch_optimizer.AdaBound):
    """pytorch_optimizer's AdaBound (Luo et al., arXiv 1902.09843), bit for bit.

    The library notes each group's first lr in its constructor only, and fails at the first step
    after add_param_group.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Note the first lr of the new group as well."""
        super().add_param_group(param_group)
        if hasattr(self, "base_lrs"):  # the constructor makes the list after its own groups
            self.base_lrs.append(self.param_groups[-1]["lr"])
