"""Selection rules, one file each. A file that calls `register` is all that a new rule takes: every module of
this folder is loaded, so its rule stands in `gatewright routers` and in the tests that go over all rules.
"""

from gatewright.parts.rules.registry import (
    RouterInfo,
    all_routers,
    build_router,
    register,
    router_info,
)
from gatewright.parts.rules.token_choice import TokenChoice, token_choice

__all__ = [
    "RouterInfo",
    "TokenChoice",
    "all_routers",
    "build_router",
    "register",
    "router_info",
    "token_choice",
]
