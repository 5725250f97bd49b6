"""Files that are damaged at random: a short form of stress/mutations.py, and what it cannot see."""

import json
import os
import pickle
import resource
import time

import mutations
import pytest
import torch
from conftest import SEED
from safetensors.torch import load_file, save_file

import batching
from shell.cli import UserError
from shell.files import MANIFEST, new_folder
from text import chat_template, tokenizer
from weights import checkpoint, peft_format, stored
from weights.safetensors_format import read_header, read_tensors

MUTATIONS = 100


def test_damage_is_refused_or_changes_nothing():
    counts, failures = mutations.run(range(SEED * MUTATIONS, (SEED + 1) * MUTATIONS))
    assert not failures
    assert counts["refused"] > MUTATIONS / 2


def test_the_harness_sees_what_is_let_through(monkeypatch):
    """Without the checks of the manifest and of twins it must find other values, or it would find nothing."""
    for module in (checkpoint, peft_format, batching, tokenizer):
        monkeypatch.setattr(module, "check_listed", lambda *_: None)
    monkeypatch.setattr(mutations, "check_manifest", lambda *_: None)
    _, failures = mutations.run(range(SEED * 100, SEED * 100 + 100), report=lambda _: None, share_signed=1)
    assert any("other values" in failure for failure in failures)


@pytest.mark.parametrize("kind", ["sharded", "checkpoint", "data"])
def test_any_key_may_hold_anything(kind, tmp_path):
    """In a folder without manifest: refused in one line, or without a meaning here."""
    folder, loader = mutations.make_all(tmp_path)[kind]
    (folder / MANIFEST).unlink()
    names = {path.name for path in folder.glob("*.json")} - {"tokenizer.json"}  # thousands of keys
    assert names
    for name in sorted(names):
        for what in mutations.every_odd_value(folder / name):
            try:
                loader(folder)
            except UserError as error:
                assert "\n" not in str(error), what
            except Exception as error:
                pytest.fail(f"{what}: {error!r}")
    loader(folder)


# ------------------------------------------------------------------------------------------------------- manifests


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return mutations.make_all(tmp_path_factory.mktemp("good"))


def listed_files(good, kind):
    return sorted(json.loads((good[kind][0] / MANIFEST).read_text()))


@pytest.mark.parametrize("kind", ["model", "sharded", "adapter", "checkpoint", "data"])
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(good, kind):
    """In every file of the folder, at its start, its end, and a place between."""
    folder, loader = good[kind]
    for name in listed_files(good, kind):
        path, whole = folder / name, (folder / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            data = bytearray(whole)
            data[place] ^= 1
            path.write_bytes(data)
            try:
                with pytest.raises(UserError, match=name):
                    loader(folder)
            finally:
                path.write_bytes(whole)
        if name == MANIFEST:
            continue  # without one the folder is as somebody else made it
        path.unlink()
        try:
            with pytest.raises(UserError, match=f"{name}|holds no "):
                loader(folder)
        finally:
            path.write_bytes(whole)
    loader(folder)


def test_only_what_is_read_is_hashed(tmp_path):
    """The tokenizer of a large model must not wait for the hash of its weights."""
    from shell.files import check_listed

    with new_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"changed")
    check_listed(tmp_path / "model", ["config.json"], "mend it")
    with pytest.raises(UserError, match="model.safetensors has changed since it was written: mend it"):
        check_listed(tmp_path / "model", ["*.safetensors"], "mend it")


# ----------------------------------------------------------------------------------------------------- safetensors


