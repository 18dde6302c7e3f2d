"""Predict affinities and LSDs block by block: python super_predicter_daisy.py -c FILE"""

from lsdseg.cli import deferred, run_script

predict_blockwise = deferred("lsdseg.engine.predict.blockwise:predict_blockwise")

if __name__ == "__main__":
    run_script(
        predict_blockwise,
        description="Predict every test volume block by block, on SYSTEM.NUM_WORKERS workers or Slurm jobs.",
        example="python super_predicter_daisy.py -c config/config_predict.py SYSTEM.NUM_WORKERS 4",
        default_config="config/config_predict.py",
    )
