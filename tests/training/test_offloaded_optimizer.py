"""AdamW in host memory: the steps of AdamW on the device, and gradients and weights that are copied and waited for."""

import dataclasses
import queue

import pytest
import torch
from lazy_stream import LazyStream
from safetensors.torch import load_file
from test_finetune import distance, final_weights, random_samples, rows, run, settings  # noqa: F401

import finetune
from batching import PLANNERS, open_samples
from shell.cli import UserError
from training import build, offload, run_folder
from training.memory import budget, machine, plan
from training.memory.dry_run import memory_dry_run
from training.offload import OffloadedAdamW
from training.optimizer import begin_step
from weights.checkpoint import load_model

FULL = dict(method="full", max_steps=5, eval_interval=0, learning_rate=1e-3, schedule="constant", weight_decay=0.1)
OPTIONS = {
    "several micro-batches": dict(micro_batch_tokens=20, max_grad_norm=0.3),
    "one, clipped": dict(micro_batch_tokens=1000, max_grad_norm=0.3),
    "one": dict(micro_batch_tokens=1000, max_grad_norm=0.0),
    "several, not clipped": dict(micro_batch_tokens=20, max_grad_norm=0.0),
    "mixed": dict(precision="bf16-mixed", micro_batch_tokens=40, recompute="offload"),
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_fp32_weights_step_bit_for_bit_as_on_the_device(run, flags):  # noqa: F811
    train = random_samples(12)
    here, there = (run(train, name=str(where), offload=where, **FULL | flags) for where in (None, "optimizer"))
    assert rows(here) == rows(there)
    a, b = (load_file(final_weights(folder)) for folder in (here, there))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_weights_follow_fp32_ones(run, tiny_model_dir):  # noqa: F811
    """Held against a loop that is written out; bf16 weights stepped themselves end elsewhere."""
    flags = FULL | dict(precision="bf16-true", max_grad_norm=0.0, micro_batch_tokens=20, learning_rate=1e-4)
    out = run(random_samples(8), offload="optimizer", name="offloaded", **flags)
    ended = load_file(final_weights(out))
    s = finetune.Settings(tiny_model_dir, out.parent / "data", **flags | {"global_batch_size": 4})
    samples = open_samples(s.data_dir, "train")
    model = load_model(tiny_model_dir, torch.bfloat16).requires_grad_(True).train()
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    matrices, others = [w for w in masters.values() if w.dim() > 1], [w for w in masters.values() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    for step, row in enumerate(rows(out)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = row["learning_rate"]
        for _, micro_batches in finetune.planned_steps(s, samples, step, step + 1):
            for indices in micro_batches:
                tokens, targets, offsets = PLANNERS[s.planner].layout(samples, indices)
                (model(tokens, targets, offsets=offsets) / row["targets"]).backward()
                for name, parameter in model.named_parameters():
                    gradient = parameter.grad.float()
                    masters[name].grad = gradient if masters[name].grad is None else masters[name].grad + gradient
                    parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    assert all(torch.equal(ended[name], p) for name, p in model.named_parameters())
    plain = load_file(final_weights(run(name="plain", **flags)))
    assert distance(plain, ended) > 1e-4


def offloaded(s, monkeypatch, lazy=False):
    """A run with AdamW in host memory, ready for `train_step`."""
    if lazy:
        monkeypatch.setattr(offload, "CopyStream", lambda on_cuda: LazyStream())
    fabric = build.start_fabric(s)
    model, _ = build.build_model(s, fabric.device, None)
    optimizer = build.place_optimizer(s, fabric, model)
    return build.Run(s, fabric, model.train(), optimizer, open_samples(s.data_dir, "train"))


@pytest.mark.parametrize("most", [0.0, 0.5])
@pytest.mark.parametrize("cut", [[[0, 1, 2]], [[0], [1], [2]]], ids=["one", "three"])
def test_copies_are_waited_for(settings, monkeypatch, most, cut):  # noqa: F811
    s = settings(random_samples(3), max_grad_norm=most, **{**FULL, "precision": "bf16-true"}, offload="optimizer")
    ended = []
    for lazy in (False, True):
        run = offloaded(s, monkeypatch, lazy)  # noqa: F811
        for step in range(2):
            finetune.train_step(run, cut, step, 1e-3)
        ended.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
    assert all(torch.equal(p, ended[1][name]) and p.isfinite().all() for name, p in ended[0].items())
    assert not run.optimizer.down.queue and not run.optimizer.up.queue
    assert run.optimizer.up.copies == 2 * len(ended[0]) == run.optimizer.down.copies / len(cut)


def test_a_tied_head_steps_once(settings, monkeypatch, tiny_checkpoint):  # noqa: F811
    """Its gradient comes from the head and from the embedding, and is complete after both."""
    ended = []
    for where in (None, "optimizer"):
        s = settings(random_samples(3), max_grad_norm=0.0, offload=where, **FULL)
        run = offloaded(dataclasses.replace(s, checkpoint_dir=tiny_checkpoint("llama-tied")), monkeypatch)  # noqa: F811
        run.train = ended[0][0] if ended else run.train  # of the same samples
        for step in range(2):
            finetune.train_step(run, [[0, 1], [2]], step, 1e-3)
        ended.append((run.train, dict(run.model.named_parameters())))
    assert "lm_head.weight" not in ended[0][1]
    assert all(torch.equal(p, ended[1][1][name]) for name, p in ended[0][1].items())


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_gradients_leave_and_weights_step_while_the_backward_pass_goes_on(settings, monkeypatch, most):  # noqa: F811
    s = settings(random_samples(4), max_grad_norm=most, **FULL, offload="optimizer")
    run, held, late = offloaded(s, monkeypatch), [], []  # noqa: F811
    leave, step_all = run.optimizer._leave, run.optimizer._step_all
    assert run.optimizer.early == (most == 0)

    def counted(parameter):
        held.append(sum(p.grad is not None for p in run.model.parameters()))
        leave(parameter)

    for parameter in run.model.parameters():
        parameter._post_accumulate_grad_hooks.clear()
        parameter.register_post_accumulate_grad_hook(counted)
    monkeypatch.setattr(
        run.optimizer, "_step_all", lambda weights, factor: late.append(len(weights)) or step_all(weights, factor)
    )
    finetune.train_step(run, [[0, 1, 2, 3]], 0, 1e-3)
    parameters = [*run.model.parameters()]
    assert set(held) == {1} and len(held) == len(parameters)
    assert late == [len(parameters) if most else 0]
    assert all(p.grad is None for p in parameters)
    assert all(w.gradient is None and w.master.grad is None for w in run.optimizer.weights.values())


def test_the_dry_run_changes_nothing(settings, monkeypatch):  # noqa: F811
    s = settings(random_samples(9), offload="optimizer", micro_batch_tokens=30, **FULL)
    run = offloaded(s, monkeypatch)  # noqa: F811
    before = [p.detach().clone() for p in run.model.parameters()]
    memory_dry_run(run, finetune.forward)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert not any(state["step"] for state in run.optimizer.state.values()) and not run.optimizer.stopped
    assert all(w.gradient is None and not w.arrived for w in run.optimizer.weights.values())


def test_a_weight_without_a_gradient_in_some_micro_batch_steps_too():
    """As with a mixture's expert that no token of it went to, if it gave no zeros."""
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(3, 2)), "b": torch.nn.Parameter(torch.ones(4))})
    s = finetune.Settings("none", "none", method="full", max_grad_norm=0.0, offload="optimizer")
    optimizer = OffloadedAdamW(model, s)
    begin_step(optimizer, 0.1, 2)
    (model["a"].sum() + model["b"].sum()).backward()
    model["a"].sum().backward()
    assert optimizer.take_norm() == pytest.approx((6 * 4 + 4) ** 0.5)
    assert all((p < 0.95).all() for p in model.values())