def test_twins_in_a_header(tmp_path):
    """The library takes the last of two equal names, here of another dtype: other values, silently."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    twin = header[:-1] + ", " + header[1:].replace("F32", "I32")
    twin += " " * (-len(twin) % 8)
    path.write_bytes(len(twin).to_bytes(8, "little") + twin.encode() + data[8 + size :])
    assert not torch.equal(load_file(path)["a"], torch.ones(4))
    for read in (read_header, read_tensors):
        with pytest.raises(UserError, match="a.safetensors is damaged .*'a' comes twice.*: mend it"):
            read(path, "mend it")


def test_a_claim_of_size_takes_no_memory(tmp_path):
    """Headers, configurations and adapters that claim terabytes are refused before anything is allocated."""
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    started = time.perf_counter()
    with pytest.raises(UserError, match="damaged"):
        read_header(path, "")
    path.write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged"):
        read_header(path, "")
    assert time.perf_counter() - started < 1


# ------------------------------------------------------------------------------------------------- links, and code


def sharded_without_manifest(good, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    for path in good["sharded"][0].iterdir():
        if path.name != MANIFEST:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_links_out_of_a_folder(good, tmp_path):
    folder = sharded_without_manifest(good, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(folder / "inside")
    shard.symlink_to("inside")
    stored.Weights(folder)  # a link to a file of the same folder
    (folder / "inside").rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{shard.name}, a link that leads out of the folder"):
        stored.Weights(folder)
    linked = tmp_path / "linked"
    linked.symlink_to(sharded_without_manifest(good, tmp_path / "b"), target_is_directory=True)
    stored.Weights(linked)  # the folder itself may be anywhere


def test_links_of_the_hubs_cache(good, tmp_path):
    """models--ORG--NAME/snapshots/COMMIT has links to ../../blobs: that is how the hub's own library stores models."""
    folder = sharded_without_manifest(good, tmp_path)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert stored.Weights(snapshot).shapes


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_pickle_that_runs_code(good, tmp_path, how):
    from convert_hf_checkpoint import BinWeights

    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    if how == "zip":
        torch.save({"a": Evil(proof)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Evil(proof)}))
    with pytest.raises(UserError, match="it was not unpickled"):
        BinWeights(tmp_path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))  # it would have
    assert proof.is_dir()


def test_a_pickle_whose_tensor_is_larger_than_its_bytes(tmp_path):
    from convert_hf_checkpoint import BinWeights

    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="a is not stored whole"):
        BinWeights(tmp_path)


def test_code_beside_a_model_is_not_run(good, tmp_path):
    folder = sharded_without_manifest(good, tmp_path)
    proof = tmp_path / "proof"
    (folder / "modeling.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    mutations.load_model(folder)
    assert not proof.exists()


# -------------------------------------------------------------------------------------------------- chat templates

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for a in range(10**9) %}x{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a tree of recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "one large product": "{{ 'a' * 10**9 }}",
    "one large power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "one large filter": "{{ 'a' | center(10**11) }}",
    "made-up text": "{{ lipsum(n=10**8) }}",
    "a long result": "{{ 'a' * 2000000 }}",
    "deep brackets": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
}


def rendered(source):
    return chat_template.render(source, TURNS, [chat_template.Render(2)], {"eos_token": "</s>"})


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_ends(name):
    process, before = chat_template.TemplateProcess(), os.times()
    texts, problem = process.ask(ENDLESS[name], {"messages": TURNS, "wanted": [(2, False, None)], "values": {}})
    if process._process.poll() is None:
        process._end(process._process)
    after = os.times()
    assert texts is None and problem and "\n" not in problem and len(problem) <= 500
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


def test_a_template_cannot_reach_python_or_files(tmp_path):
    for source in (
        "{{ messages.__class__.__base__.__subclasses__() }}", "{{ raise_exception.__globals__ }}",
        "{{ ''.__init__.__globals__['os'] }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
        "{{ cycler.__init__.__globals__ }}", "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
    ):  # fmt: skip
        texts, problem = rendered(source)
        assert problem or not texts[0].text, source  # an error, or what is not there


def test_one_process_renders_again_and_again():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    processes = set()
    for _ in range(3):
        assert rendered(source) == ([("user: a</s>assistant: b</s>", [])], None)
        processes.add(chat_template._process()._process.pid)
    assert len(processes) == 1


def test_the_limits_are_not_those_of_the_caller():
    """The process that runs a template takes its own limits; this one keeps what it has."""
    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    assert rendered("a") == ([("a", [])], None)
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)] == before


# -------------------------------------------------------------------------------------------------------- adapters


def test_an_endless_pattern_of_an_adapter_ends(good):
    import signal

    folder, loader = good["adapter"]
    path = folder / "adapter_config.json"
    whole, manifest = path.read_text(), (folder / MANIFEST).read_text()
    before = signal.getsignal(signal.SIGALRM)
    try:
        (folder / MANIFEST).unlink()
        path.write_text(json.dumps(json.loads(whole) | {"target_modules": "(.*)*(.*)*(.*)*x"}))
        started = time.process_time()
        with pytest.raises(UserError, match="take too long to match|does not have"):
            loader(folder)
        assert time.process_time() - started < 2 * peft_format.PATTERN_SECONDS + 2
    finally:
        path.write_text(whole)
        (folder / MANIFEST).write_text(manifest)
    assert signal.getsignal(signal.SIGALRM) == before
    loader(folder)
