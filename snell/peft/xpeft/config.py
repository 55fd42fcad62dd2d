"""What masks over a bank are made of, as PEFT saves it beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from snell.initial import check_seed
from snell.peft.common.kind import kind
from snell.peft.common.targets import TargetsConfig
from snell.peft.snell.config import LARGEST_RANK, SnellConfig
from snell.peft.xpeft.bank import Source, random_source, trained_source

__all__ = ["XpeftConfig"]

UPDATES = ("lora", "snell")
MASKS = ("hard", "soft")
COMBINES = ("mean", "sum")
BANK_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The scale of LoRA's product of a random bank: the start then changes outputs by a few percent.
RANDOM_SCALE = 0.1


def _count(name: str, value: object, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} must be an int from 1{f' to {most}' if most else ''}; got {value!r}")


@dataclass
class XpeftConfig(TargetsConfig):
    """Masks over a bank of adapters: in each target, A = sum_i a_i A_i and B = sum_i b_i B_i, and W0 + dW(A, B).

    The bank is constant. A profile is two masks a layer, a and b, and nothing else is trained. Where the paper leaves
    a choice open, the setting says so.

    Args:
        bank: Folders of saved LoRA or SNELL adapters, of one rank and the same modules. None: a random bank, which
            ``bank_seed`` regenerates and which is never saved.
        num_adapters: N of a random bank; of a trained one it is the number of folders.
        bank_seed: What a random bank is drawn from.
        bank_dtype: float32, bfloat16 or float16: how the bank is kept in memory. Mixtures are float32.
        r: Rank of a random bank; a trained one has its own.
        masks: ``hard``: the k adapters of largest logits, with the softmax's gradient (straight-through). ``soft``:
            the softmax.
        k: How many adapters a hard mask chooses. None: half of them (open in what we could read of the paper).
        combine: Whether a hard mask's sums are divided by k: ``mean`` (then weights sum to 1, as soft ones do) or
            ``sum``. Open in the paper.
        update: ``lora``: dW = scale * B A^T. ``snell``: the kernel function and competition of A and B. A trained
            bank's is that of its adapters.
        scale: Factor of LoRA's product, or SNELL's scale. None: 1 for trained LoRA adapters, which bring their own
            scaling; 0.1 for a random bank; SNELL's default.
        sparsity, kernel, groups, gate: of SNELL's update, as in SnellConfig. A trained bank has its own.
        num_profiles: Profiles that are trained together, each with masks of its own. Forward then needs
            :func:`snell.peft.use_profiles`, which says whose each sample is.
        target_modules: Names of the modules, as in LoraConfig, or ``"all-linear"``. None: the second linear layer of
            each feed-forward block, one a block.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, fan_in_fan_out: as in SnellConfig.
        init_weights: True: all logits 0; a hard mask then chooses the first k. False: normal logits, for tests.

    Raises:
        ValueError, TypeError: a setting that does not fit, naming it.

    Source: arXiv 2401.16137.
    """

    bank: list[str] | None = field(default=None, metadata={"help": "Folders of saved adapters; None: a random bank."})
    num_adapters: int = field(default=100, metadata={"help": "Adapters of a random bank."})
    bank_seed: int = field(default=0, metadata={"help": "Seed of a random bank."})
    bank_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    r: int = field(default=8, metadata={"help": "Rank of a random bank."})
    masks: str = field(default="hard", metadata={"help": "hard (k-hot) or soft."})
    k: int | None = field(default=None, metadata={"help": "Adapters that a hard mask chooses; None: half."})
    combine: str = field(default="mean", metadata={"help": "mean or sum of the chosen adapters."})
    update: str = field(default="lora", metadata={"help": "lora or snell: what becomes of the mixed factors."})
    scale: float | None = field(default=None, metadata={"help": "Factor of LoRA's product, or SNELL's scale."})
    sparsity: float = field(default=0.9, metadata={"help": "As in SnellConfig."})
    kernel: str = field(default="piecewise_linear", metadata={"help": "As in SnellConfig."})
    groups: int = field(default=2, metadata={"help": "As in SnellConfig."})
    gate: str = field(default="soft", metadata={"help": "As in SnellConfig."})
    num_profiles: int = field(default=1, metadata={"help": "Profiles trained together."})
    init_weights: bool = field(default=True, metadata={"help": "True: logits of 0; False: visible ones, for tests."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = kind("XPEFT")
        if self.bank is not None:
            if isinstance(self.bank, str) or not self.bank:
                raise ValueError(f"bank must be a list of folders, at least one; got {self.bank!r}")
            self.bank = [str(folder) for folder in self.bank]
            self.num_adapters = len(self.bank)
        _count("num_adapters", self.num_adapters)
        _count("num_profiles", self.num_profiles)
        _count("r", self.r, LARGEST_RANK)
        check_seed(self.bank_seed, "bank_seed")
        choices = {"bank_dtype": tuple(BANK_DTYPES), "masks": MASKS, "combine": COMBINES, "update": UPDATES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.k is None:
            self.k = -(-self.num_adapters // 2)
        _count("k", self.k, self.num_adapters)
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False; got {self.init_weights!r}")
        self.make_up(None)

    @property
    def chosen(self) -> int | None:
        """How many adapters a mask chooses; None: it is soft."""
        return self.k if self.masks == "hard" else None

    def source(self) -> Source:
        """Where the layers' banks come from.

        Raises:
            ValueError: the folders hold no adapters that make a bank.
        """
        dtype = BANK_DTYPES[self.bank_dtype]
        if self.bank is not None:
            return trained_source(tuple(self.bank), dtype)
        averaged = (self.chosen or self.num_adapters) if self.combine == "mean" or self.masks == "soft" else 1
        return random_source(self.bank_seed, self.num_adapters, self.r, averaged, dtype)

    def make_up(self, source: Source | None) -> SnellConfig:
        """How mixed factors become an update: SNELL's settings, of which LoRA's product is one."""
        if source is not None and source.settings is not None:
            return source.settings
        trained = self.bank is not None
        if self.update == "lora" or trained:
            scale = self.scale if self.scale is not None else 1.0 if trained else RANDOM_SCALE
            return SnellConfig(r=self.r, sparsity=0.0, kernel="linear", groups=1, scale=scale)
        shared = {name: getattr(self, name) for name in ("r", "sparsity", "kernel", "groups", "gate")}
        return SnellConfig(**shared, scale=self.scale)  # type: ignore[arg-type]
