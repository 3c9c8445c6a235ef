# The serving image: NVIDIA's Triton with vLLM, or a plain Python with the embedded engine and the Triton of pip; the
# locked environment; this project. It serves what exports/serve holds, see `python -m commands.prepare_serving`.
#   make image KIND=serve                                                   on NVIDIA's image
#   make image KIND=serve VARIANT=cpu                                       on a plain Python
#   docker build -f docker/serve.Dockerfile --build-arg BASE_IMAGE=... .    on anything with apt
ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.06-vllm-python-py3

# A folder of wheels for machines without network takes this place: --build-context wheels=FOLDER
FROM scratch AS wheels

# Only what says how the environment is installed, so that nothing else that is changed installs it anew.
FROM ${BASE_IMAGE} AS recipe
WORKDIR /recipe
COPY Makefile pyproject.toml serve.lock ./
RUN sed -i '/^# --- environments/,$!d' Makefile && sed -i '/"torch==/!d' pyproject.toml

FROM ${BASE_IMAGE}
# tini: what is process 1 gets no signal that it has no handler for, and `docker stop` must be heard.
# gcc: the embedded engine compiles its kernels for the processor that it finds itself on, when it starts.
# libpython: Triton runs Python models with it; Debian's Python leaves it out.
# hadolint ignore=DL3008 # Debian and Ubuntu keep only the newest version of a package
RUN export DEBIAN_FRONTEND=noninteractive && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev make tini \
    && { python3 -c 'import ensurepip, venv' 2>/dev/null || apt-get install -y --no-install-recommends python3 python3-venv; } \
    && { [ "$(command -v python3)" != /usr/bin/python3 ] || apt-get install -y --no-install-recommends \
        "libpython$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"; } \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log

WORKDIR /opt/gemma-nemo
COPY --from=recipe /recipe ./
# Settings of the network this is built in are mounted and leave nothing behind: a CA file, pip's and uv's configuration.
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip_conf --mount=type=secret,id=uv_toml \
    --mount=type=bind,from=wheels,target=/run/wheels --mount=type=cache,target=/root/.cache \
    settings() { [ ! -s "/run/secrets/$1" ] || export "$2=/run/secrets/$1"; } \
    && settings ca SSL_CERT_FILE && settings ca PIP_CERT && settings pip_conf PIP_CONFIG_FILE && settings uv_toml UV_CONFIG_FILE \
    && PIP_CONSTRAINT='' PIP_FIND_LINKS=/run/wheels UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 make PYTHON=python3 .venv-serve/serve.stamp

COPY . .
# Any user may run it (--user), so there is no home and no name but these. /serve is what model.json of vLLM names.
RUN mkdir -m 1777 models data runs exports && ln -s /opt/gemma-nemo/exports/serve /serve
ENV HOME=/tmp USER=gemma PYTHONUNBUFFERED=1
USER 10001:10001
# The gateway. Triton's own ports stay on the container's loopback address; `expose=grpc` after the command opens 8001.
EXPOSE 9000
# A server whose model hangs still says that it is ready: it is well when it generates, for this check or for others.
HEALTHCHECK --interval=30s --timeout=20s --start-period=300s --retries=3 CMD ["python3", "-c", "\
import urllib.request as web; web.urlopen('http://127.0.0.1:9000/health', timeout=15)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD [".venv-serve/bin/python", "-m", "commands.serve", "host=0.0.0.0"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="gemma-nemo serve" \
      org.opencontainers.image.description="Serves a Gemma and its adapters with Triton" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
