# The training image: NVIDIA's PyTorch with its own torch kept, or a plain Python; the locked environment; this project.
#   make image KIND=train                                                   on NVIDIA's image
#   make image KIND=train VARIANT=cpu                                       on a plain Python
#   docker build -f docker/train.Dockerfile --build-arg BASE_IMAGE=... .    on anything with apt
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3

# A folder of wheels for machines without network takes this place: --build-context wheels=FOLDER
FROM scratch AS wheels

# Only what says how the environment is installed, so that nothing else that is changed installs it anew.
FROM ${BASE_IMAGE} AS recipe
WORKDIR /recipe
COPY Makefile pyproject.toml train.lock ./
RUN sed -i '/^# --- environments/,$!d' Makefile && sed -i '/"torch==/!d' pyproject.toml

FROM ${BASE_IMAGE}
# tini: what is process 1 gets no signal that it has no handler for, and `docker stop` must end in a checkpoint.
# gcc: kernels are compiled for the processor that they find themselves on, when a training starts.
# hadolint ignore=DL3008 # Debian and Ubuntu keep only the newest version of a package
RUN export DEBIAN_FRONTEND=noninteractive && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev make tini \
    && { python3 -c 'import ensurepip, venv' 2>/dev/null || apt-get install -y --no-install-recommends python3 python3-venv; } \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log

WORKDIR /opt/gemma-nemo
COPY --from=recipe /recipe ./
# Settings of the network this is built in are mounted and leave nothing behind: a CA file, pip's and uv's configuration.
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip_conf --mount=type=secret,id=uv_toml \
    --mount=type=bind,from=wheels,target=/run/wheels --mount=type=cache,target=/root/.cache \
    settings() { [ ! -s "/run/secrets/$1" ] || export "$2=/run/secrets/$1"; } \
    && settings ca SSL_CERT_FILE && settings ca PIP_CERT && settings pip_conf PIP_CONFIG_FILE && settings uv_toml UV_CONFIG_FILE \
    && PIP_CONSTRAINT='' PIP_FIND_LINKS=/run/wheels UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 make PYTHON=python3 .venv/train.stamp

COPY . .
# Any user may run it (--user), so there is no home and no name but these.
RUN mkdir -m 1777 models data runs exports
ENV PATH=/opt/gemma-nemo/.venv/bin:${PATH} HOME=/tmp USER=gemma PYTHONUNBUFFERED=1
USER 10001:10001
# A training is judged by its exit code, its progress by runs/<task>/<run>/metrics.jsonl.
HEALTHCHECK NONE
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "commands.train", "task=slang"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="gemma-nemo train" \
      org.opencontainers.image.description="Fine-tunes a Gemma on a table of yours" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
