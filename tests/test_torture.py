"""A minute of what `make torture` does for hours, and that it notices what differs."""

import random

import pytest

from lsdseg.config.loader import load_config
from tests import torture
from tests.torture import Fault, Torture, TortureError, differences, results


def fault(kind, target, blocks, seconds=0.0):
    return Fault(kind=kind, target=target, blocks=blocks, seconds=seconds, choice=0.0, then="", pause=1.0, room=0)


def test_kills_change_nothing_and_differences_are_found(tmp_path, monkeypatch):
    plan = [[fault("KILL", "workers", 3), fault("POWER", "all", 4)]]
    monkeypatch.setattr(torture, "plan_step", lambda *_: plan)
    tortured = Torture(tmp_path, seed=1, kinds={"KILL", "POWER"}, steps=["predict"], uri="")
    expected = tortured.expected | {"volumes/other": ""}
    monkeypatch.setattr(tortured, "expected", expected)
    with pytest.raises(TortureError, match=r"differs from an undisturbed run: volumes/other$"):
        tortured.chain(1)
    assert tortured.counts[("POWER", "all")] >= 2  # the master, the supervisor and what workers there were
    assert tortured.counts[("KILL", "workers")] >= 1

    cfg = load_config(tortured.config, ["DATA.OUTFILE", str(tmp_path / "kept" / "outputs")])
    assert differences(results(cfg, ["predict"]), expected) == ["volumes/other"]
    arrays = [folder for folder in (tmp_path / "kept").rglob("pred_lsds") if folder.is_dir()]
    chunk = max(file for file in arrays[0].rglob("*") if file.is_file() and file.name[0].isdecimal())
    chunk.unlink()
    assert differences(results(cfg, ["predict"]), expected) == ["volumes/other", "volumes/pred_lsds"]


def test_segment_goes_on_after_kills_and_does_nothing_twice(tmp_path, monkeypatch):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    # In prediction or 02, and then later: 283 blocks are to be done, so none comes too late.
    kills = [
        fault("POWER", "all", rng.randrange(1, blocks), seconds=rng.uniform(0, seconds))
        for blocks, seconds in ((80, 0.3), (170, 2))
    ]
    monkeypatch.setattr(torture, "plan_step", lambda *_: [[kill] for kill in kills])
    tortured = Torture(tmp_path, seed, kinds={"POWER"}, steps=[torture.SEGMENT], uri="")
    assert tortured.chain(1) == tortured.expected
    assert any("final_segmentation" in name for name in tortured.expected)
    assert (tortured.ends[-9], tortured.moments) == (2, 2)

    step, blocks = max(tortured.blocks.items(), key=lambda item: item[1])
    log = tmp_path / "more" / "daisy_logs" / step / "worker_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("block 1: 0.1 s\n" * (blocks + 2))
    tortured.check_work(tmp_path / "more", moments=1)
    with pytest.raises(TortureError, match=f"{step} did {blocks + 2} blocks instead of {blocks}, in 0 faults"):
        tortured.check_work(tmp_path / "more", moments=0)


@pytest.mark.parametrize(
    ("status", "signals", "printed"),
    [(1, {15}, "Traceback"), (-9, {15}, ""), (-7, set(), "Bus error"), (143, set(), ""), (1, {2}, "OSError")],
)
def test_ends_that_no_fault_explains_are_found(status, signals, printed):
    with pytest.raises(TortureError, match=f"ended with status {status}"):
        torture.check_end(status, signals, printed)
    torture.check_end(0, signals, printed)
