"""What an evaluation of a run's model finds is kept with the run, by the scripts as a user starts them."""

import json

import pytest
import yaml
from test_finetune import random_samples, run, settings  # noqa: F401 (fixtures)

from tracking.results import record_result
from tracking.run_files import read_results


@pytest.fixture
def trained(run):  # noqa: F811
    """The folder of a short run."""
    return run(random_samples(8), random_samples(4), max_steps=2, eval_interval=2)


def found(out, kind):
    (result,) = [each for each in read_results(out) if each.kind == kind]
    assert result.model == "final"
    return result.names()


def test_the_same_evaluation_replaces_its_result_and_another_one_does_not(trained, tmp_path):
    """Another file of the same name, another limit, another style: none is lost, and each has a name of its own."""
    names, model = [], trained / "final"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(folder)
    for value, data, more in ((1, "a", {}), (2, "b", {}), (3, "a", {"prompt_style": "alpaca"}), (4, "a", {})):
        how = {"data": tmp_path / data / "test.jsonl", "adapter_dir": model, "batch_size": value, "limit": None, **more}
        record_result(model, "exact_match", "test", {"exact_match": value}, how)
        names.append({name: v for each in read_results(trained) for name, v in each.names().items()})
    assert [len(each) for each in names] == [1, 2, 3, 3]
    assert (
        names[0] == {"exact_match/test": 1}
        and names[1].items() > names[0].items()
        and names[2].items() > names[1].items()
    )
    assert sorted(names[3].values()) == [2, 3, 4] and names[3]["exact_match/test"] == 4
    record_result(model, "lm_eval", "", {"arc/acc": 0.5}, {"eval_tasks": ["arc"]})
    record_result(model, "lm_eval", "", {"gsm8k/acc": 0.25}, {"eval_tasks": ["gsm8k"]})
    record_result(model, "exact_match", "te st", {"exact_match": 0}, {})
    record_result(model, "exact_match", "te_st", {"exact_match": 0}, {})
    found = {name for each in read_results(trained) for name in each.names()}
    assert found == names[3].keys() | {"arc/acc", "gsm8k/acc", "exact_match/te st", "exact_match/te_st"}


def test_lm_eval(trained, run_script, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"q": f"is it {i}", "a": i % 2}) + "\n" for i in range(4)))
    task = {
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}?", "doc_to_target": "a",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    out_file = tmp_path / "out.json"
    code, out, err = run_script(
        "eval/lm_eval_harness.py", "--adapter_dir", trained / "final", "--eval_tasks", "[tiny]", "--include_path",
        tmp_path / "tasks", "--save_filepath", out_file,
    )  # fmt: skip
    assert code == 0 and "kept in" in out, err
    results = json.loads(out_file.read_text())["results"]["tiny"]
    assert found(trained, "lm_eval") == {"tiny/acc": results["acc,none"], "tiny/acc_norm": results["acc_norm,none"]}


def test_quality(trained, run_script, tmp_path, settings):  # noqa: F811
    code, out, err = run_script(
        "eval/quality.py", "--adapter_dir", trained / "final", "--data_dir", trained.parent / "data", "--variants",
        "[adapter:fp32]", "--out_dir", tmp_path / "quality",
    )  # fmt: skip
    assert code == 0 and "kept in" in out, err
    (row,) = json.loads((tmp_path / "quality" / "report.json").read_text())["variants"]
    names = found(trained, "quality")
    assert names["adapter:fp32/task/reference/kl"] == row["task"]["reference"]["kl"]
    assert names["adapter:fp32/weight_bytes"] == row["weight_bytes"] and "adapter:fp32/task/loss" in names


def stat(name, mean, **more):
    return {"name": {"name": name, "split": "test", **more}, "mean": mean}


def test_helm(trained, run_script, tmp_path):
    """Of test instances as they are, by the metrics that judge; not of perturbed ones, nor of the validation's."""
    specs = {
        "gsm:model=neurips_local": [
            stat("final_number_exact_match", 0.25), stat("num_instances", 8.0), stat("inference_runtime", 1.5),
            stat("final_number_exact_match", 0.1, perturbation={"name": "typos"}),
            {"name": {"name": "final_number_exact_match", "split": "valid"}, "mean": 0.9},
        ],
        "mmlu:subject=law": [stat("exact_match", 0.5), stat("quasi_exact_match", 0.75), stat("num_bytes", 3.0)],
    }  # fmt: skip
    for spec, stats in specs.items():
        (tmp_path / "v1" / spec).mkdir(parents=True)
        (tmp_path / "v1" / spec / "stats.json").write_text(json.dumps(stats))
    code, out, err = run_script(
        "eval/helm_results.py", "--suite_dir", tmp_path / "v1", "--model_dir", trained / "final"
    )
    assert code == 0, err
    assert "gsm:model=neurips_local: final_number_exact_match 0.250, 8 instances, 1.5 s a request" in out
    assert found(trained, "helm") == {
        "gsm:model=neurips_local/final_number_exact_match": 0.25,
        "mmlu:subject=law/exact_match": 0.5,
        "mmlu:subject=law/quasi_exact_match": 0.75,
    }
