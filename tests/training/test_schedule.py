"""What a run says of its learning rate before it starts."""

import re

import pytest
from test_finetune import random_samples, run, settings  # noqa: F401 (fixtures)

from training.schedule import Schedule, learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_line_has_the_first_the_highest_and_the_last_rate(settings, schedule, warmup_steps):  # noqa: F811
    s = settings(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup_steps)
    (line,) = Schedule(s, 20, validates=False).describe().splitlines()
    assert schedule in line and "(20 steps)" in line
    found = re.findall(r"from ([\d.e-]+)|, ([\d.e-]+) in the last", line)
    numbers = [float(start or last) for start, last in found]
    rates = [learning_rate(s, step, 20) for step in range(20)]
    expected = [rates[0], 3e-4, rates[-1]] if warmup_steps else [3e-4, rates[-1]]
    assert numbers == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("max_steps, said", [(5, True), (10, True), (11, False)])
def test_a_run_that_ends_within_its_warm_up_says_so(run, capsys, max_steps, said):  # noqa: F811
    run(random_samples(4), max_steps=max_steps, warmup_steps=10, eval_interval=0, save_interval=0)
    out = capsys.readouterr().out
    assert "learning rate: 10 warm-up steps from" in out
    assert ("note: the run ends within its 10 warm-up steps" in out) == said


def test_with_a_time_budget_the_last_rate_is_not_claimed(settings):  # noqa: F811
    line = Schedule(settings(time_budget="90m", warmup_steps=0), 1000, validates=True).describe()
    assert "in the last step" not in line and "90m, at most 1000 steps" in line
