"""A network for serial sections, trained on a phantom with thick sections."""

from test_training import SETTINGS

from lsdseg.config.loader import load_config
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import PREDICT_CONFIG, data_folder, output_path
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.data_utils.volumes import open_array, read
from lsdseg.engine.offsets import DIRECT_NEIGHBORS
from lsdseg.engine.post.affinities import voxel_pairs
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.training.train import train
from lsdseg.models.checkpoint import checkpoint_path

ITERATIONS = 120
# 40 x 10 x 10 nm: the first level leaves z alone, after which voxels are nearly cubes.
NETWORK = {
    "VOXEL_SIZE": (40, 10, 10),
    "NUM_FMAPS": 8,
    "NUM_FMAPS_OUT": 8,
    "FMAP_INC_FACTOR": 2,
    "DOWNSAMPLE_FACTORS": [[1, 2, 2], [1, 2, 2], [2, 2, 2]],
    "KERNEL_SIZE_DOWN": [[(1, 3, 3), (1, 3, 3)], *[[(3, 3, 3), (3, 3, 3)]] * 3],
    "KERNEL_SIZE_UP": [[(1, 3, 3), (1, 3, 3)], *[[(3, 3, 3), (3, 3, 3)]] * 2],
    "PAD_CONV": "same",
    "INPUT_SHAPE": (8, 64, 64),
    "GROW_INPUT": (8, 64, 64),
    "LSD_SIGMA": 80,
    "MAX_MISALIGN": 1,
    "PROB_ELASTIC": 0.2,
}


def test_a_network_for_thick_sections_learns_where_neurites_are_connected(tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("MODEL")}
    settings |= {f"MODEL_ANISO.{key}": value for key, value in NETWORK.items()}
    settings |= {"DATA.HOME": tmp_path, "DATA.FIB": 0, "TRAIN.EPOCHS": ITERATIONS, "TRAIN.SAVE_EVERY": ITERATIONS}
    settings |= {"TRAIN.INITIAL_LR": 3e-3, "TRAIN.LR_FAN_IN": 216, "TRAIN.WARMUP": 20, "TRAIN.LR_SCHEDULE": "cosine"}
    cfg = load_config(overrides=[str(part) for item in settings.items() for part in item])
    for split, seed in (("train", 0), ("test", 1)):
        path = data_folder(cfg, split) / "phantom.zarr"
        write_phantom(path, (24, 112, 112), seed=seed, voxel_size=NETWORK["VOXEL_SIZE"])
        create_labels_mask(path)
    train(cfg)

    checkpoint = checkpoint_path(cfg.MODEL.CKPT_FOLDER, ITERATIONS)
    trained = load_config(checkpoint.with_name(PREDICT_CONFIG), ["TRAIN.CHECKPOINT", str(checkpoint)])
    predict(trained)
    labels = read(open_array(path, "volumes/labels/neuron_ids"))
    predicted = read(open_array(output_path(trained, path), "volumes/pred_affs"))
    for channel, offset in zip(predicted, DIRECT_NEIGHBORS, strict=True):
        here, there = voxel_pairs(labels.shape, offset)
        connected = labels[here] == labels[there]
        values = channel[here] / 255
        assert values[connected].mean() - values[~connected].mean() > 0.15
