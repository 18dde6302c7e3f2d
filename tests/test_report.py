import base64
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evaluate import config  # noqa: F401

from lsdseg.data_utils.layout import neurons_path, scores_path
from lsdseg.data_utils.volumes import open_array, write_array
from lsdseg.engine.evaluate.evaluate import evaluate
from lsdseg.engine.evaluate.metrics import count_overlaps, list_mistakes, list_neurons, place_of, scores
from lsdseg.engine.evaluate.report import Shown, render
from lsdseg.errors import UserError


def columns(*widths):
    """Labels (3, 5, n): pairs of an id and how many columns it fills."""
    ids, counts = zip(*widths, strict=True)
    return np.repeat(ids, counts).astype(np.uint64) * np.ones((3, 5, sum(counts)), np.uint64)


TRUTH = columns((1, 8), (2, 8))
LABELS = columns((7, 3), (8, 8), (9, 5))  # neuron 1 is split, and its larger part is merged with one of neuron 2


def test_neurons_share_the_voi():
    table = count_overlaps([(LABELS, TRUTH)])
    neurons = {row["neuron"]: row for row in list_neurons(*table)}
    assert (neurons[1]["voxels"], neurons[1]["segments"], neurons[1]["merged_with"]) == (120, 2, [2])
    sliver = np.where((TRUTH == 2) & (np.arange(16) == 15), 7, LABELS)  # 15 voxels of neuron 2 in segment 7
    sliver[1:] = LABELS[1:]
    sliver[0, 1:] = LABELS[0, 1:]
    many = [row["segments"] for row in list_neurons(*count_overlaps([(sliver, TRUTH)]))]
    assert many == [2, 2]  # 1 of 120 voxels is a sliver
    assert sum(row["share"] for row in neurons.values()) == pytest.approx(1)
    of_one = scores(*count_overlaps([(LABELS[..., :8], TRUTH[..., :8])]))  # neuron 1 is half of the voxels
    assert neurons[1]["split_share"] * scores(*table)["voi_split"] == pytest.approx(of_one["voi_split"] / 2)


def test_mistakes_are_found_where_they_are():
    mistakes = list_mistakes(*count_overlaps([(LABELS, TRUTH)]), 10)
    assert [(m.kind, m.segment, m.neuron, m.voxels) for m in mistakes] == [("split", 7, 1, 45), ("split", 8, 2, 45)]
    assert [place_of(m, LABELS, TRUTH)[2] for m in mistakes] == [2, 10]
    truth = columns((1, 10), (2, 6))
    (merge,) = list_mistakes(*count_overlaps([(columns((7, 16)), truth)]), 10)
    assert (merge.kind, merge.segment, merge.neuron) == ("merge", 7, 2)
    assert place_of(merge, columns((7, 16)), truth) == (1, 2, 10)
    assert not list_mistakes(*count_overlaps([(TRUTH, TRUTH)]), 10)


def test_report_of_a_sample_holds_its_pictures(config):  # noqa: F811
    cfg, sample, output = config
    for path, name, labels in ((sample, cfg.DATA.NEURON_LABELS, TRUTH), (output, "volumes/segmentation_050", LABELS)):
        write_array(path, name, labels, voxel_size=(10, 10, 10), offset=(50, 0, 0))
    evaluate(cfg)
    html = scores_path(output, "html").read_text(encoding="utf-8")
    places = re.findall(r"at ([\d., ]+) µm \(z, y, x\), voxel ([\d, ]+)</h3>", html)
    assert places == [("0.06, 0.02, 0.02", "1, 2, 2"), ("0.06, 0.02, 0.1", "1, 2, 10")]
    images = re.findall(r'href="data:image/png;base64,([^"]*)"', html)
    assert [base64.b64decode(image)[:4] for image in images] == [b"\x89PNG"] * 3 * (2 + 2)
    assert html.count("<strong>xz at y 0.02 µm, section 2</strong>") == 4
    with neurons_path(output).open() as file:
        assert [(row["neuron"], row["merged_with"]) for row in csv.DictReader(file)] == [("2", "1"), ("1", "2")]


