# docker build -t lsd .
# docker run --rm --gpus all -v /data:/data lsd python trainer.py -c config/config_cremi.py DATA.HOME /data
FROM python:3.12-slim

WORKDIR /lsd
# The dependencies first: this layer is built again only when the lists change.
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir --constraint constraints.txt .
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["bash"]
