# The server with CPU torch. Build:  docker build -t optserve .
# A torch build of another index (pip's --index-url):  --build-arg TORCH_INDEX=...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/optserve
WORKDIR /src
# torch first and in its own layer: it is the largest part and changes least.
COPY constraints.txt ./
RUN /opt/optserve/bin/pip install -c constraints.txt "$(grep '^torch==' constraints.txt)" \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY client client
COPY service service
RUN /opt/optserve/bin/pip install -c constraints.txt ./client ./service

FROM ${BASE}
COPY --from=build /opt/optserve /opt/optserve
RUN useradd --system --no-create-home --uid 10001 optserve
RUN mkdir /data && chown optserve /data
USER optserve
ENV PATH=/opt/optserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OPTSERVE_DATA_DIR=/data
VOLUME /data
EXPOSE 8000
# Inside a container every interface is the container's own; publish the port on loopback only.
ENTRYPOINT ["optserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
