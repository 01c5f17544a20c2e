# The stock image of vLLM with this plugin in it.
ARG VLLM=v0.30.0
FROM vllm/vllm-openai:${VLLM}
COPY . /opt/vllm-cosmos3
RUN pip install --no-cache-dir /opt/vllm-cosmos3
EXPOSE 8000
ENTRYPOINT ["vllm-cosmos3", "serve"]
CMD ["nvidia/Cosmos3-Nano"]
