"""`gemma-client COMMAND`: ask a served model from the command line. `gemma-client --help` lists the commands."""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .async_client import DEFAULT_URL
from .errors import Busy, DeadlineExceeded, InvalidRequest, ServingError, Unavailable
from .sync_client import Client, Stream

ABOUT = """\
examples:
  gemma-client ask squid_game "Is it too violent?" --json
  gemma-client ask slang context="You missed the last bus home." condition="Be brief."
  gemma-client chat                      talk; Ctrl-C stops an answer, Ctrl-D leaves
  gemma-client chat dialogue.json        answer the last message of a file
  echo "Once upon a time" | gemma-client generate - --base --max-tokens 40

exit codes: 0 answered, 1 the server failed, 2 the request is wrong, 3 the server is busy or unavailable, 4 a deadline
was exceeded, 130 Ctrl-C, which cancels the answer in the engine too. The value of SERVING_TOKEN is sent as a bearer
token, for a proxy that asks for one.
"""
EXIT_CODES = {InvalidRequest: 2, Busy: 3, Unavailable: 3, DeadlineExceeded: 4, ServingError: 1}
RETRY_SECONDS = 5.0  # short: somebody is waiting
# Control characters, which a terminal would execute rather than show.
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int}


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with one of its codes; a user's mistake gives one sentence and no traceback."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and (options.run is not _ask or any(argument.startswith("-") for argument in rest)):
        hint = "; fields of the prompt are written FIELD=TEXT" if options.run is _ask else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:  # argparse ends a list of arguments at the first option
        options.question += rest
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    token = os.environ.get("SERVING_TOKEN")
    try:
        with Client(
            options.url,
            headers={"authorization": f"Bearer {token}"} if token else None,
            ca_file=options.ca_file,
            deadline=options.deadline,
            retry_for=min(RETRY_SECONDS, (options.deadline or math.inf) / 2),
        ) as client:
            sys.exit(options.run(client, options))
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--url", default=DEFAULT_URL, help=f"HOST:PORT or grpc(s)://, http(s)://; default {DEFAULT_URL}")
    every.add_argument("--ca-file", type=Path, metavar="PEM", help="the authority that signed the server's certificate")
    every.add_argument(
        "--deadline", type=_seconds, metavar="SECONDS", help="for the whole answer; default: as long as it takes"
    )
    every.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    asks = argparse.ArgumentParser(add_help=False, parents=[every])
    asks.add_argument("--base", action="store_true", help="ask the base model alone, without the adapter")
    asks.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print the answer as it is generated; the default on a terminal",
    )
    for name, kind in SAMPLING.items():
        asks.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N")
    asks.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")

    parser = argparse.ArgumentParser(
        prog="gemma-client",
        description="Ask a served model.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Client, argparse.Namespace], int], about: str, parent: Any = asks) -> Any:
        added = commands.add_parser(name, help=about, description=about, parents=[parent])
        added.set_defaults(run=run)
        return added

    ask = command("ask", _ask, "ask the adapter of a task")
    ask.add_argument("adapter", help="gemma-client adapters lists them and the fields of their prompts")
    ask.add_argument(
        "question",
        nargs="*",
        metavar="QUESTION | FIELD=TEXT",
        help="a question, - for standard input, or fields of the task's prompt; its defaults fill those left out",
    )
    chat = command("chat", _chat, "talk, or answer the last message of a file")
    chat.add_argument("file", nargs="?", help='JSON: [{"role": "user", "content": "…"}, …], or {"messages": […]}')
    chat.add_argument("--adapter", default="chat", help="default chat")
    chat.add_argument("--think", action="store_true", help="let the model think first, to standard error; Gemma 4 can")
    generate = command("generate", _generate, "continue a text as it is")
    generate.add_argument("text", help="or - for standard input")
    generate.add_argument("--adapter", help="default: the base model alone")
    command("adapters", _adapters, "list what is served", every)
    command("health", _health, "generate one token, to see whether the server works", every)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def _ask(client: Client, options: argparse.Namespace) -> int:
    question = _question(options.question)
    return _show(client.ask(options.adapter, question, stream=True, base=options.base, **_sampling(options)), options)


def _question(arguments: list[str]) -> str | dict[str, str]:
    """The question, or values of the prompt's fields: `context=… condition=…`.

    Raises:
        InvalidRequest: several arguments that are not all of the form FIELD=TEXT.
    """
    fields = [re.fullmatch(r"([A-Za-z_]\w*)=(.*)", argument, re.DOTALL) for argument in arguments]
    if all(fields):
        return {field[1]: field[2] for field in fields if field}
    if len(arguments) > 1:
        wrong = arguments[fields.index(None)]
        raise InvalidRequest(f"give either one question, in quotes, or FIELD=TEXT arguments; {wrong!r} is neither")
    return _text(arguments[0])


def _generate(client: Client, options: argparse.Namespace) -> int:
    adapter = None if options.base else options.adapter
    return _show(client.stream(_text(options.text), adapter, **_sampling(options)), options)


def _adapters(client: Client, options: argparse.Namespace) -> int:
    found = client.adapters()
    if options.json:
        print(json.dumps([asdict(adapter) for adapter in found], ensure_ascii=False))
    for adapter in [] if options.json else found:
        print(f"{adapter.name:16} {adapter.title}, on {adapter.base}; asked with {', '.join(adapter.fields)}")
    return 0


def _health(client: Client, options: argparse.Namespace) -> int:
    names = [adapter.name for adapter in client.adapters()]  # also connects, before the clock starts
    begin = time.monotonic()
    client.generate("Hello", max_tokens=1, temperature=0)
    seconds = round(time.monotonic() - begin, 3)
    if options.json:
        print(json.dumps({"generates": True, "seconds": seconds, "adapters": names}))
    else:
        print(f"{client.url} generates; a token took {seconds} s. Adapters: {', '.join(names) or 'none'}")
    return 0


def _chat(client: Client, options: argparse.Namespace) -> int:
    def answer(messages: list[dict[str, str]]) -> Stream:
        asked = {"base": options.base, "forget": True, "thinking": options.think, **_sampling(options)}
        return client.chat(messages, options.adapter, stream=True, **asked)

    if options.file:
        return _show(answer(_messages(options.file)), options)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then has line editing and a history)

        print("Ctrl-C stops an answer, Ctrl-D leaves, /reset starts a new dialogue", file=sys.stderr)
    messages: list[dict[str, str]] = []
    for line in _lines():
        if line == "/reset":
            messages = []
            continue
        stream = answer([*messages, {"role": "user", "content": line}])
        try:
            _show(stream, options)
        except KeyboardInterrupt:
            stream.cancel()
            print("\nstopped", file=sys.stderr)
        except InvalidRequest as error:  # another message may be accepted
            print(f"error: {error}", file=sys.stderr)
            continue
        if stream.answer.text.strip():
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": stream.answer.text}]
    return 0