def test_pictures_of_an_error_tint_its_neuron_and_its_segment(config):  # noqa: F811
    _, sample, output = config
    raw, segmentation = np.full(TRUTH.shape, 100, np.uint8), LABELS.copy()
    for path, name, array in ((sample, "volumes/raw", raw), (output, "volumes/segmentation_050", segmentation)):
        write_array(path, name, array, voxel_size=(10, 10, 10), offset=(50, 0, 0))
    array = open_array(output, "volumes/segmentation_050")
    shown = Shown(open_array(sample, "volumes/raw"), LABELS, TRUTH, array.offset, array)
    (mistake, _) = list_mistakes(*count_overlaps([(LABELS, TRUTH)]), 10)  # neuron 1 in segment 7
    title, html = shown.mistake(mistake, 1)
    assert title.startswith("1. split: the part of neuron 1 in segment 7 is cut off")
    png = re.search(r'href="data:image/png;base64,([^"]*)"', html)[1]  # the plane xy, 16 voxels wide
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")).astype(int)
    voxel = pixels.shape[1] // 16
    both, neuron, neither = (pixels[pixels.shape[0] // 2, round(x * voxel)] for x in (1.5, 5, 12))
    assert np.ptp(neither) == 0
    assert neuron[0] > neuron[2]  # orange
    assert both[2] > neuron[2]  # and blue


@pytest.mark.parametrize("count", [3, 3000])
def test_report_shows_the_worst_neurons_and_says_how_many_there_are(count):
    random = np.random.default_rng(0)
    truth = random.integers(1, count + 1, (20, 50, 60), dtype=np.uint64)
    table = count_overlaps([(truth // np.uint64(2), truth)])
    row = {
        f"{key}{kind}": value
        for key, value in scores(*table).items()
        for kind in ("", "_without_boundary", "_connected")
    }
    row |= {
        "dataset": "volumes/<b>",
        "written": False,
        "method": "waterz",
        "merge_function": "mean",
        "threshold": 0.5,
        "erl_nm": None,
        "normalized_erl": None,
        "splits_needed": 12,
        "merges_needed": None,
    }
    report = {"sample": "a&b.zarr", "ground_truth": "labels", "best": "volumes/<b>", "scores": [row], "skeletons": None}
    neurons = list_neurons(*table)
    html = render(report | {"objects": count, "voxels": truth.size}, neurons, [], {})
    shown = min(sum(neuron["share"] > 0 for neuron in neurons), 50)
    assert f"The {shown} worst of {count} neurons" in html
    assert "<td>&lt;b&gt; (not written)</td>" in html
    assert "a&amp;b.zarr" in html
    assert html.count("<tr") == 2 * 2 + 1 + shown
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)', html))


def test_run_lengths_come_from_swc_files_or_the_ground_truth(config, tmp_path):  # noqa: F811
    cfg, sample, output = config
    truth = np.repeat(TRUTH, 3, axis=0).repeat(4, axis=1)  # wide enough to have skeletons
    labels = np.repeat(LABELS, 3, axis=0).repeat(4, axis=1)
    for path, name, array in ((sample, cfg.DATA.NEURON_LABELS, truth), (output, "volumes/segmentation_050", labels)):
        write_array(path, name, array, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    evaluate(cfg)
    report = json.loads(scores_path(output).read_text())
    assert {one["name"] for one in report["skeletons"]["neurons"]} == {"1", "2"}
    swc = tmp_path / "one.swc"
    swc.write_text("".join(f"{n + 1} 0 {10 * n + 5} 15 15 1 {n or -1}\n" for n in range(8)))
    evaluate(cfg, swc)
    report = json.loads(scores_path(output).read_text())
    # 20 and 40 of 70 nm; the line between them has no segment.
    assert report["scores"][0]["erl_nm"] == pytest.approx((20**2 + 40**2) / 70)
    assert report["skeletons"]["neurons"][0]["splits"] == 1
    assert "Expected run length (ERL) 0.0286 µm of 0.07 µm" in scores_path(output, "html").read_text()


def test_broken_swc_ends_in_one_line(tmp_path):
    (tmp_path / "n.swc").write_text("1 0 1 2 3 1 -1\n2 0 1 2 3 1 9\n")
    script = Path(__file__).resolve().parents[1] / "06_evaluate_volumes.py"
    command = [sys.executable, str(script), "--skeletons", str(tmp_path / "n.swc"), "DATA.HOME", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "parent 9, which is missing" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ground_truth_in_another_file(config, tmp_path):  # noqa: F811
    cfg, _, output = config
    other = tmp_path / "other.zarr"
    write_array(other, "gt", TRUTH, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    write_array(other, "coarse", TRUTH, voxel_size=(20, 10, 10), offset=(0, 0, 0))
    write_array(output, "volumes/segmentation_050", LABELS, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    write_array(output, "volumes/pieces", TRUTH, voxel_size=(10, 10, 10), offset=(0, 0, 0))
    evaluate(cfg, None, other, "gt", "volumes/pieces")
    report = json.loads(scores_path(output).read_text())
    assert [row["dataset"] for row in report["scores"]] == ["volumes/pieces", "volumes/segmentation_050"]
    assert (report["best"], report["objects"]) == ("volumes/segmentation_050", 2)
    for dataset, message in (("coarse", "voxel sizes differ.*rescale.py"), ("none", "no dataset none")):
        with pytest.raises(UserError, match=message):
            evaluate(cfg, None, other, dataset)
