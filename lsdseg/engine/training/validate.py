"""Validation during training. What counts is the segmentation, so the segmentation is scored.

A labeled crop that is not used for training is predicted and segmented in the same way as `predicter.py` and
`instance_segmenter.py` do it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.model_types import affinity_offsets, placement_offsets, task_channels
from lsdseg.data_utils.checks import check_training_volume
from lsdseg.data_utils.labels import is_labeled, open_labels
from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.volumes import has_array, open_array, read, source_defaults
from lsdseg.engine.evaluate.metrics import count_overlaps, scores
from lsdseg.engine.post.affinities import direct_neighbors
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.whole import check_settings, segmentations
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.engine.sections import ids_by_section, scored_by_section
from lsdseg.engine.training.runlog import log
from lsdseg.engine.training.trainer import Trainer
from lsdseg.errors import UserError
from lsdseg.models.checkpoint import read_checkpoint

BEST = "model_checkpoint_best"


class Validation:
    """Score the segmentation of a crop of a volume.

    Args:
        cfg: the config.
        left_out: labeled volumes that are not used for training.

    Raises:
        UserError: there is no volume to validate on, or it cannot be used; the model type predicts no affinities; the
            settings INS_SEGMENT cannot be used for them.
    """

    def __init__(self, cfg: CfgNode, left_out: list[Path]) -> None:
        if "affs" not in task_channels(cfg):
            raise UserError(
                f"TRAIN.VALIDATE_EVERY is {cfg.TRAIN.VALIDATE_EVERY}, but {cfg.TRAIN.MODEL_TYPE} predicts no "
                "affinities to segment: set it to 0"
            )
        if not cfg.TRAIN.VALIDATION_VOLUME and not left_out:
            raise UserError(
                f"TRAIN.VALIDATE_EVERY is {cfg.TRAIN.VALIDATE_EVERY}, but all volumes are used for training: name "
                "another one in TRAIN.VALIDATION_VOLUME, lower DATA.TRAIN_TEST_SPLIT, or set it to 0"
            )
        self.cfg, self.path = cfg, Path(cfg.TRAIN.VALIDATION_VOLUME or left_out[0])
        try:
            check_training_volume(self.path, cfg)
        except UserError as error:
            raise UserError(f"TRAIN.VALIDATION_VOLUME: {error}") from None
        self.offsets = [tuple(offset) for offset in affinity_offsets(cfg)]
        check_settings(cfg.INS_SEGMENT, self.offsets)
        self.raw, self.begin, self.labels = self._read_crop()
        self.best: float | None = None

    def run(self, trainer: Trainer, iteration: int) -> dict[str, float]:
        """Score the current weights, and save them as model_checkpoint_best if they are the best so far.

        Returns:
            The lowest VOI sum over INS_SEGMENT.THRESHOLDS, with its split, merge and threshold, by the names that they
            have in TensorBoard.
        """
        best = self._score(trainer)
        path = Path(self.cfg.MODEL.CKPT_FOLDER) / BEST
        if self.best is None:
            self.best = read_checkpoint(path).get("validation_voi", np.inf) if path.is_file() else np.inf
        text = f"iteration {iteration}: VOI sum {best['voi_sum']:.3f} at threshold {best['threshold']:.2f}"
        if best["voi_sum"] < self.best:
            self.best = best["voi_sum"]
            trainer.save(path, iteration, validation_voi=best["voi_sum"])
            text += f", the best so far: {path}"
        log.info(text)
        return {f"validation/{name}": value for name, value in best.items()}

    def _score(self, trainer: Trainer) -> dict[str, float]:
        """Return the scores at the best threshold."""
        cfg, labels = self.cfg, self.labels
        predictor = TilePredictor(cfg, trainer.prediction_network, trainer.precision)
        predicted = predictor.predict_box(self.raw, self.begin, labels.shape)
        affinities = method_of(cfg.INS_SEGMENT).channels(predicted["affs"], self.offsets)
        placement = None
        if "placement" in predicted and cfg.INS_SEGMENT.PLACEMENT:
            placement = direct_neighbors(predicted["placement"], [tuple(offset) for offset in placement_offsets(cfg)])
        found = []
        for name, segmentation, attributes in segmentations(
            affinities, self.offsets, cfg.INS_SEGMENT, placement=placement
        ):
            if name != FRAGMENTS:
                if scored_by_section(cfg):
                    segmentation = ids_by_section(segmentation, 0, {})
                row = scores(*count_overlaps([(segmentation, labels)]))
                voi = {score: float(row[score]) for score in ("voi_sum", "voi_split", "voi_merge")}
                found.append(voi | {"threshold": attributes.get("threshold", 0.0)})
        return min(found, key=lambda row: row["voi_sum"])

    def _read_crop(self) -> tuple[Array, tuple[int, ...], NDArray[np.uint64]]:
        """Open raw and read the labels in the middle of the volume.

        Returns:
            Raw, the first voxel of the crop in it, and the labels of the crop, 0 where they are unknown.
        """
        cfg, defaults = self.cfg, source_defaults(self.cfg)
        raw = open_array(self.path, cfg.DATA.RAW, **defaults)
        labels = open_labels(self.path, cfg.DATA.NEURON_LABELS, **defaults)
        shape = tuple(map(min, zip(labels.shape, cfg.TRAIN.VALIDATION_SHAPE, strict=True)))
        inside = tuple((size - s) // 2 for size, s in zip(labels.shape, shape, strict=True))
        where = tuple(slice(b, b + s) for b, s in zip(inside, shape, strict=True))
        truth = read(labels, where).astype(np.uint64)
        known = (truth != 0) & is_labeled(truth)
        if has_array(self.path, cfg.DATA.NEURON_LABELS_MASK):
            known &= read(open_array(self.path, cfg.DATA.NEURON_LABELS_MASK, **defaults), where) > 0
        if scored_by_section(cfg):
            truth = ids_by_section(truth, 0, {})
        truth = np.where(known, truth, np.uint64(0))
        if not known.any():
            raise UserError(
                f"{cfg.DATA.NEURON_LABELS} in {self.path} labels nothing in the {shape} voxels in its middle "
                "(TRAIN.VALIDATION_SHAPE): choose another TRAIN.VALIDATION_VOLUME, or a larger shape"
            )
        begin = (labels.roi.begin - raw.roi.begin) / raw.voxel_size
        return raw, tuple(b + i for b, i in zip(begin, inside, strict=True)), truth
