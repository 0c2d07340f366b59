"""Policy exact: every request reads all its pages; pages that requests share are read once.

Two requests that hold the same page in the same column of their page tables want the same keys there, so sharing is
found by comparing page-table rows on the device (csrc/plan/share.h); what does not pay stays one row a request.
"""

from __future__ import annotations

from flashcore_sglang.planner.planner import Planner


class Exact(Planner):
    """All of it is in the plan op."""
