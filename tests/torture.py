"""Kill, stop and starve the whole chain at random moments, and compare what comes out with an undisturbed run.

    python -m tests.torture --minutes 10 --seed 1

Prediction, 02, 03, 04 and 05 run on a small volume as a user starts them, with two workers; with --segment, segment.py
does all of it. Every chain begins in an empty folder on a small disk of its own. Signals reach the master, the
supervisor and the workers, or all of them at once, and the disk fills up; the same command then has to go on. At the
end every array, the graph and the tables must be those of a run that nothing disturbed, and no step may have done a
block twice, but for those that were in flight. What goes wrong when is drawn from the seed and the number of the chain.

The first difference, a command that hangs, does not resume or ends with a traceback, and a process that is left behind
end this with status 1 and a line that says how to repeat it. Nothing but processes started here is ever signaled: all
of them carry an environment variable with a random value.
"""

import argparse
import contextlib
import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from yacs.config import CfgNode

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder, lut_path
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.data_utils.volumes import list_arrays, open_array, read
from lsdseg.engine.post.tables import load_lut
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.engine.sample import samples_of
from lsdseg.models import build_model
from lsdseg.models.checkpoint import save_untrained
from lsdseg.rag import open_store
from tests.mongodb import TEST_URI, Server

SHAPE, VOXEL_SIZE = (48, 56, 60), (8, 8, 8)
MERGE_FUNCTION, THRESHOLD = "hist_quant_75", 0.3
SETTINGS = {
    "SYSTEM": {"NUM_WORKERS": 2},
    "TRAIN": {"DEVICE": "cpu", "THREADS": 1},
    "MODEL_ISO": {
        "NUM_FMAPS": 2,
        "NUM_FMAPS_OUT": 2,
        "FMAP_INC_FACTOR": 2,
        "DOWNSAMPLE_FACTORS": [[2, 2, 2]],
        "KERNEL_SIZE_DOWN": None,
        "KERNEL_SIZE_UP": None,
        "INPUT_SHAPE": [36, 36, 36],
        "GROW_INPUT": [0, 0, 0],
    },
    "INS_SEGMENT": {
        "BLOCK_SIZE": [12, 16, 16],
        "CONTEXT": [8, 8, 8],
        "EPSILON_AGGLOMERATE": 0.0,
        "MERGE_FUNCTION": MERGE_FUNCTION,
        "THRESHOLDS": [0.25, THRESHOLD],
    },
}
# Step -> script, its options, and how many blocks it has.
STEPS = {
    "predict": ("super_predicter_daisy.py", [], 27),
    "fragments": ("02_extract_fragments_blockwise.py", [], 64),
    "edges": ("03_agglomerate_blockwise.py", [], 64),
    "tables": ("04_find_segments_full.py", ["-mf", MERGE_FUNCTION], 0),
    "relabel": ("05_extract_segmentation_from_lut.py", ["-mf", MERGE_FUNCTION, "-th", str(THRESHOLD)], 64),
}
SEGMENT = "segment"  # the step that is all of them, in segment.py: prediction, 02, 03, and 05 for each threshold
ALL_STEPS = STEPS | {SEGMENT: ("segment.py", ["--blockwise"], 27 + 64 + 64 + 2 * 64)}
MARK = "LSD_TORTURE"  # environment variable of all processes that are started here
DISK = 64 * 2**20  # bytes of the disk of a chain; what it holds at the end is a tenth of that
LIMIT = 400  # seconds after which a command hangs
SECONDS_TO_END = 90  # for what is left of a run that was killed
ATTEMPTS = 3  # without a fault, before a command counts as one that does not resume

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "STOP": signal.SIGSTOP}
SIGNALS["POWER"] = signal.SIGKILL  # as when power fails: for all processes of a run at once
# (fault, target) -> how often, relative to the others.
FAULTS = {
    ("KILL", "workers"): 8,
    ("KILL", "worker"): 4,
    ("KILL", "master"): 4,
    ("KILL", "supervisor"): 3,
    ("POWER", "all"): 3,
    ("TERM", "master"): 2,
    ("TERM", "worker"): 1,
    ("TERM", "supervisor"): 1,
    ("INT", "master"): 2,
    ("INT", "worker"): 1,
    ("INT", "supervisor"): 1,
    ("STOP", "worker"): 2,
    ("STOP", "workers"): 1,
    ("STOP", "supervisor"): 1,
    ("STOP", "master"): 1,
    ("FULL", "disk"): 4,
}
KINDS = [*SIGNALS, "FULL"]
ENDS_THE_RUN = {("KILL", "master"), ("POWER", "all"), ("TERM", "master"), ("INT", "master")}


