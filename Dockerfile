# docker build --build-arg DEVICE=cuda -t spo:cuda .      (or cpu: 2 GB instead of 7)
# docker run --rm --gpus all -v spo-cache:/cache -v spo-data:/data -v "$PWD":/spo spo:cuda repro
FROM python:3.11-slim

ARG DEVICE=cuda
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir "uv>=0.9"

# the environment from the lock; made again only when the lock changes. CUDA comes with torch's wheels
WORKDIR /spo
COPY requirements.lock ./
COPY tools/cpu_lock.py tools/
RUN if [ "$DEVICE" = cuda ]; then \
      uv pip sync --system --no-cache --compile-bytecode requirements.lock; \
    elif [ "$DEVICE" = cpu ]; then \
      python tools/cpu_lock.py requirements.lock > /tmp/cpu.lock && \
      uv pip sync --system --no-cache --compile-bytecode /tmp/cpu.lock && \
      uv pip install --system --no-cache --no-deps --torch-backend cpu \
        $(grep -oE '^(torch|torchvision)==[^ ]+' requirements.lock); \
    else echo "DEVICE is $DEVICE: give cuda or cpu" >&2; exit 2; fi

COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . && spo --help > /dev/null

# caches and data outlive the container; whoever mounts a clone over /spo works in that clone
ENV HF_HOME=/cache/huggingface MLFLOW_DISABLE_TELEMETRY=true DVC_NO_ANALYTICS=1
RUN useradd --create-home --uid 1000 spo && mkdir -p /cache /data && chown -R spo /cache /data /spo
USER spo
RUN dvc config --local cache.dir /cache/dvc && git config --global --add safe.directory /spo
VOLUME ["/cache", "/data"]

ENTRYPOINT ["spo"]
CMD ["--help"]
