"""What a RED adapter is made of, as PEFT saves it beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from snell.peft.common.kind import kind
from snell.peft.common.targets import TargetsConfig

__all__ = ["RedConfig"]


@dataclass
class RedConfig(TargetsConfig):
    """A RED adapter: in each target, ``z = s * (W x + b) + c`` with two trained vectors ``s [out]`` and ``c [out]``.

    The vectors are float32 whatever the base's dtype (float64 where the base is). In bfloat16 a small step of an
    optimizer is rounded away around 1, where s starts. A fresh adapter is the identity, to the bit.

    Args:
        target_modules: Names of the modules to edit (a list: suffixes; a string: a regular expression), or
            ``"all-linear"``. None: the second linear layer of each feed-forward block, as in the paper, where the
            model's architecture is known (BERT, RoBERTa, GPT-2, T5, Llama, ViT and others).
        exclude_modules: Names, as above, that are left out of the targets.
        modules_to_save: Modules trained whole and saved with the adapter, such as a new classification head.
        layers_to_transform: Indices of the blocks to adapt, where not all.
        layers_pattern: Name of the list those indices count in, where it is not the usual one.
        fan_in_fan_out: Whether the targets store their weight [in, out]. Known by itself for Conv1D and Linear.
        init_weights: True: the identity. False: an edit that shows, for tests.

    Raises:
        ValueError: a setting that does not fit, naming it.

    Source: arXiv 2402.15179.
    """

    init_weights: bool = field(default=True, metadata={"help": "True: the identity; False: a visible edit, for tests."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = kind("RED")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False; got {self.init_weights!r}")
