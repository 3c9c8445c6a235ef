"""Ask a served Gemma: by task, in a dialogue or with plain text; as a whole or streamed; always within a deadline.

    from gemma_client import Client  # inside this project's repository: from serving.client import Client

    with Client("127.0.0.1:8001") as client:  # gRPC; also grpcs://…, http://127.0.0.1:9000 and https://…
        print(client.ask("slang", context="You missed the last bus home.").text)
        for part in client.chat([{"role": "user", "content": "Hi!"}], stream=True):
            print(part, end="", flush=True)

    async with AsyncClient() as client:
        answer = await client.ask("squid_game", "Is it violent?")
        async for part in client.ask("squid_game", "Is it violent?"): ...

Every adapter comes from the server with the prompt it was trained with, so a question is put to the model exactly as in
training. `gemma-client --help` describes the command line.

    sync_client.py    Client, for programs without an event loop
    async_client.py   AsyncClient: deadlines, and a second attempt where the first got no answer at all
    adapter.py        what is served, and how a question becomes a prompt
    transport.py      gRPC and HTTP
    errors.py         one exception class for each kind of failure
    command_line.py   gemma-client

The package needs neither PyTorch nor anything else of this project; `pip install .` in the repository's root installs
it alone.
"""

from .adapter import BASE, Adapter, Answer, Message, TokenLogprob
from .async_client import DEFAULT_URL, AsyncClient, AsyncStream
from .errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, TooLong, Unavailable, UnknownAdapter
from .prompt import AnswerPart, ToolCall
from .sync_client import Client, Stream

__all__ = [
    "BASE",
    "DEFAULT_URL",
    "Adapter",
    "Answer",
    "AnswerPart",
    "AsyncClient",
    "AsyncStream",
    "Busy",
    "Client",
    "DeadlineExceeded",
    "InvalidRequest",
    "Message",
    "ServingError",
    "Stream",
    "TokenLogprob",
    "TooLong",
    "ToolCall",
    "Unavailable",
    "UnknownAdapter",
]
