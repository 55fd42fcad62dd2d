"""tau: everything about the threshold that an entry's \\|K\\| must exceed to survive.

``thresholds`` selects it for one layer, ``together`` for all layers of a model (``held`` until they change), and
``processes`` for a matrix that several processes hold. ``memo`` remembers it by what the factors contain. ``radix``
counts where a backend does not select.
"""

from snell.backends import AVAILABLE
from snell.competition import held, memo
from snell.competition.thresholds import select
from snell.competition.together import refresh_thresholds

__all__ = ["forget", "refresh_thresholds", "select"]


def forget() -> None:
    """Forget every threshold, on the host and on devices, so that the next call selects anew."""
    memo.forget()
    held.forget()
    for backend in AVAILABLE.values():
        backend.forget()
