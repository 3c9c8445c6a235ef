"""Builds the client's wheel (see pyproject.toml), with core/prompt.py in the place of serving/client/prompt.py, and
beside it the files that it imports.

So client and training write a prompt with the same code, and the client needs nothing else of this project.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROMPT = ("core/prompt.py", "core/gemma4_turns.py", "core/gemma4_answers.py")


class BuildClient(build_py):
    def run(self) -> None:
        package = Path(self.build_lib, "gemma_client")
        shutil.rmtree(package, ignore_errors=True)  # an earlier build may have left modules that no longer exist
        super().run()
        if package.is_dir():  # it is not for an editable installation, which uses serving/client itself
            for file in PROMPT:
                shutil.copy(file, package)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *PROMPT]


setup(cmdclass={"build_py": BuildClient})
