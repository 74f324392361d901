"""Starts the node agent if none runs: one winner of any number of ranks, the others wait.

Knows the lock, the listening socket that is passed on, and what a process must shed to outlive
its parent. Does not know what the agent does. It does not promise that the agent lives longer
than its cgroup: what is promised rests on files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import site
import subprocess
import sys
import time
from collections.abc import Mapping

from mtckpt.agent import address
from mtckpt.errors import AgentUnavailable

__all__ = ["child_environment", "ensure_agent", "shed_inheritance"]

logger = logging.getLogger(__name__)

# What the agent may need. Everything else, credentials above all, stays with the trainer.
_KEPT = frozenset(
    (
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "XDG_RUNTIME_DIR",
        "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONUSERBASE",
        "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE", "INVOCATION_ID",
        "SLURM_JOB_ID", "SLURM_STEP_ID", "KUBERNETES_SERVICE_HOST",
    )
)  # fmt: skip
_KEPT_PREFIXES = ("MTCKPT_", "LC_")
_DROPPED = frozenset(("MTCKPT_TOKEN", "MTCKPT_AGENT_SOCKET"))
_LOG_TAIL_BYTES = 2000
_MAX_OPEN_FILES = 65536
_OOM_SCORES = ("-500", "0")


def ensure_agent(timeout_s: float = 10.0) -> str:
    """The path of the agent's socket; starts one if none listens there.

    Returns as soon as the socket accepts connections: a new agent answers the first request when
    it has imported what it needs.

    Raises:
        AccessDenied: the directory cannot be trusted, with what to do.
        AgentUnavailable: a service does not answer, or an agent could not be started in time.
    """
    where = address.find()
    try:
        return _ensured(where, timeout_s)
    except (OSError, RuntimeError) as error:
        # No descriptor, no room for a lock or a socket, a place that is gone; RuntimeError: Python
        # begins no process any more, since this one is ending.
        raise AgentUnavailable(
            f"the node agent cannot be reached or started: {error}",
            actions=[f"see what {where.directory} says to `ls -la` and `df`, and `ulimit -n`"],
            socket=where.socket_path,
            timeout_s=timeout_s,
        ) from error


def _ensured(where: address.Address, timeout_s: float) -> str:
    deadline_s = time.monotonic() + timeout_s
    if where.service:
        if address.answers(where.socket_path, timeout_s):
            return where.socket_path
        raise AgentUnavailable(
            "the node agent's service does not run",
            state="nothing was done",
            actions=["start it: systemctl start mtckpt-agent", "or unset MTCKPT_AGENT_SOCKET"],
            socket=where.socket_path,
            timeout_s=timeout_s,
        )
    address.make_directory(where.directory)
    if address.answers(where.socket_path, timeout_s):
        return where.socket_path
    with address.locked(where, max(0.0, deadline_s - time.monotonic())):
        if address.answers(where.socket_path, max(0.0, deadline_s - time.monotonic())):
            return where.socket_path
        process = _start(where)
    _reap(process, where, max(1.0, deadline_s - time.monotonic()))
    return where.socket_path


def _start(where: address.Address) -> subprocess.Popen[bytes]:
    """Bind, listen, and hand the listening descriptor to a fresh program."""
    if not sys.executable:
        raise AgentUnavailable(
            "this process does not know its Python interpreter, so it cannot start the agent",
            state="nothing was done",
            actions=["run the agent as a service: mtckpt agent run"],
            socket=where.socket_path,
        )
    with contextlib.ExitStack() as stack:
        log_fd = address.open_private(where.log_path, os.O_WRONLY | os.O_APPEND)
        stack.callback(os.close, log_fd)
        listener = stack.enter_context(address.bind(where.socket_path))
        fd = listener.fileno()
        command = [sys.executable, "-m", "mtckpt.agent", "--fd", str(fd), "--dir", where.directory]
        try:
            # No preexec_fn: CPython then uses vfork, and nothing of ours runs between fork and
            # exec, where a process with CUDA or threads must not do anything.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_fd,
                pass_fds=(fd,),
                close_fds=True,
                cwd="/",
                env=child_environment(os.environ, _package_parent()),
                start_new_session=True,
            )
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(where.socket_path)
            raise AgentUnavailable(
                f"the node agent could not be started: {error}",
                state="nothing was done",
                socket=where.socket_path,
            ) from error


def _reap(process: subprocess.Popen[bytes], where: address.Address, timeout_s: float) -> None:
    """Wait for the program's first process, which forks and exits at once: no zombie is left."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a device: the kernel's then
            process.wait(1.0)
        raise AgentUnavailable(
            "the node agent did not start in time",
            state="nothing was done",
            actions=[f"see {where.log_path}"],
            socket=where.socket_path,
            timeout_s=timeout_s,
        ) from error
    if code != 0:
        raise AgentUnavailable(
            f"the node agent ended at once with status {code}: {log_tail(where)}",
            state="nothing was done",
            actions=[f"see {where.log_path}", f"try {sys.executable} -c 'import mtckpt.agent'"],
            socket=where.socket_path,
        )


def log_tail(where: address.Address) -> str:
    """The last lines of the agent's log, for an error's text."""
    try:
        with open(where.log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
            lines = log.read(_LOG_TAIL_BYTES).decode(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1] if lines else "its log is empty"


def _package_parent() -> str:
    """The directory that mtckpt was imported from."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def child_environment(environment: Mapping[str, str], package_parent: str) -> dict[str, str]:
    """What the agent inherits: where to find Python code and our settings, and no secrets.

    The agent runs in ``/``, so relative entries of PYTHONPATH are made absolute. A package that
    was found by the trainer's working directory or script directory alone is put on it.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if (name in _KEPT or name.startswith(_KEPT_PREFIXES)) and name not in _DROPPED
    }
    entries = [os.path.abspath(p) for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    installed = {os.path.realpath(path) for path in site.getsitepackages()}
    installed.add(os.path.realpath(site.getusersitepackages()))
    # Never site-packages itself: on PYTHONPATH it would come before the standard library.
    if package_parent not in entries and os.path.realpath(package_parent) not in installed:
        entries.append(package_parent)
    if entries:
        kept["PYTHONPATH"] = os.pathsep.join(entries)
    kept["PYTHONSAFEPATH"] = "1"  # else -m puts the working directory first
    return kept


def shed_inheritance() -> None:
    """Undo what a child has from its parent; runs in the new program, before its imports."""
    import resource
    import signal

    os.chdir("/")
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a terminal that goes away is not ours
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, _wanted_cpus() or range(os.cpu_count() or 1))
    with contextlib.suppress(OSError):  # raising priority needs a right that we may not have
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    for limit, wanted in (
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, resource.RLIM_INFINITY),
        (resource.RLIMIT_CORE, 0),  # a core dump would hold the model
    ):
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard) if wanted != resource.RLIM_INFINITY else hard
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (wanted, hard))
    for score in _OOM_SCORES:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(score)
            break
        except OSError:
            continue  # lowering needs a right; the next value may be allowed


def _wanted_cpus() -> set[int]:
    """MTCKPT_AGENT_CPUS, as in "0-3,8"; empty when it is not set or not a list of CPUs."""
    cpus: set[int] = set()
    try:
        for part in os.environ.get("MTCKPT_AGENT_CPUS", "").split(","):
            first, _, last = part.strip().partition("-")
            if first:
                cpus.update(range(int(first), min(int(last or first), 4096) + 1))
    except ValueError:
        logger.warning("MTCKPT_AGENT_CPUS is not a list of CPUs such as 0-3,8: not used")
        return set()
    return cpus
