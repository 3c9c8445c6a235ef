"""A program for an interpreter that has xllamacpp: llama.cpp's own logits and tokens, for the tests of GGUF files.

Reads a line of JSON from stdin: "model" and "lora" (paths, the second may be empty), "prompts" (lists of ids), "texts"
and "vocabulary" (its size); writes one: "log_probabilities" (a list for each prompt's next token) and "tokens" (ids of
each text).
"""

import json
import os
import sys
import urllib.request

import xllamacpp as llama


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the server prints to stdout
    params = llama.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx, params.warmup = job["model"], 1, 256, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # As exact as it can be: keys and values are in float16 by default.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["lora"]:
        adapter = llama.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["lora"], 1.0
        params.lora_adapters = [adapter]
    server = llama.Server(params)
    shown = job["vocabulary"] - 1  # a token with a text of its own is generated; the probabilities are as without that
    request = {"n_predict": 1, "temperature": 0, "n_probs": job["vocabulary"], "cache_prompt": False}
    request |= {"logprobs": job["vocabulary"], "max_tokens": 1, "logit_bias": [[shown, 1e3]]}
    found: dict[str, list[list[float]]] = {"log_probabilities": [], "tokens": []}
    for ids in job["prompts"]:
        said = server.handle_completions({**request, "prompt": ids})
        by_token = {one["id"]: one["logprob"] for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        found["log_probabilities"].append([by_token[number] for number in range(job["vocabulary"])])
    for text in job["texts"]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        asked = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as response:
            found["tokens"].append(json.load(response)["tokens"])
    print(json.dumps(found), file=answer, flush=True)
    os._exit(0)  # without the server's long goodbye


if __name__ == "__main__":
    main()
