"""A tuner's member of PEFT's enum of tuner types."""

from __future__ import annotations

from peft.utils import PeftType

__all__ = ["kind"]


def kind(name: str) -> PeftType:
    """The member of that name, made where PEFT has none.

    PEFT has no call that adds one. ``register_peft_method`` takes names of members alone. A plain string in its place
    would do for PEFT 0.21, but 0.20 saves for ``peft_type in list(PeftType)`` alone, and both read
    ``peft_type.value``, as transformers does. Python's enums are not extended in public either.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
