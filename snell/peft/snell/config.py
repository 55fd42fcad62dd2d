"""What a SNELL adapter is made of, as PEFT saves it beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.utils.other import get_pattern_key

from snell.initial import check_seed
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.peft.common.kind import kind
from snell.peft.common.targets import TargetsConfig
from snell.spec import Spec

__all__ = ["SnellConfig"]

INIT_WEIGHTS = (True, False, "identity")
COMPETITIONS = ("layer", "model", "budget")
BIASES = ("none", "all", "snell_only")

#: A larger rank makes the factors larger than any layer's weight; the allocator would say so in its own words.
LARGEST_RANK = 65536


@dataclass
class SnellConfig(TargetsConfig):
    """A SNELL adapter: in each target, ``y = x (W0 + dW)^T + b`` with ``dW = K * gate(|K|)``, ``K = kappa(B, A)``.

    Args:
        r: Columns of the factors, A [in, r] and B [out, r]; a multiple of ``groups``. More capacity and
            trainable parameters, r * (in + out) a layer; time per step grows with it less than linearly.
        sparsity: Share of dW's entries that are zero, in [0, 1). The entries of largest \\|K\\| survive, and they
            alone get gradients; who survives is settled anew at every step. 0 switches the competition off.
        kernel: Kernel function kappa: ``piecewise_linear`` (the paper's), ``linear`` (LoRA's merge), ``sigmoid``,
            ``rbf`` or ``mixture`` (SNELLA's). A nonlinear one gives dW more rank than r.
        groups: Groups the rank axis splits into for ``piecewise_linear`` and ``mixture``; their distances take
            alternating signs.
        gate: What a survivor is multiplied by: ``soft`` (\\|K\\| - threshold, the paper's), ``magnitude`` (\\|K\\|,
            the published code's) or ``hard`` (1: plain top-k).
        scale: Size of the kernel function's scalar parameters at the start, and so of dW: it acts on the update
            as a learning rate does. None: as the gate says, 3 for ``soft`` and ``magnitude``, 0.1 for ``hard`` and
            without sparsity.
        train_theta: Whether those scalars are trained. None: as the kernel function says (``sigmoid``, ``rbf``,
            ``mixture``).
        dropout: Probability of dropping an input of the update, in training, the base layer's input staying
            whole. Above 0 training costs one more multiplication by the base weight per layer.
        target_modules: Names of the modules to adapt (a list: suffixes; a string: a regular expression), or
            ``"all-linear"``: every linear layer but the output head. None: PEFT's choice for LoRA on this model.
        exclude_modules: Names, as above, that are left out of the targets.
        modules_to_save: Modules trained whole and saved with the adapter, such as a new classification head.
        trainable_token_indices: Tokens whose rows of the input embedding are trained whole, as a list; or a dict of
            such lists by the name of an embedding. Not with that embedding among modules_to_save.
        layer_replication: Ranges [start, end) of the model's blocks that it is made of anew, in PEFT's form: weights
            are shared, adapters are not. Such a model cannot be merged.
        layers_to_transform: Indices of the blocks to adapt, where not all.
        layers_pattern: Name of the list those indices count in, where it is not the usual one.
        rank_pattern: Rank of the modules whose name matches a regular expression, in place of ``r``.
        sparsity_pattern: Likewise in place of ``sparsity``.
        competition: Among whom entries compete. ``layer``: each layer keeps the same share of its own. ``model``: all
            layers compete for one total, by \\|K\\| over a size that depends on the layer's shape, so that a layer
            may keep more than another; about the same share at the start. ``budget``: a
            :class:`snell.training.SparsityBudget` divides the total among the layers while they train, and ends at
            ``sparsity``. The last two go without ``sparsity_pattern``.
        bias: Which biases of the base are trained too: ``none``, ``all`` or ``snell_only`` (those of the targets).
            With any but ``none`` a disabled adapter no longer gives the base model's outputs.
        fan_in_fan_out: Whether the targets store their weight [in, out]. Known by itself for Conv1D and Linear.
        init_weights: True: factors drawn as published. dW is then small, but not 0: a fresh adapter does not give
            the base model's outputs exactly (a disabled, unmerged or deleted one does). ``"identity"``: a fresh
            adapter gives them to the bit, and trains: the layer subtracts the constant dW of its first factors,
            drawn anew from ``init_seed`` and never saved; up to 2 (1 - s) m n entries of the weight then change.
            (With ``sparsity=0`` and ``linear`` or ``sigmoid`` B starts at 0 instead, as in LoRA.) False: an
            update that shows, for tests: normal factors, halved until \\|K\\| is at most about 1/2.
        init_seed: What ``"identity"`` draws its factors from, and must draw them from again when the adapter is
            loaded: so not torch's generator, which every process may have in another state.

    Raises:
        ValueError, TypeError: a setting that does not fit, naming it.

    Source: arXiv 2411.01800.
    """

    r: int = field(default=32, metadata={"help": "Columns of the factors; a multiple of groups."})
    sparsity: float = field(default=0.9, metadata={"help": "Share of the update's entries that are zero, in [0, 1)."})
    kernel: str = field(
        default="piecewise_linear",
        metadata={"help": "Kernel function: piecewise_linear, linear, sigmoid, rbf or mixture."},
    )
    groups: int = field(default=2, metadata={"help": "Groups the rank axis splits into."})
    gate: str = field(default="soft", metadata={"help": "What survivors are multiplied by: soft, magnitude or hard."})
    scale: float = field(  # None until __post_init__ settles it
        default=None,  # type: ignore[assignment]
        metadata={"help": "Size of the kernel function's scalars at the start; None: as the gate says."},
    )
    train_theta: bool | None = field(
        default=None, metadata={"help": "Whether those scalars are trained; None: as the kernel function says."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the update's input, in training."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of modules by regular expression, in place of r."}
    )
    sparsity_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Sparsities of modules by regular expression, in place of sparsity."}
    )
    competition: str = field(default="layer", metadata={"help": "Among whom entries compete: layer, model or budget."})
    bias: str = field(default="none", metadata={"help": "Biases trained too: none, all or snell_only."})
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True: as published; 'identity': starts as the base; False: a visible update, for tests."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose rows of the embedding are trained; a dict by its name."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Ranges [start, end) of blocks that the model is made of anew."}
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of the factors of an identity start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = kind("SNELL")
        for name in ("rank_pattern", "sparsity_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a dict, values by regular expression; got {getattr(self, name)!r}")
        if self.scale is None:  # settled here, so that a saved adapter says which
            self.scale = self.spec(self.r, self.sparsity).default_scale
        # Whatever a pattern selects must stand as well as the defaults do.
        for rank in (self.r, *self.rank_pattern.values()):
            for sparsity in (self.sparsity, *self.sparsity_pattern.values()):
                self.spec(rank, sparsity).initial_theta(self.scale)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1); got {self.dropout!r}")
        if self.train_theta not in (None, True, False):
            raise ValueError(f"train_theta must be True, False or None; got {self.train_theta!r}")
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"init_weights must be one of {INIT_WEIGHTS}; got {self.init_weights!r}")
        check_seed(self.init_seed)
        if self.competition not in COMPETITIONS:
            raise ValueError(f"competition must be one of {', '.join(COMPETITIONS)}; got {self.competition!r}")
        if self.competition != "layer" and (self.sparsity_pattern or not self.sparsity):
            wrong = "sparsity_pattern must be empty" if self.sparsity_pattern else "sparsity must be above 0"
            raise ValueError(f"{wrong} with competition={self.competition!r}: all layers compete for one total")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}; got {self.bias!r}")

    def spec(self, rank: int, sparsity: float) -> Spec:
        """The validated make-up of one layer's update."""
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"r must be an int from 1 to {LARGEST_RANK}; got {rank!r}")
        return Spec(rank, sparsity, self.kernel, self.groups, self.gate)

    @property
    def trains_theta(self) -> bool:
        """Whether the kernel function's scalars, if it has any, are trained and saved."""
        return KERNEL_FUNCTIONS[self.kernel].trains_theta if self.train_theta is None else self.train_theta

    def spec_of(self, module: str) -> Spec:
        """The make-up of the update of the module of this name, by the patterns."""
        return self.spec(
            _by_pattern(self.rank_pattern, module, self.r), _by_pattern(self.sparsity_pattern, module, self.sparsity)
        )


def _by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(list(pattern), module), default)