def _lines() -> Iterator[str]:
    """The lines typed until Ctrl-D, or read from a pipe, without empty ones."""
    prompt = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _messages(name: str) -> Any:
    try:
        found = json.loads(_text("-") if name == "-" else Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON in UTF-8: {error}") from None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise InvalidRequest(f'{name} contains no messages: [{{"role": "user", "content": "…"}}, …]')
    return messages


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in (*SAMPLING, "stop")}
    return {name: value for name, value in given.items() if value is not None}


def _show(stream: Stream, options: argparse.Namespace) -> int:
    """Print an answer, as a whole or as it is generated."""
    begin, first, terminal = time.monotonic(), None, sys.stdout.isatty()
    streams = not options.json and (terminal if options.stream is None else options.stream)
    with stream:
        while (part := stream.part()) is not None:
            first = first or time.monotonic() - begin
            for text, out in ((part.thought, sys.stderr), (part.text, sys.stdout)):
                if streams and text:
                    print(text.translate(CONTROLS) if out.isatty() else text, end="", flush=True, file=out)
    answer = stream.answer
    if options.json:
        times = {"seconds": round(time.monotonic() - begin, 3), "first_token_seconds": round(first or 0, 3)}
        print(json.dumps({**asdict(answer), **times}, ensure_ascii=False))
    elif streams:
        print()
    else:
        print(answer.text.translate(CONTROLS) if terminal else answer.text)
    if answer.forgotten and not options.json:
        print(f"the oldest {answer.forgotten} exchanges no longer fit and were left out", file=sys.stderr)
    if answer.finish_reason == "length" and not options.json:
        print(f"cut after {answer.output_tokens} tokens; raise the limit with --max-tokens", file=sys.stderr)
    return 0
