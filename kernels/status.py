"""How a step tells that something was not finite: by 2 row + the kind, in the order in which a row meets them."""

from __future__ import annotations

FINITE = 2**31 - 1  # while all is finite
STATUS_KINDS = ("the network returned", "the state became")
