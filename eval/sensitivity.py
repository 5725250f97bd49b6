"""Which layers suffer from being quantised, and which of them to spare so that a model fits into so many bytes.

One linear layer at a time is quantised in its place in the model, measured by KL(model || model with that layer
quantised), and put back: the model is read once. Blocks before the layer do as they did, so a measurement starts from
what they have given, which halves the work.
"""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from eval.divergence import CHUNK, divergence, head_weight, micro_batches
from lora import Adapter, adapters, linear_layers
from model import IGNORE, Layout, rope_angles
from ops.attention import choose_attention
from ops.dtypes import compute_dtype
from quantize import QUANTIZERS
from shell.cli import UserError

DENSE_BYTES = 2  # of a weight that is not quantised, in the model that the plan is for: bf16


@dataclasses.dataclass
class Batch:
    """A micro-batch on its way through the blocks: x (1, T, D) before the next one, and what they all need.

    rows: (T,) bool, where a target is. hidden: the untouched model's final states there, (n, D) fp32.
    """

    x: torch.Tensor
    angles: tuple
    attention: dict
    rows: torch.Tensor
    hidden: torch.Tensor = None


@torch.inference_mode()
def measure_layers(model, text, positions, quantizers, progress=lambda layers: layers):
    """For each linear layer in the blocks and each of `quantizers` a dict: "layer", "quantizer", "kl" and "bytes".

    model: a dense `Transformer`, perhaps with an adapter over it, which then stays in full precision. text, positions:
    as in divergence.py. kl: nats a target. bytes: of the quantised weight with its scales.
    progress: given the paths of all layers, it yields them (a progress bar).
    """
    batches, head = start(model, text, positions), head_weight(model)
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
def measure_plan(model, text, positions, plan):
    """KL(model || model quantised as `plan` says) in nats a target."""
    batches, head = start(model, text, positions), head_weight(model)
    with quantized(model, {path: name for path, name in plan.items() if name != "none"}):
        return mean_divergence(model, batches, 0, head)


def block_layers(model):
    """The paths of all linear layers in the blocks, in order, whether or not an adapter lies over them."""
    return [name for name in linear_layers(model) if name.startswith("model.layers.")]


def layer_size(model, path):
    layer = model.get_submodule(path)
    return layer.in_features * layer.out_features


@contextlib.contextmanager
def quantized(model, quantizers):
    """Let layers be quantised inside the block: {path: key of QUANTIZERS}. Yields the bytes that they take."""
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


def start(model, text, positions):
    """All micro-batches of a text as `Batch`es before the first block."""
    weight, config = model.model.embed_tokens.weight, model.config
    batches = []
    for tokens, targets, offsets in micro_batches(text, positions):
        tokens = tokens.to(weight.device)
        x = model.model.embed_tokens(tokens).to(compute_dtype(weight.dtype, weight.device.type))
        layout = Layout(tokens, offsets=offsets)
        angles = rope_angles(config, layout.places().positions, x.dtype)
        attention = {w: choose_attention(layout, config.head_dim, x.dtype, w) for w in set(config.windows)}
        rows = (targets.flatten() != IGNORE).to(weight.device)
        batches.append(Batch(x, angles, attention, rows))
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


def through_blocks(model, batch, first, end):
    """The hidden states (1, T, D) after the blocks from `first` to before `end`."""
    x = batch.x
    for number in range(first, end):
        x = model.model.layers[number](x, batch.angles, batch.attention[model.config.windows[number]])
    return x


def final_states(model, batch, block):
    """The final, normed hidden states (n, D) fp32 at the targets; the batch is before `block`."""
    x = through_blocks(model, batch, block, model.config.num_hidden_layers)
    return model.model.norm(x.flatten(0, 1)[batch.rows]).float()


def mean_divergence(model, batches, block, head):
    """KL(model as it was || model as it is now), nats a target.

    The head is multiplied in fp32 whatever the model is stored in: rounded to bf16, logits would hide what one layer
    does.
    """
    total = 0.0
    for batch in batches:
        pairs = zip(batch.hidden.split(CHUNK), final_states(model, batch, block).split(CHUNK), strict=True)
        for was, now in pairs:
            log_p, log_q = (F.linear(states, head).log_softmax(dim=-1) for states in (was, now))
            total += divergence(log_p, log_q).double().sum().item()
    return total / sum(len(batch.hidden) for batch in batches)


# ----------------------------------------------------------------------------------------------------------- the plan


def other_bytes(model):
    """Bytes of what no plan quantises, in bf16: embedding, head, norms, biases; without adapters."""
    left_out = {f"{path}{base}.weight" for path in block_layers(model) for base in ("", ".base")}
    for path, adapter in adapters(model).items():
        left_out |= {f"{path}.{name}" for name, _ in adapter.named_parameters() if not name.startswith("base.")}
    return DENSE_BYTES * sum(parameter.numel() for name, parameter in model.named_parameters() if name not in left_out)


def least_bytes(model, quantizers):
    """What the linear layers in the blocks take at least, in bytes."""
    layers = [model.get_submodule(path) for path in block_layers(model)]
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    least = {shape: DENSE_BYTES * shape[0] * shape[1] for shape in shapes}
    for shape in least:
        made = (QUANTIZERS[name](torch.zeros(shape), None) for name in quantizers)
        least[shape] = min(least[shape], *(layer.nbytes() for layer in made))
    return sum(least[shape] for shape in shapes)


def check_budget(model, quantizers, budget):
    """Raise UserError if no plan fits in so many bytes: before hours of measuring."""
    least = least_bytes(model, quantizers)
    if least > budget:
        raise UserError(f"the layers in the blocks cannot take less than {least:,} bytes, the budget leaves {budget:,}")


def choose_plan(rows, budget):
    """For every layer a quantiser, or "none", so that the layers take at most `budget` bytes and lose little.

    rows: as `measure_layers` returns them. Greedy: from all layers dense, that step to fewer bytes is taken, again and
    again, that costs the least divergence for a byte; then what room is left goes to where it spares the most. Each
    layer's divergence counts as if it were alone, so their sum is an estimate. Returns the plan: a quantiser by path.
    The budget must have passed `check_budget`.
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


def options_of(rows):
    """{path: {quantiser or "none": (bytes, divergence)}}, from what `measure_layers` returns."""
    options = {}
    for row in rows:
        dense = {"none": (DENSE_BYTES * row["weights"], 0.0)}
        options.setdefault(row["layer"], dense)[row["quantizer"]] = row["bytes"], max(0.0, row["kl"])
    return options


def plan_cost(rows, plan):
    """What the layers take under a plan, in bytes, and the sum of what each loses alone, in nats a target."""
    chosen = [choices[plan[layer]] for layer, choices in options_of(rows).items()]
    return sum(nbytes for nbytes, _ in chosen), sum(kl for _, kl in chosen)


def _steps(options, plan, narrower):
    """Every (layer, quantiser) that takes fewer bytes than the layer has now, or that takes more and loses less."""
    for layer, choices in options.items():
        nbytes, kl = choices[plan[layer]]
        for name, (other, loss) in choices.items():
            if other < nbytes if narrower else other > nbytes and loss < kl:
                yield layer, name


def _growth(options, plan, step):
    layer, name = step
    return options[layer][name][0] - options[layer][plan[layer]][0]


def _price(options, plan, step):
    """Divergence for a byte, of a step in either direction."""
    layer, name = step
    return (options[layer][name][1] - options[layer][plan[layer]][1]) / -_growth(options, plan, step)
