"""Memory that a process may still take, in a container or a job with a limit of its own."""

import pytest

from training.memory import machine

GB = 10**9


def make_group(folder, version, limit, taken, cached):
    _, limit_file, usage_file, keys = machine.CGROUPS[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 17\n{keys[0]} {cached}\nslab 3\n{keys[1]} 5\n")


def left(root, groups):
    """What is left in the groups of a process for which /proc/self/cgroup says `groups`."""
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    return sorted(machine.free_in_groups(root))


def test_the_limits_of_a_group_and_of_those_around_it_count(tmp_path):
    mount = tmp_path / "sys/fs/cgroup"
    make_group(mount / "slurm/job_1", 2, 8 * GB, 3 * GB, GB)
    make_group(mount / "slurm", 2, 9 * GB, 5 * GB, 0)
    make_group(mount / "other", 2, GB, 0, 0)
    assert left(tmp_path, "0::/slurm/job_1\n") == [4 * GB + 5, 6 * GB + 5]


def test_a_group_without_a_limit_does_not_count(tmp_path):
    make_group(tmp_path / "sys/fs/cgroup/user.slice", 2, "max", GB, 0)
    assert left(tmp_path, "0::/user.slice\n") == []


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_in_a_container_the_mount_itself_is_the_group(tmp_path, path):
    make_group(tmp_path / "sys/fs/cgroup/memory", 1, 4 * GB, GB, 0)
    assert left(tmp_path, f"9:name=systemd:/\n5:cpu,memory:{path}\n3:cpuset:/\n0::/\n") == [3 * GB + 5]


def test_a_system_without_groups_has_no_limit(tmp_path):
    assert list(machine.free_in_groups(tmp_path)) == []


def test_the_smallest_limit_is_what_is_free(monkeypatch):
    host = machine.free_memory("cpu")
    assert host > 0
    monkeypatch.setattr(machine, "free_in_groups", lambda: iter([host * 2, 12345]))
    assert machine.free_memory("cpu") == 12345
    monkeypatch.setattr(machine, "free_in_groups", lambda: iter([-5]))
    assert machine.free_memory("cpu") == 0
