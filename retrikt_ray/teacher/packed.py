"""Linear layers of a frozen model on a CPU, their weights laid out once in the blocks that oneDNN multiplies by.

PyTorch lays them out anew at every call, which takes half the time of a product with a batch of a few dozen rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 64  # the batch that the layout is chosen for; any other works, too


class PackedLinear(nn.Module):
    """`nn.Linear` without gradients. (..., in) -> (..., out)"""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return packed


def pack(model: nn.Module) -> None:
    """Replace the model's linear layers in place, where this CPU and build of PyTorch can; elsewhere do nothing. It can only be run then, not trained."""
    weight = next(model.parameters())
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
