"""What the host has left, as Linux says it in files."""

from pathlib import Path

from minitune import host


def test_the_host_s_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/jobs/7"
    for folder in (tmp_path / "proc/self", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable: 50 kB\n")
    assert host.free_memory(tmp_path) == 50 * 1024  # no groups
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/jobs\n0::/jobs/7\n")
    for name, said in (("max", "max"), ("current", "30000"), ("stat", "anon 20000\nfile 9500\nshmem 500")):
        (group / f"memory.{name}").write_text(said + "\n")
    assert host.free_memory(tmp_path) == 50 * 1024  # no limit
    (group / "memory.max").write_text("40000\n")
    assert host.free_memory(tmp_path) == 40000 - 30000 + 9000
    step = group / "step_0"  # a limit of the group above holds, too
    step.mkdir()
    (step / "memory.max").write_text("max\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/7/step_0\n")
    assert host.free_memory(tmp_path) == 40000 - 30000 + 9000
    (group / "memory.max").write_text("10000\n")
    assert host.free_memory(tmp_path) == 0
    assert 0 < host.free_memory() < 2**50
