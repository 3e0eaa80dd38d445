"""retrikt_ray: retrieval-based knowledge transfer from a large language model to a tiny student, on Ray.

    from retrikt_ray import run, RunConfig, Predictor, Knowledge, Client, AsyncClient

The names are loaded when they are first used: importing the package imports neither torch nor Ray.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrikt_ray.client import AsyncClient, Client
    from retrikt_ray.config import RunConfig
    from retrikt_ray.knowledge.knowledge import Knowledge
    from retrikt_ray.pipeline import run
    from retrikt_ray.predictor import Predictor

# Ray reads these once, at import. Usage statistics would need a network; the uv hook re-builds environments.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Knowledge", "Predictor", "RunConfig", "run"]
HOMES = {
    "AsyncClient": "retrikt_ray.client",
    "Client": "retrikt_ray.client",
    "Knowledge": "retrikt_ray.knowledge.knowledge",
    "Predictor": "retrikt_ray.predictor",
    "RunConfig": "retrikt_ray.config",
    "run": "retrikt_ray.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
