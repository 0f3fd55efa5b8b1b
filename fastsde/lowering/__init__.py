"""Networks become programs that whole-trajectory kernels run."""

from .divergence import WithDivergence, with_divergence
from .lowered import Lowered, described, is_shared, lower
from .program import Instruction, Part, Program, Vector, Vectors, evaluate
from .recording import NotLowered
from .trained import Source

__all__ = [
    "Instruction",
    "Lowered",
    "NotLowered",
    "Part",
    "Program",
    "Source",
    "Vector",
    "Vectors",
    "WithDivergence",
    "described",
    "evaluate",
    "is_shared",
    "lower",
    "with_divergence",
]
