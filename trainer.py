"""Train a network: python trainer.py -c config/config_cremi.py TRAIN.EPOCHS 1000"""

from lsdseg.cli import deferred, run_script

train = deferred("lsdseg.engine.training.train:train")

if __name__ == "__main__":
    run_script(
        train,
        description="Train the configured network on every volume in HOME/DATA_DIR_PATH/BRAIN_VOL/data_3d/train.",
        example="python trainer.py -c config/config_cremi.py DATA.HOME /data TRAIN.EPOCHS 100000",
        default_config="config/config.py",
    )
