"""Conditions of this package's networks: the embedding of class labels, with one more for "no label"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LabelEmbedding", "check_conditions"]


class LabelEmbedding(nn.Embedding):
    """Embeds labels in [0, classes]; the last one, ``classes``, stands for no label, which is learned as well.

    Training without guidance never sees it, and its row keeps its initial value.

    Args:
        classes: the number of classes.
        width: the width of the embedding.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)
        self.classes = classes

    def forward(self, label: Tensor | None, like: Tensor | None = None) -> Tensor:
        """Maps labels ``[B]``, any integer dtype, to ``[B, width]``; None is no label for all rows of ``like`` ``[B]``.

        Raises:
            IndexError: for a label outside of [0, classes], on the CPU.
            TypeError, ValueError: for labels of another dtype or shape.
        """
        if label is None:
            assert like is not None
            return self.weight[-1].expand(len(like), -1)
        if label.is_floating_point() or label.is_complex():
            raise TypeError(f"label must be integers, got {label.dtype}")
        if label.ndim != 1:
            raise ValueError(f"label must have shape [B], got {list(label.shape)}")
        embedded: Tensor = super().forward(label.long())
        return embedded


def check_conditions(model: nn.Module, **given: tuple[Any, nn.Module | None]) -> None:
    """Raises TypeError for a condition that a network has no weights for.

    Args:
        given: by the condition's name, its value, and the module that embeds it.
    """
    for name, (value, embedding) in given.items():
        if value is not None and embedding is None:
            raise TypeError(f"{name} must be None for a {type(model).__name__} that was built without it, got a value")
