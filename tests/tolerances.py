"""How far apart the samples of two backends may be that are both right."""

from __future__ import annotations

from fastsde import StepTable

NORMAL_ERROR = 4e-6  # of the noise contract


def noise_error(table: StepTable) -> float:
    """Returns how far apart two runs of a table may end whose normals differ by `NORMAL_ERROR`, but for the network.

    The difference of two states obeys the table's own recurrence: a row multiplies it by a, and by a + e p where D is
    not clamped; it adds |c| times the difference that D had in the row before, and |d| times that of the row's own
    normals. So the error of each draw, the prior's among them, counts as often as the later rows multiply it: for
    Euler-Maruyama on the VP-SDE some 20 to 200 times, for DDIM from t = 1 up to 1 / alpha(1) = 152 times.

    What the network makes of a different state is left out, so it must hardly depend on the state, or contract.
    """
    state, history = NORMAL_ERROR, 0.0
    for row in (table.row(k) for k in range(len(table))):
        factor = abs(row["a"] + row["e"] * row["p"])
        if table.clip is not None:
            factor = max(factor, abs(row["a"]))
        state, history = (
            factor * state + abs(row["c"]) * history + abs(row["d"]) * NORMAL_ERROR,
            abs(row["p"]) * state,
        )
    return state
