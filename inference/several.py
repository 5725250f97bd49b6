"""Several adapters over one base that is in memory once: each row of a batch goes through its own.

`put_adapters` puts a `SeveralLinear` in the place of each linear layer that any of the adapters is on. `use` says which
adapter each row of the next pass has: adapters are numbered from 1 in the order in which they are given, and 0 is the
base alone. A decoder calls it before each pass, with the numbers that a cache keeps for its rows (kv_cache.py,
slots.py). Nothing is merged, and no weights are moved when a row has another adapter than the row before it.

Adapters may differ in rank, alpha, kind and layers. The idea of one product with the base for rows of all adapters is
that of Punica (Chen et al. 2023, arXiv 2310.18547) and S-LoRA (Sheng et al. 2023, arXiv 2311.03285); theirs gather each
row's matrices, ours are laid end to end.

Shapes: B rows, R the sum of the adapters' ranks, numbers up to K adapters.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.adapter import put
from experts import Experts
from lora import Adapter, DoRALinear, LoRALinear, adapters
from model import Transformer
from shell.cli import UserError
from weights import peft_format

BASE = "base"  # the name of the base alone, which no adapter may have
LOW_RANK = (LoRALinear, DoRALinear)  # what `SeveralLinear.low_rank` computes. Exact types: a subclass may do otherwise


class Choice:
    """Which adapter each row has: `index` (B,) int64, in the order of a pass's rows; or (1,), for all that there are.

    All layers of a model look at the same one. Until something is chosen it is the first adapter.
    """

    def __init__(self, names: list[str], device: torch.device | str):
        self.names = [BASE, *names]
        self.default = torch.ones(1, dtype=torch.int64, device=device)
        self.index = self.default

    @property
    def every(self) -> Tensor:
        """The number of each choice that there is: (K + 1,)."""
        return torch.arange(len(self.names), device=self.default.device)


def choice_of(model: nn.Module) -> Choice | None:
    """The `Choice` of a model with several adapters, else None."""
    return getattr(model, "choice", None)


def use(model: nn.Module, index: Tensor | None) -> None:
    """Let the rows of the next passes have the adapters `index` (B,) or (1,); None for the first one.

    Of a model with one adapter, or none, nothing is chosen.
    """
    if (choice := choice_of(model)) is not None:
        choice.index = choice.default if index is None else index


class SeveralLinear(Adapter):
    """In the place of a linear layer: the layer, once, and those adapters that are over it.

    y = base(x) for all rows together, and each adapter on its own rows. LoRA and DoRA are computed for all rows at one
    time (`low_rank`), with the same shapes and addresses whichever rows there are: a CUDA graph can hold that. Other
    kinds go through their own `forward` on their rows. `plain` is the reference.
    """

    def __init__(self, base: nn.Module, own: dict[int, Adapter], choice: Choice):
        """own: the adapters over `base`, by their numbers."""
        super().__init__(base)
        self.choice = choice
        self.own = {number: adapter.eval() for number, adapter in own.items()}  # no submodules: they have the base too
        thin = {n: adapter for n, adapter in own.items() if type(adapter) in LOW_RANK and adapter.standard}
        self.others = [number for number in own if number not in thin]
        self.standard = not self.others
        self.owner = None
        if thin:
            self._lay_out(thin)

    @torch.no_grad()
    def _lay_out(self, thin):
        """A (R, in), scales (R,) and B (out, R) of all adapters end to end, and whose each of the R is.

        gains (K + 1, out): m / |V| of each adapter with DoRA, else ones; None if there is none.
        """
        ranks = {number: len(adapter.lora_A) for number, adapter in thin.items()}

        def each_rank(values):
            return [values[number] for number, rank in ranks.items() for _ in range(rank)]

        self.A = {torch.float32: torch.cat([adapter.lora_A.detach() for adapter in thin.values()])}
        self.B = {torch.float32: torch.cat([adapter.lora_B.detach() for adapter in thin.values()], dim=1)}
        scales = each_rank({number: float(adapter.scale) for number, adapter in thin.items()})
        self.scales = torch.tensor(scales, device=self.device)
        self.owner = torch.tensor(each_rank({number: number for number in ranks}), device=self.device)
        self.gains = None
        if any(type(adapter) is DoRALinear for adapter in thin.values()):
            self.gains = torch.ones(len(self.choice.names), self.out_features, device=self.device)
            for number, adapter in thin.items():
                if type(adapter) is DoRALinear:
                    self.gains[number] = adapter.ratio()
        start = 0
        for number, adapter in thin.items():  # those in the adapters themselves are not needed beside them
            own = slice(start, start + ranks[number])
            adapter.lora_A.data, adapter.lora_B.data = self.A[torch.float32][own], self.B[torch.float32][:, own]
            start = own.stop

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) in a dtype, each cast once."""
        for matrix in (self.A, self.B):
            if dtype not in matrix:
                matrix[dtype] = matrix[torch.float32].to(dtype)
        return self.A[dtype], self.B[dtype]

    def not_own(self, index: Tensor) -> Tensor:
        """Which of the R products are of another adapter than a row's: (B, R) bool for `index` (B,)."""
        return index[:, None] != self.owner

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., in) to (B, ..., out), in x's dtype."""
        index = self.choice.index
        y = self.base(x) if self.owner is None else self.low_rank(x, index)
        for number in self.others:
            rows = index == number
            if len(index) == 1:
                y = self.own[number](x) if rows.item() else y
            elif rows.any():
                y[rows] = self.own[number](x[rows])
        return y

    def low_rank(self, x: Tensor, index: Tensor) -> Tensor:
        """`forward` for adapters that are LoRA or DoRA; rows of others get what the base gives.

        Each row is multiplied by the A of all adapters, and what is of others than its own is taken out. That costs
        R (in + out) products a position, where the base costs in * out.
        """
        y, (A, B) = self.base(x), self.matrices(x.dtype)
        many = (-1, *[1] * (x.dim() - 2))  # an index for each row, whatever is in the row
        low = F.linear(x, A) * self.scales.to(x.dtype)
        low = low.masked_fill(self.not_own(index).view(*many, len(self.owner)), 0)
        y = y + F.linear(low, B)
        if self.gains is None:
            return y
        gains = self.gains.index_select(0, index).view(*many, self.out_features).to(y.dtype)
        if self.base.bias is None:
            return y * gains
        bias = self.base.bias.to(y.dtype)
        return (y - bias) * gains + bias

    def plain(self, x: Tensor) -> Tensor:
        """The reference for `forward`: each adapter's own, on its rows."""
        numbers, parts = self.choice.index.expand(len(x)), {}
        for number in numbers.unique().tolist():
            parts[number] = self.own.get(number, self.base)(x[numbers == number])
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=next(iter(parts.values())).dtype, device=x.device)
        for number, part in parts.items():
            y[numbers == number] = part
        return y


