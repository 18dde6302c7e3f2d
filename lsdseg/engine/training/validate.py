"""Validation during training: what counts is the segmentation, so that is what is scored.

A labelled crop that is not trained on is predicted and segmented as `predicter.py` and `instance_segmenter.py` do it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from lsdseg.config.model_types import affinity_offsets, task_channels
from lsdseg.data_utils.checks import check_training_volume
from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.volumes import has_array, open_array, read, source_defaults
from lsdseg.engine.evaluate.metrics import count_overlaps, scores
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.whole import check_settings, segmentations
from lsdseg.engine.predict.tiles import TilePredictor
from lsdseg.engine.sections import ids_by_section, scored_by_section
from lsdseg.errors import UserError
from lsdseg.models.checkpoint import read_checkpoint

BEST = "model_checkpoint_best"


class Validation:
    """A crop to score segmentations on.

    Args:
        cfg: resolved config.
        left_out: labelled volumes that are not trained on.

    Raises:
        UserError: there is no volume to validate on, or it cannot be used, or the model type predicts no affinities,
            or INS_SEGMENT cannot be used for them.
    """

    def __init__(self, cfg, left_out: list[Path]):
        if "affs" not in task_channels(cfg):
            raise UserError(
                f"TRAIN.VALIDATE_EVERY is {cfg.TRAIN.VALIDATE_EVERY}, but {cfg.TRAIN.MODEL_TYPE} predicts no "
                "affinities to segment: set it to 0"
            )
        if not cfg.TRAIN.VALIDATION_VOLUME and not left_out:
            raise UserError(
                f"TRAIN.VALIDATE_EVERY is {cfg.TRAIN.VALIDATE_EVERY}, but every volume is trained on: name another one "
                "in TRAIN.VALIDATION_VOLUME, lower DATA.TRAIN_TEST_SPLIT, or set it to 0"
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

    def run(self, trainer, iteration: int) -> dict[str, float]:
        """Score the weights, and keep them as model_checkpoint_best if they are the best so far.

        Returns:
            The lowest VOI sum over INS_SEGMENT.THRESHOLDS, with its split, merge and threshold, for TensorBoard.
        """
        found = self._score(trainer)
        path = Path(self.cfg.MODEL.CKPT_FOLDER) / BEST
        if self.best is None:
            self.best = read_checkpoint(path).get("validation_voi", np.inf) if path.is_file() else np.inf
        text = f"iteration {iteration}: VOI sum {found['voi_sum']:.3f} at threshold {found['threshold']:.2f}"
        if found["voi_sum"] < self.best:
            self.best = found["voi_sum"]
            trainer.save(path, iteration, validation_voi=found["voi_sum"])
            text += f", the best so far: {path}"
        tqdm.write(text)
        return {f"validation/{name}": value for name, value in found.items()}

    def _score(self, trainer) -> dict[str, float]:
        cfg, labels = self.cfg, self.labels
        predictor = TilePredictor(cfg, trainer.predicting, trainer.precision)
        affinities = predictor.region(self.raw, self.begin, labels.shape)["affs"]
        affinities = method_of(cfg.INS_SEGMENT).channels(affinities, self.offsets)
        found = []
        for name, segmentation, attributes in segmentations(affinities, self.offsets, cfg.INS_SEGMENT):
            if name != FRAGMENTS:
                if scored_by_section(cfg):
                    segmentation = ids_by_section(segmentation, 0, {})
                row = scores(*count_overlaps([(segmentation, labels)]))
                voi = {score: float(row[score]) for score in ("voi_sum", "voi_split", "voi_merge")}
                found.append(voi | {"threshold": attributes.get("threshold", 0.0)})
        return min(found, key=lambda row: row["voi_sum"])

    def _read_crop(self):
        """Raw, where the crop begins in it (voxels), and the crop's labels, 0 where nothing is known; uint64."""
        cfg, defaults = self.cfg, source_defaults(self.cfg)
        raw = open_array(self.path, cfg.DATA.RAW, **defaults)
        labels = open_array(self.path, cfg.DATA.NEURON_LABELS, **defaults)
        shape = tuple(map(min, zip(labels.shape, cfg.TRAIN.VALIDATION_SHAPE, strict=True)))
        inside = tuple((size - s) // 2 for size, s in zip(labels.shape, shape, strict=True))
        where = tuple(slice(b, b + s) for b, s in zip(inside, shape, strict=True))
        truth = read(labels, where).astype(np.uint64)
        known = (truth != 0) & is_labeled(truth)
        if has_array(self.path, cfg.DATA.NEURON_LABELS_MASK):
            known &= read(open_array(self.path, cfg.DATA.NEURON_LABELS_MASK, **defaults), where) > 0
        if scored_by_section(cfg):
            truth = ids_by_section(truth, 0, {})
        truth = np.where(known, truth, 0)
        if not known.any():
            raise UserError(
                f"{cfg.DATA.NEURON_LABELS} in {self.path} labels nothing in the {shape} voxels in its middle "
                "(TRAIN.VALIDATION_SHAPE): take another TRAIN.VALIDATION_VOLUME, or a larger shape"
            )
        begin = (labels.roi.begin - raw.roi.begin) / raw.voxel_size
        return raw, tuple(b + i for b, i in zip(begin, inside, strict=True)), truth
