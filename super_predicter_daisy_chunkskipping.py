"""Predict block by block, only where there is data: python super_predicter_daisy_chunkskipping.py -c FILE"""

from functools import partial

from lsdseg.cli import deferred, run_script

predict_blockwise = deferred("lsdseg.engine.predict.blockwise:predict_blockwise")

if __name__ == "__main__":
    run_script(
        partial(predict_blockwise, skip_empty=True),
        description="Do what super_predicter_daisy.py does, but skip blocks outside the mask or without raw data.",
        example="python super_predicter_daisy_chunkskipping.py INS_SEGMENT.MASK_FILE mask.zarr",
        default_config="config/config_predict.py",
    )
