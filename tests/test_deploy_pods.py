"""The manifests at work: agent and trainer as their pods have it, on a node of directories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_checks import until
from kustomizing import Manifest, pod_specs, render
from other_users import python_for_others, unshared
from pods import Node, Pod
from scene_trainer import SceneTrainer

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


@pytest.fixture
def node(runtime_dir: Path, ram_dir: Path) -> Iterator[Node]:
    tried = subprocess.run([*unshared(), "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("namespaces cannot be made here")
    made = Node(runtime_dir, ram_dir)
    yield made
    made.close()


def spec_of(place: str, kind: str) -> Manifest:
    (manifest,) = (m for m in render(DEPLOY / place) if m["kind"] == kind)
    ((_, spec),) = pod_specs(manifest)
    return spec


def named(spec: Manifest, name: str) -> Manifest:
    every = [*spec.get("initContainers", ()), *spec["containers"]]
    return next(container for container in every if container["name"] == name)


def trainer_in(pod: Pod, container: Manifest, num: int) -> SceneTrainer:
    return SceneTrainer(
        "r",
        pod.moved("/mtckpt/disk/runs"),
        wrap=pod.wrap(container),
        python=(python_for_others(),),
        # What this test process says of its own directories is not known in the pod.
        environment={"MTCKPT_RAM_DIR": "", "MTCKPT_RUNTIME_DIR": "", **pod.environment(container)},
        num=num,
    )


def start_agent(pod: Pod, agent: Manifest, log: Path) -> None:
    """As the kubelet does: the command, then the startup probe until it succeeds."""
    with log.open("wb") as file:
        process = pod.start(agent, file)
    probe = agent["startupProbe"]["exec"]["command"]

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        return pod.run(agent, probe).returncode == 0

    until(is_ready, 40.0)


def test_memory_outlives_a_training_pod(node: Node, tmp_path: Path) -> None:
    """The agent of the DaemonSet; a training pod saves and is gone; the next one goes on."""
    spec = spec_of("overlays/daemonset", "DaemonSet")
    directories, agent = named(spec, "directories"), named(spec, "agent")
    pod = node.pod(spec)
    for _ in range(2):  # and again when the pod starts again on this node
        done = pod.run(directories, directories["command"])
        assert done.returncode == 0, done.stderr
    start_agent(pod, agent, tmp_path / "log")
    assert pod.run(agent, agent["livenessProbe"]["exec"]["command"]).stdout == "it answers\n"
    training = spec_of("examples/jobset", "JobSet")
    for num, step in ((1, 4), (2, 5)):
        pod = node.pod(training)
        trainer = trainer_in(pod, named(training, "trainer"), num)
        restored = trainer.do("restore")
        assert (restored["step"], restored["bad"]) == (None if num == 1 else 4, "")
        assert restored["sources"] == ([] if num == 1 else ["ram"])
        assert trainer.do("hello")["uid"] == 1000
        trainer.save(step, "local")
        pod.kill()
        trainer.close()
    records = list(node.of_the_host("/var/lib/mtckpt").rglob("rank-00000.json"))
    assert {record.stat().st_uid for record in records} == {10001}
    assert list((node.of_the_host("/dev/shm") / "mtckpt").rglob("rank-00000.safetensors"))


@pytest.mark.parametrize("kind", ["a link", "a directory", "a file"])
def test_what_somebody_planted_in_the_nodes_memory_is_not_given_away(node: Node, kind: str) -> None:
    spec = spec_of("overlays/daemonset", "DaemonSet")
    directories = named(spec, "directories")
    pod = node.pod(spec)
    planted = node.of_the_host("/dev/shm") / "mtckpt"
    victim = node.of_the_host("/etc")
    if kind == "a link":
        planted.symlink_to(victim)
    elif kind == "a directory":
        planted.mkdir()
    else:
        planted.touch()
    os.chown(planted, 12002, 12002, follow_symlinks=False)
    before = victim.stat(), planted.lstat()
    done = pod.run(directories, directories["command"])
    assert done.returncode == 1
    assert "somebody else's" in done.stderr
    for was, now in zip(before, (victim.stat(), planted.lstat()), strict=True):
        assert (was.st_uid, was.st_mode) == (now.st_uid, now.st_mode)


def test_memory_outlives_a_container_beside_its_sidecar(node: Node, tmp_path: Path) -> None:
    """One pod, one user: its trainer ends and is started again, and the agent stays."""
    spec = spec_of("overlays/sidecar", "JobSet")
    agent, container = named(spec, "agent"), named(spec, "trainer")
    pod = node.pod(spec)
    start_agent(pod, agent, tmp_path / "log")
    for num, step in ((1, 4), (2, 5)):
        trainer = trainer_in(pod, container, num)
        restored = trainer.do("restore")
        assert restored["step"] == (None if num == 1 else 4)
        assert restored["sources"] == ([] if num == 1 else ["ram"])
        trainer.save(step, "local")
        pod.kill("trainer")
        trainer.close()


def test_a_node_gets_a_tmpfs_of_large_pages_once(tmp_path: Path) -> None:
    """The command itself, in a namespace of mounts: mounted, left alone, or refused."""
    if subprocess.run([*unshared(), "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("namespaces cannot be made here")
    container = named(spec_of("overlays/daemonset-huge-pages", "DaemonSet"), "huge-pages")
    shell, options, script = container["command"]
    script = script.replace("/host/shm", str(tmp_path.resolve()))
    at = tmp_path.resolve() / "mtckpt"

    def after(more: str) -> subprocess.CompletedProcess[str]:
        command = [*unshared(), shell, options, f"({script}) && {more}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    for _ in range(2):  # without the directory, and with it
        done = after(f"({script}) && grep ' {at} ' /proc/mounts")
        if "wrong fs type" in done.stderr:
            pytest.skip("a kernel without large pages")
        assert done.returncode == 0, done.stderr
        (mounted,) = done.stdout.splitlines()
        assert "huge=within_size" in mounted
        assert at.is_dir()
    (at / "slot-0").touch()
    done = after("true")
    assert done.returncode == 1
    assert "holds slots" in done.stderr
    at.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "slot-0").unlink()
    at.symlink_to("elsewhere")
    assert "somebody else's" in after("true").stderr
    at.unlink()
    at.mkdir()
    os.chown(at, 1000, 1000)
    assert "somebody else's" in after("true").stderr
