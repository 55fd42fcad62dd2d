"""What each of two processes does; torchrun starts this file with the names of functions."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from small import batch, close, competing, factors, mixture, model, optimizer, red, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from snell import backends, competition, functional
from snell.competition.processes import select_among
from snell.distributed import Split
from snell.peft import AdaptedLinear, SnellConfig
from snell.spec import Spec
from snell.training import SelectiveFreezing, cka_importance


def everywhere(path: str | None) -> str:
    """The first process's value, on all of them."""
    box = [path]
    dist.broadcast_object_list(box, src=0)
    return str(box[0])


def alone(make: Callable[[], PeftModel] = model) -> tuple[list[float], PeftModel]:
    """The run of one process that the others are compared with."""
    module = make()
    return train(module, batch()), module


def assert_losses(ours: list[float], theirs: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def ddp(make: Callable[[], PeftModel] = model) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    losses, single = alone(make)
    module = make()
    wrapped = nn.parallel.DistributedDataParallel(module)
    assert_losses(train(wrapped, batch(rank, processes), processes), losses)
    close(factors(module), factors(single))


def red_ddp() -> None:
    ddp(red)


def mixture_ddp() -> None:
    ddp(mixture)


def competing_ddp() -> None:
    ddp(competing)


def _sharded(make: Callable[[], PeftModel] = model, **policy) -> PeftModel:
    module = make()
    for layer in module.base_model.model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(module, **policy)
    return module


def fsdp(make: Callable[[], PeftModel] = model) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    losses, single = alone(make)
    module = _sharded(make)
    assert_losses(train(module, batch(rank, processes), processes), losses)
    close({key: p.full_tensor() for key, p in factors(module).items()}, factors(single))

    # The usual distributed state dict: saved sharded, loaded into another sharded model, and trained on.
    options = StateDictOptions(ignore_frozen_params=True)
    folder = everywhere(tempfile.mkdtemp() if rank == 0 else None)
    weights, state = get_state_dict(module, optimizer(module), options=options)
    assert weights.keys() == factors(single).keys()
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    again = _sharded(make)
    steps = optimizer(again)
    weights, state = get_state_dict(again, steps, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(
        again, steps, model_state_dict=weights, optim_state_dict=state, options=StateDictOptions(strict=False)
    )
    ours, theirs = factors(again), factors(module)
    assert all(torch.equal(ours[key].full_tensor(), theirs[key].full_tensor()) for key in theirs)


def red_fsdp() -> None:
    fsdp(red)


def mixture_fsdp() -> None:
    fsdp(mixture)


def fsdp_mixed_precision() -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    module = _sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    losses = train(module, batch(rank, processes), processes)
    # Weights and activations keep 8 bits, and so does the loss; the factors keep all of theirs.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone()[0]), rtol=2**-6, atol=0)
    assert all(p.dtype == torch.float32 for p in factors(module).values())


def _freezing(module: nn.Module, **settings) -> tuple[SelectiveFreezing, list[float]]:
    """Three steps, in each of which adapters freeze; a distributed model takes this process's share of the batch."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    settings = {"share": 0.5, "initial": 0.2, "warmup": 0.0, "end": 1.0, **settings}
    steps, distributed = optimizer(module), not isinstance(module, PeftModel) or hasattr(module, "reshard")
    frozen, losses = SelectiveFreezing(module, steps, batch(), steps=4, **settings), []
    for i in (1, 2, 3):
        loss = module.train()(**(batch(rank, processes) if distributed else batch())).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        assert frozen.check(i)
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if distributed:
        dist.all_reduce(mean)
        mean /= processes
    return frozen, mean.tolist()


def _agree(frozen: SelectiveFreezing) -> None:
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, frozen.state_dict())
    assert all(state == states[0] for state in states)


def freezing_under_ddp() -> None:
    single, expected = _freezing(model())
    frozen, losses = _freezing(nn.parallel.DistributedDataParallel(model(), find_unused_parameters=True))
    _agree(frozen)
    assert frozen.frozen.keys() == single.frozen.keys()
    assert frozen.folded == single.folded == list(single.frozen)
    assert_losses(losses, expected)
    close(factors(frozen.model), factors(single.model))

    # Where processes would decide otherwise, the first one's importances count.
    def own(output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return cka_importance(output, change) if dist.get_rank() == 0 else torch.rand(())

    wrapped = nn.parallel.DistributedDataParallel(model(), find_unused_parameters=True)
    disputed, _ = _freezing(wrapped, importance=own)
    _agree(disputed)
    assert disputed.frozen.keys() == frozen.frozen.keys()
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        _freezing(nn.parallel.DistributedDataParallel(model()))


def freezing_under_fsdp() -> None:
    single, expected = _freezing(model(), fold=False)
    module = _sharded(reshard_after_forward=False)  # a calibration pass leaves the parameters gathered
    frozen, losses = _freezing(module)
    _agree(frozen)
    assert frozen.frozen.keys() == single.frozen.keys()
    assert frozen.folded == []  # no process holds the whole weight
    assert_losses(losses, expected)
    close({key: p.full_tensor() for key, p in factors(module).items()}, factors(single.model))
    gone = {p for name in frozen.frozen for p in frozen.adapters[name].parameters()}
    module(**batch()).loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in gone)
    assert any(p.grad is not None for p in module.parameters())
    assert not gone & frozen.optimizer.state.keys()
    with pytest.raises(ValueError, match="use fully_shard"):
        _freezing(FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=True))


def selection() -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))
    for kernel, groups in (("piecewise_linear", 2), ("linear", 1), ("sigmoid", 1), ("rbf", 1)):
        for m, n, sparsity in ((33, 20, 0.9), (7, 41, 0.5), (64, 64, 0.999)):
            torch.manual_seed(m * n)
            A, B = torch.randn(n, 4), torch.randn(m, 4)
            theta = torch.tensor({"linear": [], "piecewise_linear": [0.1, -0.1]}.get(kernel, [0.1, 1.0, -0.1]))
            spec = Spec(4, sparsity, kernel, groups)
            whole = functional.select_threshold(A, B, theta, sparsity=sparsity, kernel=kernel, groups=groups)
            for pieces in ((A, B.chunk(processes)[rank]), (A.chunk(processes)[rank], B)):
                competition.forget()  # or the second cut is remembered from the first
                tau = select_among(mesh.get_group(), pieces, A, B, theta, spec)
                assert torch.equal(tau, whole), (kernel, m, n, tau, whole)


def _parallel(module: nn.Module, suffix: str = "") -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {}
    for i in range(2):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{i}.{name}{suffix}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{i}.{name}{suffix}"] = RowwiseParallel()
    return parallelize_module(module, mesh, plan)


def splits() -> None:
    for name in sorted(backends.AVAILABLE.keys() - {"triton"}):
        with backends.use(name):
            _splits(Spec(4, 0.5), [0.3, -0.2])
            # Smooth maxima of rows that are split are not those of one process to the bit.
            _splits(Spec(4, 0.5, "mixture"), [0.3, -0.2, 1.5, 0.1, 0.6], tolerance=1e-5)


def _splits(spec: Spec, theta: list[float], tolerance: float = 0.0) -> None:
    """Where the processes' pieces are not of one size, or one has none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape in ((6, 4), (7, 4), (4, 9), (1, 5), (5, 1)):
        torch.manual_seed(shape[0])
        weight, G = torch.randn(shape), torch.randn(shape)
        leaves = [torch.randn(shape[1], 4), torch.randn(shape[0], 4), torch.tensor(theta)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        whole = functional.dense(functional.update(*leaves, spec))
        grads = torch.autograd.grad(whole, leaves, G)
        for axis in (0, 1):
            sharded = distribute_tensor(weight, mesh, [Shard(axis)])
            split = Split.of(sharded)
            assert split.axis == axis
            held = (split.held,) if axis == 0 else (slice(None), split.held)
            assert torch.equal(weight[held], sharded.to_local()), (shape, split)
            competition.forget()
            piece = functional.dense(split.update(*leaves, spec))
            torch.testing.assert_close(piece, whole[held], rtol=tolerance, atol=tolerance)
            for ours, theirs in zip(torch.autograd.grad(piece, leaves, G[held]), grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert Split.of(distribute_tensor(weight, mesh, [Replicate()])) is None
    assert Split.of(weight) is None


def tensor_parallel() -> None:
    losses, single = alone()
    untouched = model()
    layers = {key: m for key, m in untouched.named_modules() if isinstance(m, AdaptedLinear)}

    module = model()
    _parallel(module.base_model.model, ".base_layer")
    splits = set()
    for key, layer in module.named_modules():
        if isinstance(layer, AdaptedLinear):
            split = Split.of(layer.base_layer.weight)
            splits.add(split.axis)
            # Every process finds the bits of the layer that is not split.
            assert torch.equal(layer._update("default").tau, layers[key]._update("default").tau), key
    assert splits == {0, 1}
    assert_losses(train(module, batch()), losses)
    close(factors(module), factors(single))

    # Merged, each process's piece of the weight is that piece of the merged whole; and it comes out again.
    module.load_state_dict({**module.state_dict(), **factors(single)})
    before = {key: p.to_local().clone() for key, p in module.named_parameters() if hasattr(p, "to_local")}
    module.merge_adapter()
    single.merge_adapter()
    merged = dict(single.named_parameters())
    for key, p in module.named_parameters():
        if hasattr(p, "to_local"):
            assert torch.equal(p.full_tensor(), merged[key]), key
    module.unmerge_adapter()
    assert all(torch.equal(p.to_local(), before[key]) for key, p in module.named_parameters() if key in before)


def _trained_in_parallel(make: Callable[[], PeftModel]) -> tuple[PeftModel, PeftModel]:
    """The model split over the processes and the whole one, trained alike."""
    losses, single = alone(make)
    module = make()
    _parallel(module.base_model.model, ".base_layer")
    assert_losses(train(module, batch()), losses)
    close(factors(module), factors(single))
    return module, single


def mixture_tensor_parallel() -> None:
    """The softmax of a layer whose rows are split spans the processes."""
    _trained_in_parallel(mixture)


def tensor_parallel_before_peft() -> None:
    base = _parallel(model().unload())
    torch.manual_seed(dist.get_rank())  # the factors agree though the processes' generators do not
    module = get_peft_model(base, SnellConfig(r=4, target_modules="all-linear", init_weights=False, scale=0.1))
    twin = get_peft_model(model().unload(), copy.deepcopy(module.peft_config["default"]))
    twin.load_state_dict(factors(module), strict=False)
    assert_losses(train(module, batch()), train(twin, batch()))
    close(factors(module), factors(twin))


def identity_start() -> None:
    """Processes whose generators differ draw the same start, and train from it as one process does."""
    rank, processes = dist.get_rank(), dist.get_world_size()

    def fresh() -> PeftModel:
        base = model().unload()
        torch.manual_seed(rank)
        settings = {"init_weights": "identity", "gate": "hard", "scale": 1.0}
        return get_peft_model(base, SnellConfig(r=4, target_modules="all-linear", **settings))

    single, base = fresh(), model().unload()
    assert torch.equal(single(**batch()).logits, base(**batch()).logits)
    losses = train(single, batch())
    assert losses[-1] < losses[0] - 1e-2
    assert_losses(train(nn.parallel.DistributedDataParallel(fresh()), batch(rank, processes), processes), losses)
    sharded = _sharded(fresh)
    assert_losses(train(sharded, batch(rank, processes), processes), losses)
    close({key: p.full_tensor() for key, p in factors(sharded).items()}, factors(single))
    split = fresh()
    _parallel(split.base_model.model, ".base_layer")
    with split.disable_adapter():
        off = split(**batch()).logits
    assert torch.equal(split(**batch()).logits, off)
    assert_losses(train(split, batch()), losses)
    close(factors(split), factors(single))


def red_tensor_parallel() -> None:
    module, single = _trained_in_parallel(red)

    # Merged, each process holds its piece of the merged weight, and of a bias that there was not.
    module.load_state_dict({**module.state_dict(), **factors(single)})
    before = {key: p.to_local().clone() for key, p in module.named_parameters() if hasattr(p, "to_local")}
    module.merge_adapter()
    single.merge_adapter()
    merged, ours = dict(single.named_parameters()), dict(module.named_parameters())
    assert merged.keys() == ours.keys()
    assert all(f"{key.removesuffix('.weight')}.bias" in merged for key in before)
    for key, p in ours.items():
        if hasattr(p, "to_local"):
            assert torch.equal(p.full_tensor(), merged[key]), key
    with torch.no_grad():
        torch.testing.assert_close(module(**batch()).logits, single(**batch()).logits, rtol=1e-4, atol=1e-5)
    module.unmerge_adapter()
    after = {key: p.to_local() for key, p in module.named_parameters() if hasattr(p, "to_local")}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def other_layouts_are_refused() -> None:
    for module in (model(), red()):
        mesh, name = init_device_mesh("cpu", (dist.get_world_size(),)), "model.layers.0.mlp.up_proj"
        plan = {f"{name}.base_layer": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(module.base_model.model, mesh, plan)
        with pytest.raises(ValueError, match="default layouts"):
            module.base_model.model.get_submodule(name)(torch.randn(2, 24))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for work in sys.argv[1:]:
            globals()[work]()
            if dist.get_rank() == 0:
                print("done:", work, flush=True)
    finally:
        dist.destroy_process_group()
