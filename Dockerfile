# Trains and paints on an NVIDIA GPU. docs/docker.md says how to build and run it.
#
# The tag is exact. To pin the very image, add its digest: `docker buildx imagetools inspect python:3.12.11-slim-bookworm`
# prints it, and `python:3.12.11-slim-bookworm@sha256:...` takes no other.
FROM python:3.12.11-slim-bookworm

# PyTorch's wheels bring CUDA, and the driver comes from the host. `--compile` needs a C compiler for Triton's launchers.
# Debian keeps one version of a package only, so a pinned one would fail to install some day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user
WORKDIR /opt/semantic-fill

# The libraries change less often than the code, so they have a layer of their own.
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt bitsandbytes

COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY train_semantic_fill_lora.py pipeline_flux_fill_semantic.py semantic_attention.py ./
COPY semantic_fill ./semantic_fill
COPY configs ./configs
RUN pip install --no-cache-dir --no-deps .

# Models, data, results and compiled blocks live in the volume, which the user of the container has to be able to write.
ENV HF_HOME=/work/huggingface TORCHINDUCTOR_CACHE_DIR=/work/compiled PYTHONUNBUFFERED=1
RUN mkdir /work && chown user:user /work
USER 1000
WORKDIR /work
VOLUME /work

ENTRYPOINT ["accelerate", "launch"]
CMD ["/opt/semantic-fill/train_semantic_fill_lora.py", "--help"]
