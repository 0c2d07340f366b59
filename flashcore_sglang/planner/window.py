"""Policy window: a decode step reads the first and the most recent pages of a request.

After StreamingLLM (arXiv 2309.17453). Requests of at most sink + recent pages are read whole. The page lists stand in
the sparse part of ``kv_indices`` and are written by the plan op; keys keep their rotary positions.
"""

from __future__ import annotations

from flashcore_sglang.planner.planner import Planner


class Window(Planner):
    """All of it is in the plan op."""
