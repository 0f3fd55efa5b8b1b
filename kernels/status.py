"""How a step reports a value that is not finite: as 2 row + kind, with kinds in the order in which a row meets them."""

from __future__ import annotations

FINITE = 2**31 - 1  # while everything is finite
STATUS_KINDS = ("the network returned", "the state became")
