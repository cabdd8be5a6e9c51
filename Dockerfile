# One image per kind of device:
#
#   docker build --target cpu -t apt-jax:cpu .
#   docker build --target gpu -t apt-jax:gpu .     # NVIDIA; the CUDA libraries come with JAX, the driver from the host
#   docker build --target tpu -t apt-jax:tpu .     # Cloud TPU VM
#
#   docker run --rm --stop-timeout 60 -p 127.0.0.1:8000:8000 -v apt-jax:/data apt-jax:cpu [MODEL] [flags of apt-jax serve]
#
# --stop-timeout must be longer than --shutdown-timeout (30 s): Docker's own 10 s would kill the server before it has
# written down what is unfinished.
# /data keeps models from the hub, compiled programs and the snapshot of unfinished requests from run to run.

# hadolint global ignore=DL3013
# (what pip installs is this folder, whose dependencies are ranges)
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY apt_jax apt_jax
COPY pallas_kernels pallas_kernels
COPY checkpoints checkpoints
COPY serve serve
RUN useradd --create-home --uid 10001 apt && mkdir /data && chown apt /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health is 200 from the first second on and 503 once the engine has failed for good
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["apt-jax", "serve", "--host", "0.0.0.0", "--compilation-cache-dir", "/data/xla", \
  "--snapshot-file", "/data/unfinished.jsonl", "--resume-from", "/data/unfinished.jsonl"]

FROM base AS gpu
RUN pip install '.[gpu,otel]'
USER 10001
WORKDIR /data

# the TPU's device files belong to root
FROM base AS tpu
RUN pip install '.[tpu,otel]'
WORKDIR /data

# g++ compiles the attention kernels for the host's own instructions at the first start
FROM base AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV XDG_CACHE_HOME=/data/cache
RUN pip install '.[otel]'
USER 10001
WORKDIR /data
