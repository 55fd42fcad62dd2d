"""tau: the threshold that \\|K\\| of an entry must exceed to be kept.

``thresholds`` selects it for one layer, ``together`` for all layers of a model, and ``processes`` for a matrix split
over several processes. ``memo`` remembers thresholds by the content of the factors; ``held`` keeps those selected
together. ``columns`` has the smooth maxima of columns, for a softmax. ``radix`` selects by counting, for backends that
have no selection of their own.
"""

from snell.backends import AVAILABLE
from snell.competition import held, memo
from snell.competition.columns import smooth_max, smooth_max_backward
from snell.competition.thresholds import select
from snell.competition.together import refresh_thresholds

__all__ = ["forget", "refresh_thresholds", "select", "smooth_max", "smooth_max_backward"]


def forget() -> None:
    """Forget every threshold, on the host and on devices. The next call selects again."""
    memo.forget()
    held.forget()
    for backend in AVAILABLE.values():
        backend.forget()