def test_an_error_in_the_thread_ends_the_run(run, monkeypatch):  # noqa: F811
    def fail(self, gradient):
        raise MemoryError("no room")

    monkeypatch.setattr(offload.HostWeight, "add", fail)
    with pytest.raises((MemoryError, UserError)):
        run(random_samples(4), offload="optimizer", **FULL)


def test_buffers_hold_back_the_backward_pass(settings, monkeypatch):  # noqa: F811
    """There are no more gradients on their way than buffers."""
    s = settings(random_samples(4), offload="optimizer", **FULL)
    run = offloaded(s, monkeypatch)  # noqa: F811
    taken, most = [], []

    class Counted(queue.SimpleQueue):
        def get(self):
            buffer = super().get()
            taken.append(1)
            most.append(len(taken))
            return buffer

        def put(self, buffer):
            if taken:
                taken.pop()
            super().put(buffer)

    run.optimizer.buffers = Counted()
    for _ in range(offload.STAGED):
        run.optimizer.buffers.put(torch.empty(10**6, dtype=torch.uint8))
    finetune.train_step(run, [[0, 1, 2, 3]], 0, 1e-3)
    assert max(most) <= offload.STAGED and len(most) > 10


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(method="lora"), "needs --method full, not lora"),
        (dict(optimizer="adamw-8bit"), "needs --optimizer adamw, not adamw-8bit"),
        (dict(devices=2), "needs --devices 1, not 2"),
        (dict(optimizer_in_backward=True, max_grad_norm=0.0), "needs --optimizer_in_backward false, not true"),
        (dict(precision="16-mixed"), "needs another --precision"),
    ],
)
def test_what_the_optimizer_in_host_memory_cannot_do(settings, flags, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        settings(random_samples(4), offload="optimizer", **{"method": "full", **flags})


def test_blocks_in_chunks_are_not_compiled(settings):  # noqa: F811
    with pytest.raises(UserError, match="--recompute offload needs --compile false"):
        settings(random_samples(4), recompute="offload", compile=True)


@pytest.mark.parametrize("flags", [dict(offload="optimizer"), dict(recompute="offload")], ids=str)
def test_host_memory_that_is_not_there_is_named_before_the_run(run, monkeypatch, flags):  # noqa: F811
    plan_job = budget.plan_job
    monkeypatch.setattr(budget, "plan_job", lambda *args: dataclasses.replace(plan_job(*args), device="meta"))
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    ((name, value),) = flags.items()
    with pytest.raises(UserError, match=rf"--{name} {value}: \S+ GB of host memory are needed, 1e-06 free"):
        run(random_samples(4), max_steps=1, eval_interval=0, method="full", **flags)


def test_room_on_the_disk_is_for_the_fp32_states(settings, tiny_model_dir, run):  # noqa: F811
    s = settings(random_samples(4), offload="optimizer", precision="bf16-true", **FULL | dict(save_interval=5))
    model = load_model(tiny_model_dir, torch.bfloat16).requires_grad_(True)
    weights, checkpoint = run_folder.sizes(s, model)
    finetune.main(s)
    (written,) = s.out_dir.glob("step-*")
    taken = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    assert checkpoint == pytest.approx(taken, rel=0.1) and checkpoint == 7 * weights


# --------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_of_host_memory_is_what_is_there(settings, monkeypatch):  # noqa: F811
    s = settings(random_samples(9), offload="optimizer", micro_batch_tokens=30, precision="bf16-true", **FULL)
    run = offloaded(s, monkeypatch)  # noqa: F811
    states = sum(t.nbytes for state in run.optimizer.state.values() for t in state.values() if t.dim())
    buffers = 2 * max(p.nbytes for p in run.model.parameters())
    gradients = 4 * sum(p.numel() for p in run.model.parameters())
    job = budget.plan_job(s)
    assert plan.Predictor(job).fixed["moments"] == states + buffers + gradients
    largest = 4 * max(p.numel() for p in run.model.parameters())
    one_by_one = dataclasses.replace(job, gradients="freed")
    assert plan.Predictor(one_by_one).fixed["moments"] == states + buffers + largest
    card = plan.Predictor(dataclasses.replace(job, device="meta"))
    assert card.fixed.total() == sum(p.nbytes for p in run.model.parameters())
    assert states + buffers + gradients <= card.host <= states + 2 * buffers + gradients
