"""The tuner's member of PEFT's enum of tuner types.

PEFT registers, saves and reports on members of that enum alone, and has no call that adds one.
"""

from __future__ import annotations

from peft.utils import PeftType

__all__ = ["SNELL"]


def _member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


SNELL = _member("SNELL")
