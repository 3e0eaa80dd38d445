"""retrikt_ray: retrieval-based knowledge transfer from a large language model to a tiny student, on Ray."""

import os

# Ray reads these once, at import. Usage statistics would need a network; the uv hook re-builds environments.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

__version__ = "0.1.0"
