# The HTTP service (docs/serve.md) on CPUs: docker build -t dinov3 . && docker run --rm -p 127.0.0.1:8000:8000 dinov3
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dinov3 dinov3
RUN pip install --no-cache-dir '.[serve]' && useradd --create-home --uid 1000 dinov3
USER dinov3
WORKDIR /home/dinov3
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"
# The container's network is published by `docker run -p`; the Host header must still name this machine.
ENTRYPOINT ["dinov3", "serve", "--host", "0.0.0.0", "--port", "8000"]
