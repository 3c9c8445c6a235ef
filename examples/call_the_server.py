"""Ask a running server, first with this project's client, then with the openai package.

    make serve TASKS=slang                # in another terminal; wait for "Ready"
    pip install . openai                  # the client brings neither PyTorch nor Triton
    python examples/call_the_server.py

For a server elsewhere, give the two addresses: call_the_server.py http://HOST:9000 http://HOST:9000/v1
"""

import sys

from gemma_client import Client
from openai import OpenAI

SCENE = "You missed the last bus home and it starts to rain."

triton_address, openai_address = sys.argv[1:] or ("127.0.0.1:8001", "http://127.0.0.1:9000/v1")

with Client(triton_address) as client:
    print("Adapters:", ", ".join(adapter.name for adapter in client.adapters()))

    # The server knows the prompt that the adapter was trained with; its fields are keyword arguments.
    answer = client.ask("slang", context=SCENE, temperature=0)
    print(f"\nThe adapter answers ({answer.output_tokens} tokens):\n{answer.text}")
    for field, text in answer.fields.items():
        print(f"  {field} = {text!r}")

    # The same question to the base model, printed as it is generated.
    print("\nThe base model answers:")
    for piece in client.ask("slang", context=SCENE, temperature=0, base=True, stream=True):
        print(piece, end="", flush=True)

# To an OpenAI client each adapter is a model, and the last message fills the prompt's main field.
openai = OpenAI(base_url=openai_address, api_key="-")
completion = openai.chat.completions.create(model="slang", messages=[{"role": "user", "content": SCENE}], temperature=0)
print(f"\n\nThe adapter answers through the OpenAI API:\n{completion.choices[0].message.content}")
