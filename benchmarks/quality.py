"""How well quality.py finds merges and splits: python benchmarks/quality.py -c CONFIG

Run quality.py first. A segment counts as merged if a second neuron fills more than 1000 of its voxels, without the
voxels next to a boundary of the ground truth. Segments of up to 1000 voxels are left out. A contact counts as a split
if both segments are mostly of one neuron. "doubt, neck" is the order by the rank in doubt plus half the rank in neck,
"listed" the order of the list: by affinity, less half of the disagreement if that was kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from yacs.config import CfgNode

from lsdseg.cli import run_script
from lsdseg.data_utils.labels import grow_boundary
from lsdseg.data_utils.layout import quality_path
from lsdseg.data_utils.volumes import open_array, read
from lsdseg.engine.evaluate.metrics import count_overlaps
from lsdseg.engine.sample import samples_of
from lsdseg.files import read_json

VOXELS = 1000
MERGES = ("doubt", "worst_nm", "voxels", "caliber", "neck", "disagreement")
SPLITS = ("affinity", "faces", "voxels", "disagreement")


def main(cfg: CfgNode) -> None:
    """Print, for each sample and order, the area under the curve and the precision at 10."""
    for sample in samples_of(cfg):
        report = read_json(quality_path(sample.output), "run quality.py first")
        segmentation = read(open_array(sample.output, report["segmentation"]))
        pairs, counts = count_overlaps([(segmentation, grow_boundary(read(sample.ground_truth), 1))])
        large = [row for row in report["segments"] if row["voxels"] > VOXELS]
        merged = np.array([(counts[pairs[:, 0] == row["segment"]] > VOXELS).sum() > 1 for row in large])
        print(f"{sample.output.name}/{report['segmentation']}: {merged.sum()} of {len(merged)} segments are merged")
        columns = columns_of(large, MERGES)
        for name in [name for name in MERGES[3:] if name in columns]:
            columns[f"doubt, {name}"] = rankdata(columns["doubt"]) + rankdata(columns[name]) / 2
        for name, values in columns.items():
            print(f"  by {name:19} {scores(values, merged)}")

        neuron = {}  # of each segment, the one that fills most of it
        for row in np.argsort(counts):
            if pairs[row, 1]:
                neuron[pairs[row, 0]] = pairs[row, 1]
        contacts = report["splits"]
        split = np.array([neuron.get(row["segment"], -1) == neuron.get(row["other"], -2) for row in contacts])
        print(f"  {split.sum()} of {len(split)} contacts are splits")
        listed = {"listed": -np.arange(len(contacts))}
        for name, values in (listed | columns_of(contacts, SPLITS)).items():
            print(f"  by {name:19} {scores(values, split)}")


def columns_of(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a list that are known: disagreement may not be."""
    return {name: np.array([row[name] for row in rows]) for name in names if None not in (row[name] for row in rows)}


def scores(values: np.ndarray, wrong: np.ndarray) -> str:
    """Area under the curve, and precision among the first 10 and 50, of an order by values."""
    ranks, first = rankdata(values)[wrong], wrong[np.argsort(-values)]
    area = (ranks.sum() - len(ranks) * (len(ranks) + 1) / 2) / max(1, len(ranks) * (len(wrong) - len(ranks)))
    return f"area {area:.2f}, precision at 10 {first[:10].mean():.1f}, at 50 {first[:50].mean():.2f}"


if __name__ == "__main__":
    run_script(
        main,
        description="Compare the ranking of quality.py with the ground truth.",
        example="python benchmarks/quality.py -c pretrained/config_fib25.py DATA.HOME /data",
        default_config="config/config_predict.py",
    )
