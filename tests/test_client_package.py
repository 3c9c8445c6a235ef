"""The client as a user installs it: from a wheel, into an environment that has nothing else of this project."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_serving import GREEDY, Stack, serve_tiny

DEPENDENCIES = {"tritonclient", "grpc", "numpy", "httpx"}
ASYNC_SCRIPT = """
import asyncio, sys
from gemma_client import AsyncClient

async def main() -> None:
    async with AsyncClient(sys.argv[1]) as client:
        whole = await client.ask("slang", context="In the rain. ", temperature=0, max_tokens=12)
        parts = [part async for part in client.ask("slang", context="In the rain. ", temperature=0, max_tokens=12)]
        assert "".join(parts) == whole.text
        print(whole.text)

asyncio.run(main())
"""
TYPED_SCRIPT = """
from gemma_client import Answer, Client, Stream

with Client("127.0.0.1:8001", deadline=30) as client:
    answer: Answer = client.ask("slang", context="In the rain. ")
    stream: Stream = client.chat([{"role": "user", "content": "Hi!"}], stream=True)
    pieces: list[str] = list(stream)
    tokens: int = answer.output_tokens
"""
MISTYPED = {
    'client.ask("slang", stream=True).text': '"Stream" has no attribute "text"',
    "client.generate(3)": 'incompatible type "int"; expected "str | Sequence[int]"',
    'Client("127.0.0.1:8001", deadlines=3)': 'Unexpected keyword argument "deadlines"',
}


def test_the_client_imports_only_its_own_modules_and_its_declared_dependencies() -> None:
    modules = [*(ROOT / "serving/client").glob("*.py"), ROOT / "core/prompt.py", *(ROOT / "core").glob("gemma4_*.py")]
    for module in modules:
        if module == ROOT / "serving/client/prompt.py":
            continue  # core/prompt.py takes its place in the wheel
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert roots <= DEPENDENCIES | sys.stdlib_module_names, f"{module}: {roots}"


@pytest.fixture(scope="module")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve_tiny(tiny_base, tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and its dependencies."""
    run("make", "client", f"PYTHON={sys.executable}", cwd=ROOT)
    wheel = max((ROOT / "dist").glob("gemma_nemo_client-*.whl"), key=lambda file: file.stat().st_mtime)
    environment = tmp_path_factory.mktemp("user") / "environment"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    return environment / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the repository."""
    return tmp_path


def run(*command: object, cwd: Path | None = None) -> str:
    # Nothing of this repository may be found through the environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_an_installation_has_neither_torch_nor_the_rest_of_this_project(installed: Path, elsewhere: Path) -> None:
    find = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    found = run(installed / "python", "-c", find, "gemma_client", "torch", "serving", "core", "docker", cwd=elsewhere)
    assert found == "['gemma_client']\n"


@pytest.mark.slow
def test_the_readme_example_runs_from_any_folder(installed: Path, stack: Stack, elsewhere: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "gemma_client" in block)
    assert "127.0.0.1:8001" in example
    (elsewhere / "example.py").write_text(example.replace("127.0.0.1:8001", stack.grpc))
    assert run(installed / "python", "example.py", cwd=elsewhere).strip()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_python_asyncio_and_the_command_line_give_the_same_answer(
    installed: Path, stack: Stack, elsewhere: Path, protocol: str
) -> None:
    url = getattr(stack, protocol)
    (elsewhere / "asynchronous.py").write_text(ASYNC_SCRIPT)
    text = run(installed / "python", "asynchronous.py", url, cwd=elsewhere)
    assert text.strip()
    greedy = [f"--{name.replace('_', '-')}={value}" for name, value in GREEDY.items()]
    ask = ("ask", "slang", "--url", url, *greedy)
    assert run(installed / "gemma-client", *ask, "context=In the rain. ", cwd=elsewhere) == text
    assert run(installed / "python", "-m", "gemma_client", *ask, "In the rain. ", cwd=elsewhere) == text
    assert "generates" in run(installed / "gemma-client", "health", "--url", url, cwd=elsewhere)


@pytest.mark.slow
def test_a_users_script_is_type_checked_against_the_installation(installed: Path, elsewhere: Path) -> None:
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python", "--cache-dir=cache")
    (elsewhere / "typed.py").write_text(TYPED_SCRIPT)
    run(*mypy, "typed.py", cwd=elsewhere)
    for line, complaint in MISTYPED.items():
        (elsewhere / "mistyped.py").write_text(f"{TYPED_SCRIPT}    {line}\n")
        words = [*map(str, mypy), "mistyped.py"]
        refused = subprocess.run(words, cwd=elsewhere, capture_output=True, text=True, timeout=300)
        assert refused.returncode == 1 and complaint in refused.stdout, refused.stdout
