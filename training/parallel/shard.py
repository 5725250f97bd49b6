"""FSDP2 (torch's fully_shard) over a model: what devices along data would hold alike is divided among them.

Each block is gathered before it runs and given back after it, forward and backward; embedding, norm and head stay
gathered from the beginning of a forward pass to the end of its backward pass. Gradients are added up, not averaged, as
the loss is a share of the whole step's. Quantised weights are divided and gathered as they are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from model import Block
from quantize import quantized_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from model import Transformer


def as_parameters(model: nn.Module) -> None:
    """Make frozen parameters of what quantised layers store, with a row for each row of the weight."""
    for layer in quantized_layers(model):
        for name, tensor in layer.by_rows().items():
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def shard(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide a model among the devices of a mesh of one dimension. It may be on "meta", and each piece filled then."""
    for block in model.model.layers:
        if isinstance(block, Block):  # not what stands in the place of another stage's
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # plain sums: gloo has no others
    register_fsdp_forward_method(model, "hidden_states")  # what is called of it first: the head's weight is there then
    if all(name.startswith("lm_head.") for name, p in model.named_parameters() if p.requires_grad):
        # Then hidden states need no gradient, by whose coming FSDP learns of the head's; the losses do. If both needed
        # one it would gather what is outside of the blocks twice.
        register_fsdp_forward_method(model, "target_losses")


def give_back(model: nn.Module) -> None:
    """Leave the pieces alone in memory, as after a backward pass: before weights are read, saved or stepped."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