class SeveralExperts(nn.Module):
    """A mixture of experts with adapters in it: the rows of each adapter go through it by themselves.

    Inside of it a position goes to the experts that it chooses, and its row is not known any more.
    """

    def __init__(self, experts: Experts, choice: Choice):
        super().__init__()
        self.mixture, self.choice = experts, choice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to (B, T, D), and the router's logits (B * T, E)."""
        index = self.choice.index
        if len(index) == 1:
            return self.mixture(x)
        y, logits = torch.empty_like(x), None
        try:
            for number in index.unique():
                rows, self.choice.index = index == number, number[None]
                y[rows], own = self.mixture(x[rows])
                own = own.unflatten(0, (-1, x.size(1)))
                logits = own.new_empty(*x.shape[:2], own.size(-1)) if logits is None else logits
                logits[rows] = own
        finally:
            self.choice.index = index
        return y, logits.flatten(0, 1)


def recordable(model: nn.Module) -> bool:
    """Whether a pass of this model never waits for the host: of several adapters, all are LoRA or DoRA."""
    return not any(isinstance(module, SeveralLinear) and module.others for module in model.modules())


# ------------------------------------------------------------------------------------------------------------- loading


def put_adapters(model: Transformer, folders: dict[str, Path]) -> None:
    """Put several adapters, ours or PEFT's, over a model in evaluation mode; `folders` is by name.

    Raises UserError as `peft_format.load_adapter`, and for a folder that also changes the base's own parameters.
    """
    choice, own = Choice(list(folders), model.model.embed_tokens.weight.device), {}
    for number, folder in enumerate(folders.values(), start=1):
        _refuse_replaced(model, folder)
        peft_format.load_adapter(model, folder)
        for path, adapter in adapters(model).items():
            if not hasattr(adapter.base, "in_features"):
                raise UserError(
                    f"{folder} changes {path}, not linear layers alone: it cannot share a base with other adapters"
                )
            own.setdefault(path, {})[number] = adapter
            put(model, path, adapter.base)
    for path, found in own.items():
        put(model, path, SeveralLinear(model.get_submodule(path), found, choice))
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts) and any(isinstance(inner, SeveralLinear) for inner in module.modules()):
            put(model, name, SeveralExperts(module, choice))
    model.choice = choice
    model.eval()


def _refuse_replaced(model, folder):
    """Raise UserError if a folder changes more than the linear layers that it adapts: the base is that of all."""
    replaced = peft_format.read_for(model, folder).replaced
    changed = replaced.names() - replaced.base.keys()
    for name, tensor in replaced.base.items():  # what PEFT saves beside an adapter on it: the base's own, as a rule
        old = model.get_parameter(name) if name in dict(model.named_parameters()) else model.lm_head.weight
        if old.shape != tensor.shape or not torch.equal(tensor.to(old), old):
            changed.add(name)
    if changed:
        names = ", ".join(sorted(changed))
        raise UserError(f"{folder} changes {names}, which all adapters share: use it alone, or merge it")