class TortureError(Exception):
    """What the suite does not do as it promises."""


@dataclass
class Fault:
    """Something that goes wrong in one attempt of a command.

    Attributes:
        kind: a signal or FULL.
        target: see FAULTS.
        blocks: wait until workers have done this many blocks more.
        seconds: then wait so long.
        choice: which of several workers, in 0..1.
        then: what happens after a STOP: CONT, KILL, or nothing: the suite has to replace the process.
        pause: seconds until that, or until the disk has room again.
        room: bytes that a full disk still has.
    """

    kind: str
    target: str
    blocks: int
    seconds: float
    choice: float
    then: str
    pause: float
    room: int


def plan_step(rng: random.Random, blocks: int, kinds: set[str], seconds: float) -> list[list[Fault]]:
    """The faults of each attempt of a step that runs undisturbed for so many seconds."""
    allowed = {(kind, target): weight for (kind, target), weight in FAULTS.items() if kind in kinds}
    if not blocks:  # no workers
        allowed = {fault: weight for fault, weight in allowed.items() if fault[1] in ("master", "disk")}
    attempts = []
    for _ in range(rng.randint(1, max(2, blocks // 40))):
        faults = []
        for _ in range(rng.randint(2, 10)):
            kind, target = rng.choices(list(allowed), list(allowed.values()))[0]
            by_blocks = blocks and rng.random() < 0.7
            faults.append(
                Fault(
                    kind=kind,
                    target=target,
                    blocks=rng.randint(1, max(1, blocks // 8)) if by_blocks else 0,
                    seconds=rng.uniform(0, 0.1) if by_blocks else rng.uniform(0, seconds),
                    choice=rng.random(),
                    then=rng.choice(["", "CONT", "KILL"]) if target != "master" else rng.choice(["CONT", "KILL"]),
                    pause=rng.uniform(0, 4),
                    room=rng.choice([0, rng.randint(0, 2**14), rng.randint(0, 2**19)]),
                )
            )
            if (kind, target) in ENDS_THE_RUN:
                break
        attempts.append(faults)
    return attempts


def prepare(home: Path, seed: int) -> Path:
    """Write a volume, the weights of a network and a config; returns the config."""
    checkpoint = home / "run" / "model_checkpoint_1"
    settings = SETTINGS | {
        "DATA": {"HOME": str(home)},
        "TRAIN": SETTINGS["TRAIN"] | {"CHECKPOINT": str(checkpoint)},
    }
    home.mkdir(parents=True)
    file = home / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    cfg = load_config(file)
    write_phantom(data_folder(cfg, "test") / "sample_A.zarr", SHAPE, seed=seed, voxel_size=VOXEL_SIZE)
    torch.manual_seed(seed)
    model = build_model(cfg)
    # Random weights give affinities that are nearly constant: spread them, so that there is something to segment.
    affinities = TilePredictor(cfg, model)(samples_of(cfg)[0].raw, (16, 16, 16), (20, 20, 20))["affs"]
    logits = torch.logit(torch.tensor(affinities)).flatten(1)
    (head,) = (layer for layer in model.aff_head.modules() if isinstance(layer, torch.nn.Conv3d))
    with torch.no_grad():
        factor = 2 / logits.std(1)
        head.weight.mul_(factor[:, None, None, None, None])
        head.bias.copy_((head.bias - logits.median(1).values) * factor + 0.5)
    save_untrained(checkpoint, model, cfg)
    return file


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, of DISK bytes, at a new folder; an ordinary folder without the right to mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_fill(folder: Path) -> bool:
    """Whether this folder has a small disk of its own."""
    return os.path.ismount(folder) and shutil.disk_usage(folder).total <= DISK


def fill(folder: Path, room: int) -> Path:
    """Fill a small disk but for so many bytes; returns the file to delete."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16 if shutil.disk_usage(folder).free > 2**17 else 2**12))
    with open(ballast, "ab") as file, contextlib.suppress(OSError):
        file.truncate(max(0, ballast.stat().st_size - room))
    return ballast


class Processes:
    """All processes that carry a mark in their environment: those that one chain started, wherever they went."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | {
            MARK: self.mark,
            "PYTHONPATH": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
        }

    def all(self) -> list[psutil.Process]:
        """Those that still run; zombies do not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def below(self, master: psutil.Process) -> dict[str, list[psutil.Process]]:
        """The supervisor, if there is one, and the workers of a master."""
        roles: dict[str, list[psutil.Process]] = {"supervisor": [], "worker": []}
        with contextlib.suppress(psutil.Error):
            for process in master.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "lsdseg.engine.blocks.worker" in process.cmdline():
                        roles["worker"].append(process)
                    elif process.ppid() == master.pid and "resource_tracker" not in " ".join(process.cmdline()):
                        roles["supervisor"].append(process)
        return roles

    def wait_for_end(self) -> None:
        """Wait for what is left of a run that was killed.

        Raises:
            TortureError: something does not end.
        """
        deadline = time.monotonic() + SECONDS_TO_END
        while left := self.all():
            if time.monotonic() > deadline:
                raise TortureError(f"left behind after {SECONDS_TO_END} s: {[describe(process) for process in left]}")
            time.sleep(0.3)

    def kill(self) -> None:
        """End them all."""
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                process.kill()


def describe(process: psutil.Process) -> str:
    """What a process is, for a message."""
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())[-120:]}"
    return str(process.pid)


class Attempt:
    """One run of a command, and what goes wrong in it.

    Args:
        command: the command line.
        folder: where it runs; on a small disk.
        log: file that its output is appended to; elsewhere.
        processes: those of the chain.

    Attributes:
        signals: those that reached the master.
        done: (fault, target) of all faults that happened, once for each process that got a signal.
        moments: how many faults happened.
    """

    def __init__(self, command: list[str], folder: Path, log: Path, processes: Processes):
        self.folder, self.log, self.processes = folder, log, processes
        self.of_segment = any(word.endswith(ALL_STEPS[SEGMENT][0]) for word in command)
        self.began = time.monotonic()
        self.printed = log.stat().st_size if log.exists() else 0
        self.blocks_before = self._blocks()
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, env=processes.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.master = psutil.Process(self.process.pid)
        self.signals: set[int] = set()
        self.done: list[tuple[str, str]] = []
        self.moments = 0
        self.later: list[tuple[float, str, psutil.Process | Path]] = []  # what to do after a pause

    def run(self, faults: list[Fault]) -> int:
        """Let the faults happen, one after the other, and wait for the end; returns the exit status.

        Raises:
            TortureError: the command hangs.
        """
        try:
            for fault in faults:
                if not self._wait(self._blocks() + fault.blocks, fault.seconds):
                    break
                before = len(self.done)
                self._inflict(fault)
                self.moments += len(self.done) > before
            else:
                self._wait(sys.maxsize, 0)
        finally:
            for _, what, where in self.later:
                self._relieve(what, where)
        return self.process.returncode

    def output(self) -> str:
        """What the command printed."""
        with open(self.log, "rb") as file:
            file.seek(self.printed)
            return file.read().decode(errors="replace")

    def _wait(self, blocks: int, seconds: float) -> bool:
        """Wait until so many blocks are done, and then so long; False if the command ended before."""
        until = None
        while until is None or time.monotonic() < until:
            for item in [item for item in self.later if item[0] <= time.monotonic()]:
                self.later.remove(item)
                self._relieve(*item[1:])
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.began > LIMIT:
                left = [describe(process) for process in self.processes.all()]
                raise TortureError(f"hangs: no end after {LIMIT} s; running: {left}")
            if until is None and self._blocks() >= blocks:
                until = time.monotonic() + seconds
            time.sleep(0.02)
        return True

    def _blocks(self) -> int:
        """How many blocks the workers' logs report."""
        return blocks_logged(self.folder).total()

    def _inflict(self, fault: Fault) -> None:
        if fault.kind == "FULL":
            if not can_fill(self.folder):
                return
            self.later.append((time.monotonic() + fault.pause, "free", fill(self.folder, fault.room)))
            self._happened(fault, f"{fault.room} bytes left for {fault.pause:.1f} s")
            return
        below = self.processes.below(self.master)
        workers = below["worker"]
        targets = {
            "master": [self.master],
            "supervisor": below["supervisor"][:1],
            "workers": workers,
            "worker": workers[int(fault.choice * len(workers)) :][:1],
            "all": self.processes.all() if fault.target == "all" else [],
        }[fault.target]
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGNALS[fault.kind])
                self._happened(fault, f"process {process.pid}")
                # A script that segment.py has started ends it, too.
                if process == self.master or (self.of_segment and process in below["supervisor"]):
                    self.signals.add(SIGNALS[fault.kind])
                if fault.kind == "STOP" and fault.then:
                    self.later.append((time.monotonic() + fault.pause, fault.then, process))

    def _happened(self, fault: Fault, where: str) -> None:
        self.done.append((fault.kind, fault.target))
        blocks, seconds = self._blocks() - self.blocks_before, time.monotonic() - self.began
        then = f", then {fault.then or 'nothing'}" if fault.kind == "STOP" else ""
        say(f"  {fault.kind} {fault.target}: {where}, after {blocks} blocks and {seconds:.1f} s{then}")

    def _relieve(self, what: str, where: psutil.Process | Path) -> None:
        if isinstance(where, Path):
            where.unlink(missing_ok=True)
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            where.send_signal(signal.SIGCONT if what == "CONT" else signal.SIGKILL)
            if where == self.master and what == "KILL":
                self.signals.add(signal.SIGKILL)
                self.done.append(("KILL", "master"))


def blocks_logged(folder: Path) -> Counter[str]:
    """How many blocks the logs of the workers report, of single steps and of segment.py: log folder -> blocks."""
    blocks: Counter[str] = Counter()
    for where in (".", "out_work"):
        for log in folder.glob(f"{where}/daisy_logs/*/worker_*.log"):
            blocks[log.parent.name] += sum(line.startswith(b"block ") for line in log.read_bytes().splitlines())
    return blocks


def digest(*arrays: np.ndarray) -> str:
    """Hash of the types, shapes and values of arrays."""
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def results(cfg: CfgNode, steps: list[str]) -> dict[str, str]:
    """A hash of every array with its place, of the graph, of every look-up table, and of the tables of segments."""
    (sample,) = samples_of(cfg)
    found = {}
    for name in list_arrays(sample.output):
        array = open_array(sample.output, name)
        found[name] = digest(read(array), np.array([*array.offset, *array.voxel_size]))
    if "fragments" in steps:
        store = open_store(cfg, sample.output, "r")
        found["nodes"] = _digest_rows(*store.read_nodes(0, 2**62))
        if "edges" in steps:
            columns = zip(*store.edges(MERGE_FUNCTION), strict=True)
            found["edges"] = _digest_rows(*(np.concatenate(column) for column in columns))
    if "tables" in steps:
        for threshold in cfg.INS_SEGMENT.THRESHOLDS:
            path = lut_path(sample.output, MERGE_FUNCTION, threshold)
            found[path.name] = digest(load_lut(path))
        found["tables"] = str(sorted(path.name for path in path.parent.glob("*.npz")))
    return found | _tables_of_segments(sample.output.parent)


def results_of_segment(folder: Path) -> dict[str, str]:
    """A hash of every array and table that segment.py wrote, also of what lies between."""
    found = {}
    for zarr in folder.rglob("*.zarr"):
        for name in list_arrays(zarr):
            array = open_array(zarr, name)
            found[f"{zarr.name}/{name}"] = digest(read(array), np.array([*array.offset, *array.voxel_size]))
    found |= {path.name: digest(load_lut(path)) for path in folder.rglob("luts_full/*.npz")}
    return found | _tables_of_segments(folder)


def _tables_of_segments(folder: Path) -> dict[str, str]:
    """A hash of every file of the tables of segments below a folder. Records have other ids each time."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*.segments/**/*") if file.is_file()}
    return {
        name: "" if file.name == "record.json" else digest(np.fromfile(file, np.uint8)) for name, file in files.items()
    }


def _digest_rows(*columns: np.ndarray) -> str:
    """Hash of the rows of a table, in any order."""
    flat = [part for column in columns for part in np.atleast_2d(column.T)]
    order = np.lexsort(flat[::-1])
    return digest(*(column[order] for column in flat))


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The names of what is missing, too much or different."""
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


class Torture:
    """Chains of one seed, and what the undisturbed one gave.

    Args:
        work: an empty folder.
        seed: decides what goes wrong, and the volume and the weights.
        kinds: the kinds of faults.
        steps: the first few of STEPS, or SEGMENT.
        uri: MongoDB that keeps the graph; empty: Parquet files.
    """

    def __init__(self, work: Path, seed: int, kinds: set[str], steps: list[str], uri: str):
        self.work, self.seed, self.kinds, self.steps, self.uri = work, seed, kinds, steps, uri
        self.config = prepare(work / "home", seed)
        self.seconds = dict.fromkeys(steps, 0.0)  # that each step takes undisturbed
        self.counts: Counter[tuple[str, str]] = Counter()  # (fault, target) -> how often
        self.ends: Counter[int] = Counter()  # exit status -> how often
        self.chains = self.refused = self.moments = 0
        self.blocks: Counter[str] = Counter()  # log folder of a step -> blocks done, undisturbed
        self.expected: dict[str, str] = {}
        self.expected = self.chain(0, disturbed=False)

    def chain(self, number: int, disturbed: bool = True) -> dict[str, str]:
        """Run the chain in a new folder, and compare.

        Returns:
            The hashes of all results.

        Raises:
            TortureError: results differ, or something does not do as promised; what was written is kept in `work/kept`.
        """
        folder, processes = self.work / f"chain_{number}", Processes()
        rng, moments = random.Random(f"{self.seed} {number}"), self.moments
        settings = ["DATA.OUTFILE", str(folder / "outputs")]
        if self.uri:
            settings += ["DATA.DB_HOST", self.uri, "DATA.DB_NAME", f"torture_{processes.mark}"]
        with small_disk(folder):
            try:
                for step in self.steps:
                    plan = plan_step(rng, ALL_STEPS[step][2], self.kinds, self.seconds[step]) if disturbed else []
                    began = time.monotonic()
                    self._step(step, self._command(step, folder, settings), folder, processes, plan)
                    if not disturbed:
                        self.seconds[step] = time.monotonic() - began
                processes.wait_for_end()
                self.check_work(folder, self.moments - moments)
                if self.steps == [SEGMENT]:
                    found = results_of_segment(folder)
                else:
                    found = results(load_config(self.config, settings), self.steps)
                if disturbed and (different := differences(found, self.expected)):
                    raise TortureError(f"differs from an undisturbed run: {', '.join(different)}")
            except TortureError:
                processes.kill()
                shutil.copytree(folder, self.work / "kept", ignore=shutil.ignore_patterns("ballast"))
                raise
            finally:
                processes.kill()
        shutil.rmtree(folder)
        self.chains += disturbed
        return found

    def _command(self, step: str, folder: Path, settings: list[str]) -> list[str]:
        script, options, _ = ALL_STEPS[step]
        command = [sys.executable, str(CHECKOUT / script), "-c", str(self.config), *options]
        if step != SEGMENT:
            return [*command, *settings]
        volume = data_folder(load_config(self.config), "test") / "sample_A.zarr"
        return [*command, "--raw", str(volume), "--out", str(folder / "out.zarr")]

    def _step(self, step: str, command: list[str], folder: Path, processes: Processes, plan: list[list[Fault]]) -> None:
        """Run one command until it is done: first with the faults of the plan, then without."""
        say(f"{folder.name} {step}")
        in_vain = 0
        while in_vain < ATTEMPTS:
            attempt = Attempt(command, folder, self.work / f"{folder.name}_{step}.log", processes)
            status = attempt.run(plan.pop(0) if plan else [])
            self.counts.update(attempt.done)
            self.moments += attempt.moments
            self.ends[status] += 1
            printed = attempt.output()
            say(f"  ended with {status}: {(printed.splitlines() or [''])[-1][:150]}")
            check_end(status, attempt.signals, printed)
            if status == 0:
                return
            if not attempt.done:
                in_vain += 1
                self.refused += 1
                processes.wait_for_end()
        raise TortureError(f"{step} does not resume: {printed[-1000:]}")

    def check_work(self, folder: Path, moments: int) -> None:
        """Check that no step did a block twice, but for those that were in flight when something happened.

        Args:
            folder: of the chain.
            moments: how many faults happened in it.

        Raises:
            TortureError: it did.
        """
        done = blocks_logged(folder)
        if not self.expected:
            self.blocks = done
        in_flight = SETTINGS["SYSTEM"]["NUM_WORKERS"] * moments
        for step, count in done.items():
            if count > self.blocks[step] + in_flight:
                raise TortureError(f"{step} did {count} blocks instead of {self.blocks[step]}, in {moments} faults")


def check_end(status: int, signals: set[int], printed: str) -> None:
    """Check that a command ended as it promises: well, with one line, or by a signal that it got.

    Raises:
        TortureError: it did not.
    """
    if status in {0, 2, *(-number for number in signals), *(128 + number for number in signals)}:
        return
    # Ctrl-C while libraries are imported, before the suite has begun, is Python's to report.
    if signal.SIGINT in signals and "KeyboardInterrupt" in printed:
        return
    raise TortureError(f"a command ended with status {status}: {printed[-3000:]}")


def say(line: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


@contextlib.contextmanager
def database(wanted: bool, work: Path) -> Iterator[str]:
    """The URI of the MongoDB that LSD_TEST_MONGODB_URI names, or of one that lives as long; empty if none is wanted."""
    if not wanted or TEST_URI:
        yield TEST_URI if wanted else ""
        return
    server = Server(work / "mongodb")
    server.start()
    try:
        yield server.uri
    finally:
        server.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run chains for as long as told; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill, stop and starve the chain, and compare the results.")
    parser.add_argument("--minutes", type=float, default=10, help="no chain begins later than this (default: 10)")
    parser.add_argument("--moments", type=int, help="no chain begins after so many faults")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: a new one")
    parser.add_argument("--chain", type=int, help="run only the chain of this number")
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--last-step", choices=STEPS, default=list(STEPS)[-1], help="leave out what comes after it")
    parser.add_argument("--segment", action="store_true", help="let segment.py run all steps")
    parser.add_argument("--mongodb", action="store_true", help="keep the graph in MongoDB")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default: one in the temporary folder)")
    options = parser.parse_args(arguments)
    repeat = f"python -m tests.torture --seed {options.seed} --faults {' '.join(options.faults)}"
    repeat += f" --last-step {options.last_step}" + " --segment" * options.segment + " --mongodb" * options.mongodb
    work = options.folder or Path(tempfile.mkdtemp(prefix="torture_"))
    steps = [SEGMENT] if options.segment else list(STEPS)[: list(STEPS).index(options.last_step) + 1]
    say(f"seed {options.seed}, in {work}")
    with database(options.mongodb, work) as uri:
        torture = Torture(work, options.seed, set(options.faults), steps, uri)
        began, number = time.monotonic(), options.chain or 1
        failure: BaseException | None = None
        try:
            while True:
                torture.chain(number)
                number += 1
                if options.chain or torture.moments >= (options.moments or math.inf):
                    break
                if time.monotonic() - began > 60 * options.minutes:
                    break
        except (TortureError, KeyboardInterrupt) as error:
            failure = error
    report(torture, time.monotonic() - began)
    if isinstance(failure, TortureError):
        print(f"FAILED in chain {number}: {failure}\nwhat was written is in {work}", flush=True)
        print(f"to repeat it (times differ): {repeat} --chain {number}", flush=True)
        return 1
    shutil.rmtree(work)
    print("no difference" + " in chains that ended" * bool(failure), flush=True)
    return 130 if failure else 0


def report(torture: Torture, seconds: float) -> None:
    """Print how often what happened."""
    kinds: Counter[str] = Counter()
    for (kind, target), count in sorted(torture.counts.items()):
        print(f"{kind:>5} {target:<11} {count}")
        kinds[kind] += count
    kills = sum(kinds.values()) - kinds["FULL"] - kinds["STOP"]
    print(
        f"exit statuses: {dict(sorted(torture.ends.items()))}; attempts without a fault that failed: {torture.refused}"
    )
    print(
        f"seed {torture.seed}: {torture.chains} chains in {seconds / 60:.1f} minutes: {kills} kills "
        f"({60 * kills / max(seconds, 1):.1f} a minute), {kinds['STOP']} stops, {kinds['FULL']} full disks, at "
        f"{torture.moments} moments",
        flush=True,
    )


if __name__ == "__main__":
    # SIGTERM ends this as Ctrl-C does, for disks to be unmounted and processes to be ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
