"""Which layers suffer most from quantisation, and which of them to keep wide so that a model fits a budget of bytes.

One linear layer at a time is quantised in the model, its effect is measured as KL(model || model with that layer
quantised), and the layer is put back: the weights are read once. The blocks before the layer are unchanged, so each
measurement starts from the hidden states after them, which halves the work.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from eval.divergence import Head, Text, divergence, head_of, micro_batches
from lora import Adapter, adapters, linear_layers
from model import IGNORE, Layout, Transformer
from ops.loss import LOSS_CHUNK
from quantize import QUANTIZERS
from shell.cli import UserError

DENSE_BYTES = 2  # of a weight that is not quantised: the plan is for a model in bf16

Plan = dict[str, str]  # {path of a linear layer in the blocks: key of QUANTIZERS, or "none"}


@dataclasses.dataclass
class Batch:
    """A micro-batch between two blocks: its hidden states x (1, T, D), and what each block needs (`Transformer`).

    rows: (T,) bool, where a target is. hidden: the final states (n, D) fp32 there of the model as it was.
    """

    x: Tensor
    arguments: list[tuple]
    rows: Tensor
    hidden: Tensor | None = None


@torch.inference_mode()
def measure_layers(
    model: Transformer,
    text: Text,
    positions: int,
    quantizers: list[str],
    progress: Callable[[list[str]], Iterable[str]] = lambda layers: layers,
) -> list[dict]:
    """For each linear layer in the blocks and each of `quantizers` a dict of "layer", "quantizer", "kl", "bytes".

    model: not quantised, perhaps with an adapter, which stays in full precision. text, positions: as in divergence.py.
    kl: nats a target. bytes: of the quantised weight with its scales. The dict also has the number of "weights".
    progress: given the paths of all layers, yields them (a progress bar).
    """
    batches, head = start(model, text, positions), head_of(model)
    block, rows = 0, []
    for path in progress(block_layers(model)):
        while block < int(path.split(".")[2]):
            for batch in batches:
                batch.x = through_blocks(model, batch, block, block + 1)
            block += 1
        for name in quantizers:
            with quantized(model, {path: name}) as nbytes:
                kl = mean_divergence(model, batches, block, head)
            rows.append(
                {"layer": path, "quantizer": name, "kl": kl, "bytes": nbytes, "weights": layer_size(model, path)}
            )
    return rows


@torch.inference_mode()
def measure_plan(model: Transformer, text: Text, positions: int, plan: Plan) -> float:
    """KL(model || model quantised as `plan` says) in nats a target."""
    batches, head = start(model, text, positions), head_of(model)
    with quantized(model, {path: name for path, name in plan.items() if name != "none"}):
        return mean_divergence(model, batches, 0, head)


def block_layers(model: Transformer) -> list[str]:
    """The paths of all linear layers in the blocks, in order, with or without an adapter."""
    return [name for name in linear_layers(model) if name.startswith("model.layers.")]


def layer_size(model: Transformer, path: str) -> int:
    """The number of weights of a linear layer."""
    layer = model.get_submodule(path)
    return layer.in_features * layer.out_features


@contextlib.contextmanager
def quantized(model: Transformer, quantizers: Plan) -> Iterator[int]:
    """Quantise layers, {path: key of QUANTIZERS}, inside the `with` block. Yields the bytes that they take."""
    places, nbytes = [], 0
    try:
        for path, name in quantizers.items():
            parent, _, leaf = path.rpartition(".")
            module, parent = model.get_submodule(path), model.get_submodule(parent)
            if isinstance(module, Adapter):
                module, parent, leaf = module.base, module, "base"
            places.append((parent, leaf, module))
            setattr(parent, leaf, QUANTIZERS[name](module.weight.detach(), module.bias))
            nbytes += getattr(parent, leaf).nbytes()
        yield nbytes
    finally:
        for parent, leaf, module in places:
            setattr(parent, leaf, module)


def start(model: Transformer, text: Text, positions: int) -> list[Batch]:
    """The micro-batches of a text before the first block."""
    device, batches = model.model.embed_tokens.weight.device, []
    for tokens, targets, offsets in micro_batches(text, positions):
        tokens = tokens.to(device)
        layout = Layout(tokens, offsets=offsets)
        x = model.embed(tokens, layout.places.positions)
        rows = (targets.flatten() != IGNORE).to(device)
        batches.append(Batch(x, model.block_arguments(layout, x.dtype), rows))
        batches[-1].hidden = final_states(model, batches[-1], 0)
        if len(batches) == 1:
            _check_blocks(batches[0], model.hidden_states(tokens, offsets=offsets))
    return batches


def _check_blocks(batch, hidden):
    """Raise UserError unless the blocks, called one by one, compute what `Transformer.hidden_states` did, (1, T, D)."""
    expected = hidden.flatten(0, 1)[batch.rows].float()
    if not (batch.hidden - expected).norm() <= 0.05 * expected.norm():  # equal but for rounding
        raise UserError(
            "model.py's Transformer.hidden_states does more than call its blocks in turn: let start and through_blocks "
            "in eval/sensitivity.py do so too"
        )


def through_blocks(model: Transformer, batch: Batch, first: int, end: int) -> Tensor:
    """The hidden states (1, T, D) after the blocks from `first` to before `end`."""
    x = batch.x
    for number in range(first, end):
        x = model.model.layers[number](x, *batch.arguments[number])
    return x


def final_states(model: Transformer, batch: Batch, block: int) -> Tensor:
    """The final, normed hidden states (n, D) fp32 at the targets; the batch is before `block`."""
    x = through_blocks(model, batch, block, model.config.num_hidden_layers)
    return model.finish(x.flatten(0, 1)[batch.rows]).float()


def mean_divergence(model: Transformer, batches: list[Batch], block: int, head: Head) -> float:
    """KL(model as it was || model as it is now), nats a target; the batches are before `block`.

    The logits are computed in fp32 whatever the model's dtype: rounded to bf16 they would hide the effect of one layer.
    """
    total = 0.0
    for batch in batches:
        pairs = zip(batch.hidden.split(LOSS_CHUNK), final_states(model, batch, block).split(LOSS_CHUNK), strict=True)
        for was, now in pairs:
            log_p, log_q = (head.log_probabilities(states) for states in (was, now))
            total += divergence(log_p, log_q).double().sum().item()
    return total / sum(len(batch.hidden) for batch in batches)


# ----------------------------------------------------------------------------------------------------------- the plan


def other_bytes(model: Transformer) -> int:
    """Bytes in bf16 of the weights that no plan quantises: embedding, head, norms, biases; adapters not included."""
    left_out = {f"{path}{base}.weight" for path in block_layers(model) for base in ("", ".base")}
    for path, adapter in adapters(model).items():
        left_out |= {f"{path}.{name}" for name, _ in adapter.named_parameters() if not name.startswith("base.")}
    return DENSE_BYTES * sum(parameter.numel() for name, parameter in model.named_parameters() if name not in left_out)


def least_bytes(model: Transformer, quantizers: list[str]) -> int:
    """The fewest bytes that the linear layers in the blocks can take."""
    layers = [model.get_submodule(path) for path in block_layers(model)]
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    least = {shape: DENSE_BYTES * shape[0] * shape[1] for shape in shapes}
    for shape in least:
        made = (QUANTIZERS[name](torch.zeros(shape), None) for name in quantizers)
        least[shape] = min(least[shape], *(layer.nbytes() for layer in made))
    return sum(least[shape] for shape in shapes)


def check_budget(model: Transformer, quantizers: list[str], budget: int) -> None:
    """Raise UserError if no plan fits in `budget` bytes. Called first, because measuring may take hours."""
    least = least_bytes(model, quantizers)
    if least > budget:
        raise UserError(
            f"the layers in the blocks cannot take less than {least:,} bytes with {', '.join(quantizers)}, the budget "
            f"leaves {budget:,}: raise it, or add to --quantizers"
        )


def choose_plan(rows: list[dict], budget: int) -> Plan:
    """A quantiser or "none" for every layer, so that the layers take at most `budget` bytes at a small divergence.

    rows: as `measure_layers` returns them. The budget must have passed `check_budget`.
    Greedy: all layers start dense. While they take too many bytes, the step to fewer bytes is taken that adds the least
    divergence a byte. Then the bytes left over go to the steps that take away the most divergence a byte. The
    divergences of layers are added as if they did not depend on each other, so the sum is an estimate.
    """
    options = options_of(rows)
    plan = dict.fromkeys(options, "none")
    while plan_cost(rows, plan)[0] > budget:
        layer, name = min(_steps(options, plan, narrower=True), key=lambda step: _price(options, plan, step))
        plan[layer] = name
    while True:
        room = budget - plan_cost(rows, plan)[0]
        wider = [step for step in _steps(options, plan, narrower=False) if _growth(options, plan, step) <= room]
        if not wider:
            return plan
        layer, name = max(wider, key=lambda step: _price(options, plan, step))
        plan[layer] = name


def options_of(rows: list[dict]) -> dict[str, dict[str, tuple[int, float]]]:
    """{path: {quantiser or "none": (bytes, divergence)}}, from the rows of `measure_layers`."""
    options = {}
    for row in rows:
        dense = {"none": (DENSE_BYTES * row["weights"], 0.0)}
        options.setdefault(row["layer"], dense)[row["quantizer"]] = row["bytes"], max(0.0, row["kl"])
    return options


def plan_cost(rows: list[dict], plan: Plan) -> tuple[int, float]:
    """The bytes of the layers under a plan, and the sum of the divergences of each alone, in nats a target."""
    chosen = [choices[plan[layer]] for layer, choices in options_of(rows).items()]
    return sum(nbytes for nbytes, _ in chosen), sum(kl for _, kl in chosen)


def _steps(options, plan, narrower):
    """Yield every (layer, quantiser) of fewer bytes than the layer has now, or of more bytes and less divergence."""
    for layer, choices in options.items():
        nbytes, kl = choices[plan[layer]]
        for name, (other, loss) in choices.items():
            if other < nbytes if narrower else other > nbytes and loss < kl:
                yield layer, name


def _growth(options, plan, step):
    """The bytes that a step adds."""
    layer, name = step
    return options[layer][name][0] - options[layer][plan[layer]][0]


def _price(options, plan, step):
    """Divergence a byte, of a step in either direction."""
    layer, name = step
    return (options[layer][name][1] - options[layer][plan[layer]][1]) / -_growth(options, plan, step)
