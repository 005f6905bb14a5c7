# docker build -t m4 . && docker run --gpus all -v "$PWD/runs:/m4/runs" -v "$PWD/data:/m4/data" m4 configs/quickstart.py
# EXTRA: cuda, tpu, or "" for a CPU.
FROM python:3.12-slim
ARG EXTRA=cuda
WORKDIR /m4
COPY pyproject.toml README.md LICENSE ./
COPY m4 m4
COPY tokenizers tokenizers
RUN pip install --no-cache-dir -e ".${EXTRA:+[$EXTRA]}"
COPY . .
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
