"""A real Slurm on this machine for tests: its own munged, slurmctld and slurmd, below one folder, on free ports.

Needs Debian's packages slurm-wlm and munge, and root. Nothing of an installed Slurm's configuration is used or changed.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
PARTITION = "main"
CPUS = 4  # of each node, whatever this machine has
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=1
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN\n"


def missing():
    """Why Slurm cannot be started here; None if it can."""
    absent = [daemon for daemon in DAEMONS if not _program(daemon)]
    if absent:
        return f"no {', '.join(absent)} here (Debian and Ubuntu: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting Slurm needs root"


@contextmanager
def one_machine_slurm(nodes: int = 1):
    """Start Slurm with nodes node1, node2, ... of CPUS cores each, and stop it at the end.

    Gives the environment variables that make sbatch, squeue and scancel talk to it. Raises RuntimeError with the
    daemons' logs if it does not come up within 30 seconds. Its folder has a short path, because that of a socket must
    not be longer than 107 characters.
    """
    with (
        tempfile.TemporaryDirectory(prefix="slurm_", ignore_cleanup_errors=True) as folder,
        _started(Path(folder), nodes) as environment,
    ):
        yield environment


@contextmanager
def _started(folder: Path, nodes: int):
    names = [f"node{number}" for number in range(1, nodes + 1)]
    for name in ("state", *(f"spool_{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(1 + nodes)
    settings = CONF.format(folder=folder, host=host, port=port, partition=PARTITION)
    for name, its_port in zip(names, ports, strict=True):
        settings += NODE.format(name=name, host=host, port=its_port, cpus=CPUS)
    (folder / "slurm.conf").write_text(settings)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    commands = [
        [_program("munged"), "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        [_program("slurmctld"), "-D", "-c"],
        *([_program("slurmd"), "-D", "-c", "-N", name] for name in names),
    ]
    daemons = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
        _wait_until_idle(folder, environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def job_ids(environment):
    """The ids of all jobs that wait or run."""
    squeue = ["squeue", "--noheader", "--format=%i"]
    return subprocess.run(
        squeue, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.split()


def kill_node(environment, name, with_jobs):
    """Kill the slurmd of a node, and what runs there; Slurm is told what it would notice after its SlurmdTimeout."""
    conf = environment["SLURM_CONF"]
    slurmd = int(Path(conf).with_name(f"slurmd_{name}.pid").read_text())
    os.kill(slurmd, signal.SIGKILL)
    for process in psutil.process_iter() if with_jobs else ():
        with suppress(psutil.Error):
            variables = process.environ()
            if (variables.get("SLURM_CONF"), variables.get("SLURMD_NODENAME")) == (conf, name):
                for one in (process.parent(), process):
                    if one is not None and (one == process or one.name().startswith("slurmstepd")):
                        one.kill()
    down = ["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=dead"]
    subprocess.run(down, env=os.environ | environment, check=True)


def _wait_until_idle(folder, environment):
    for _ in range(150):
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        answer = subprocess.run(sinfo, env=os.environ | environment, capture_output=True, text=True)
        if answer.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in folder.glob("*.log"))
    raise RuntimeError(f"Slurm does not start: {answer.stdout}{answer.stderr}\n{logs}")


def _program(name):
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
