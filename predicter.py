"""Predict affinities and LSDs: python predicter.py -c CKPT_FOLDER/config_predict.yaml"""

from lsdseg.cli import deferred, run_script

predict = deferred("lsdseg.engine.predict.predict:predict")

if __name__ == "__main__":
    run_script(
        predict,
        description="Predict every zarr in HOME/DATA_DIR_PATH/BRAIN_VOL/data_3d/test with TRAIN.CHECKPOINT.",
        example="python predicter.py -c config/config_predict.py TRAIN.CHECKPOINT run1/model_checkpoint_300000",
        default_config="config/config_predict.py",
    )
