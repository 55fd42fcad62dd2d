"""Ctrl-C at every instruction of the code that merges."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: Whose instructions are interrupted.
FILES = ("snell/linear.py", "snell/merging.py", "snell/peft/common/layer.py", "snell/peft/common/base.py")
FILES += ("snell/peft/snell/embedding.py",)


class _Interrupt:
    """Raises KeyboardInterrupt before instruction ``countdown`` of those files, once."""

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.countdown -= 1
            if self.countdown < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def at_every_instruction(work: Callable[[], None]) -> Iterator[int]:
    """Run ``work``, interrupted one instruction later each time, until a run is whole; yields after each interrupt."""
    instruction = 0
    while True:
        before = sys.gettrace()
        sys.settrace(_Interrupt(instruction))
        try:
            work()
        except KeyboardInterrupt:
            pass
        else:
            return
        finally:
            sys.settrace(before)
        yield instruction
        instruction += 1
