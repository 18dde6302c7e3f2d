# docker build -t lsd . && docker run --rm --gpus all -v /data:/data lsd python trainer.py -c config/config_cremi.py DATA.HOME /data
FROM python:3.12-slim

WORKDIR /lsd
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir --constraint constraints.txt '.[test]'
COPY . .
CMD ["python", "-m", "pytest"]
