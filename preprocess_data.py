"""Derive new data sets from a data set: python preprocess_data.py -c FILE PREPROCESS.EXPORT_2D_FROM_3D True"""

from lsdseg.cli import deferred, run_script

preprocess = deferred("lsdseg.data_utils.preprocess:preprocess")

if __name__ == "__main__":
    run_script(
        preprocess,
        description="Export sections (PREPROCESS.EXPORT_2D_FROM_3D) or match gray values (PREPROCESS.HISTOGRAM_MATCH).",
        example="python preprocess_data.py -c config_cremi.py PREPROCESS.EXPORT_2D_FROM_3D True",
        default_config="config/config.py",
    )
