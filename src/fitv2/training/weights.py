"""The weights of a run: the float32 master, their EMA, and what computes; in one process or many."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import World, gather, local, part
from fitv2.training.lora import adapted, factors, merged, without_lora


class Weights:
    """A model in training, its parameters in float32 whatever it computes in.

    In one process `model` is `master`, or a copy of it in bfloat16. Of several processes, every `fsdp_size`
    hold the parameters, the EMA and the state of the optimizer once between them (FSDP2; 1: each
    holds all, as in DDP), and gradients are added up in float32 while the backward pass goes on.

    Raises UserError when the processes are no multiple of `fsdp_size`.
    """

    def __init__(
        self, master: FiT, device: torch.device, dtype: torch.dtype, world: World, fsdp_size: int
    ) -> None:
        if world.size % fsdp_size:
            raise UserError(
                f"`fsdp_size` {fsdp_size} needs a multiple of {fsdp_size} processes; there are {world.size}"
            )
        self.master = master
        lora = [*adapted(master)]
        # With a LoRA the EMA is a plain model, with the average of B and that of A in its matrices.
        self.ema = (without_lora(master) if lora else deepcopy(master)).eval().requires_grad_(False)
        self.model = self.master
        self.sums_last = False
        if world.size > 1:
            mesh = _mesh(device, world, fsdp_size)
            # cast_forward_inputs: times and angles stay in float32.
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            _divide(self.master, mesh, mp_policy=policy, reshard_after_forward=fsdp_size > 1)
            # The EMA model never runs backward: FSDP must reshard after forward, or it keeps old weights.
            _divide(self.ema, mesh, reshard_after_forward=True)
            # With whole weights everywhere, parts of a step need not be summed one by one.
            self.sums_last = fsdp_size == 1
        else:
            self.master.to(device)
            self.ema.to(device)
            if dtype != torch.float32:
                # Not FiT.to: diffusers' warns of modules that there are none of.
                self.model = nn.Module.to(deepcopy(self.master), dtype)
        # Each parameter that is trained, as this process holds it: what changes, and what computes.
        every = zip(self.master.parameters(), self.model.parameters(), strict=True)
        self.trained = [weights for weights in every if weights[0].requires_grad]
        average = dict(self.ema.named_parameters())
        trained = factors(self.master)
        self.adapter = {name: tensor.detach().clone() for name, tensor in trained.items()}
        self.changed = [
            (average[f"{name}.weight"], layer, *(self.adapter[f"{name}.lora_{part}.weight"] for part in "BA"))
            for name, layer in lora
        ]
        self.averaged = [
            (average[name], weight) for name, weight in self.master.named_parameters()
            if weight.requires_grad and name in average
        ]  # fmt: skip
        self.averaged += [(mean, trained[name]) for name, mean in self.adapter.items()]

    def before_part(self, last: bool) -> None:
        """Say whether a part of a step is its last."""
        if self.sums_last:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)

    def collect(self) -> None:
        """Add the gradients of the model that computes to those of the float32 weights."""
        if self.model is self.master:
            return
        for weight, computed in self.trained:
            assert computed.grad is not None
            gradient, computed.grad = computed.grad.float(), None
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm of at most this; returns their norm before."""
        norm = nn.utils.clip_grad_norm_([weight for weight, _ in self.trained], max_norm)
        return float(gather(norm))

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of all weights."""
        return float(gather(nn.utils.get_total_norm(list(self.master.parameters()))))

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the EMA towards the new weights, and copy these to the model that computes."""
        if self.averaged:
            ema, weights = ([local(w) for w in held] for held in zip(*self.averaged, strict=True))
            torch._foreach_lerp_(ema, weights, 1 - decay)
        for average, layer, up, down in self.changed:
            local(average).copy_(merged(layer, up, down))
        if self.model is not self.master:
            weights, computing = ([local(w) for w in held] for held in zip(*self.trained, strict=True))
            torch._foreach_copy_(computing, weights)

    def gather_ema(self, world: World) -> FiT | None:
        """A copy of the EMA model in the memory of the host, in the first process; None in the others.

        All processes have to ask.
        """
        copies = {}
        for name, weight in self.ema.named_parameters():
            everything = gather(weight)
            if world.first:
                copies[name] = everything.to("cpu", copy=True)
        if not world.first:
            return None
        with torch.device("meta"):
            model = FiT(**asdict(self.ema.architecture))
        model.load_state_dict(copies, assign=True)
        return model

    def gather_adapter(self, world: World) -> dict[str, Tensor]:
        """A copy of the average of the LoRA on the host, in the first process. All processes have to ask."""
        found = {name: gather(mean) for name, mean in self.adapter.items()}
        return {name: mean.to("cpu", copy=True) for name, mean in found.items()} if world.first else {}

    @torch.no_grad()
    def restore(self, ema: FiT, adapter: Mapping[str, Tensor] | None = None) -> None:
        """Take over an EMA, and that of a LoRA [default: what it is]; the weights were read in place."""
        for name, weight in factors(self.master).items():
            mean = self.adapter[name]
            local(mean).copy_(local(weight) if adapter is None else part(adapter[name], mean))
        for mine, gathered in zip(self.ema.parameters(), ema.parameters(), strict=True):
            local(mine).copy_(part(gathered, mine))
        if self.model is not self.master:
            for computing, weight in zip(self.model.parameters(), self.master.parameters(), strict=True):
                computing.copy_(weight)


def _mesh(device: torch.device, world: World, fsdp_size: int) -> DeviceMesh:
    """The processes as (copies of the model, processes that share one)."""
    mesh = init_device_mesh(
        device.type, (world.size // fsdp_size, fsdp_size), mesh_dim_names=("copies", "shards")
    )
    for group in mesh.get_all_groups():
        _set_pg_timeout(world.patience, group)
    if world.size == fsdp_size:
        return mesh["shards"]
    mesh["copies", "shards"]._flatten("all")  # so that a sum over both is one
    return mesh


def _divide(model: FiT, mesh: DeviceMesh, **options: Any) -> None:
    """Block by block, so that one block at a time is whole."""
    for module in (*model.blocks, model):
        sharded = cast(FSDPModule, fully_shard(module, mesh=mesh, **options))
        # The loss is divided by the images of all processes: gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def compile_blocks(model: FiT) -> None:
    """Compile each block's forward pass once, for any number of tokens and images."""
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
