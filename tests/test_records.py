import itertools
import json

import numpy as np
import pytest
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.config.rules import EDGES, FRAGMENTS, NETWORK, PREDICTION, RULES, SEGMENTATION, TRAINING, settings_of
from lsdseg.data_utils.records import Record, file_fingerprint, fingerprint, identity, record_of
from lsdseg.data_utils.volumes import create_array, open_array, write_array

PLACE = {"voxel_size": (8, 8, 8), "offset": (0, 0, 0)}


def test_every_key_says_what_it_affects():
    kinds = {NETWORK, TRAINING, PREDICTION, FRAGMENTS, EDGES, SEGMENTATION}
    silent = [key for key, rule in RULES.items() if rule.affects is None or not kinds.issuperset(rule.affects)]
    assert not silent, f"say in lsdseg/config/rules.py, by .on(...), what depends on {silent}"


def test_settings_are_those_of_the_network_in_use():
    iso, aniso = (
        settings_of(load_config(), PREDICTION),
        settings_of(load_config(overrides=["DATA.FIB", "0"]), PREDICTION),
    )
    assert "MODEL_ISO.INTENSITYSCALESHIFT_SCALE" in iso
    assert "MODEL_ANISO.INTENSITYSCALESHIFT_SCALE" in aniso
    assert not any("ANISO" in key for key in iso)
    json.dumps(iso)


class Watched(CfgNode):
    """A section that remembers which keys are read."""

    def __getattr__(self, name):
        if name.isupper():
            self.__dict__.setdefault("_seen", set()).add(name)
        return super().__getattr__(name)

    @property
    def seen(self):
        return self.__dict__.get("_seen", set())


def test_what_fragments_read_is_what_they_depend_on():
    """Every key of INS_SEGMENT that makes fragments differ, or is read to make them, is compared."""
    from lsdseg.engine.post.methods import method_of

    affinities = np.random.default_rng(0).random((9, 12, 12, 12), np.float32)
    offsets = load_config(overrides=["TRAIN.NEIGHBORHOOD", "LR_NEIGHBORHOOD"]).TRAIN.LR_NEIGHBORHOOD
    for method in ("waterz", "mutex"):
        settings = Watched(load_config(overrides=["INS_SEGMENT.METHOD", method]).INS_SEGMENT)
        method_of(settings).fragments(method_of(settings).channels(affinities, offsets), settings, offsets)
        read = settings.seen
        assert read >= {"METHOD", "FILTER_FRAGMENTS"}
        for key in read:
            assert {FRAGMENTS, SEGMENTATION} <= set(RULES[f"INS_SEGMENT.{key}"].affects), key


def test_a_record_outlives_its_file_and_names_what_changed(tmp_path):
    before = Record("step", {"raw": "1", "the mask": "2"}, {"A.B": (1, 2), "A.C": None})
    write_array(tmp_path / "a.zarr", "x", np.zeros((2, 2, 2)), **PLACE, attributes=before.attributes)
    stored = record_of(open_array(tmp_path / "a.zarr", "x"))
    assert (stored.id, identity(open_array(tmp_path / "a.zarr", "x"))) == (before.id, before.id)
    assert stored.differences(before) == []
    now = Record("step", {"raw": "3", "weights": "4"}, {"A.B": (1, 3), "A.C": None})
    assert now.id != before.id
    assert stored.differences(now) == [
        "raw was replaced",
        "the mask is not used now",
        "weights was not used",
        "A.B was [1, 2], is [1, 3]",
    ]


@pytest.mark.parametrize("damaged", [None, 7, "id", [], {"id": 1}, {"id": 1, "step": 2, "inputs": 3, "settings": 4}])
def test_what_is_no_record_counts_as_none(damaged):
    assert Record.from_json(damaged) is None


def test_a_fingerprint_knows_voxels_and_placement_but_not_the_folder(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, (20, 20, 20), np.uint8)
    first = fingerprint(write_array(tmp_path / "a.zarr", "x", data, **PLACE))
    assert fingerprint(write_array(tmp_path / "b.zarr", "y/z", data, **PLACE)) == first
    changed = data.copy()
    changed[3, 4, 5] += 1
    others = [
        write_array(tmp_path / "c.zarr", "x", changed, **PLACE),
        write_array(tmp_path / "d.zarr", "x", data, voxel_size=(8, 8, 4), offset=(0, 0, 0)),
        write_array(tmp_path / "e.zarr", "x", data, voxel_size=(8, 8, 8), offset=(8, 0, 0)),
        write_array(tmp_path / "f.zarr", "x", data.astype(np.uint16), **PLACE),
    ]
    assert len({first, *map(fingerprint, others)}) == 5


def test_a_fingerprint_of_a_huge_volume_reads_a_few_chunks(tmp_path):
    array = create_array(tmp_path / "a.zarr", "x", (20_000,) * 3, **PLACE, dtype=np.uint8, chunk_shape=(64, 64, 64))
    assert fingerprint(array) == fingerprint(array)


def test_a_file_is_known_by_its_content(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    changed = bytearray(content)
    changed[-1] ^= 1
    for name, written in zip("abcd", [content, content, bytes(changed), content[:-1]], strict=True):
        (tmp_path / name).write_bytes(written)
    prints = {name: file_fingerprint(tmp_path / name) for name in "abcd"}
    assert prints["a"] == prints["b"]
    assert all(prints[x] != prints[y] for x, y in itertools.combinations("acd", 2))
