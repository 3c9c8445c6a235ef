"""Builds the client's wheel (see pyproject.toml) with core/prompt.py in it: the client asks as the training did."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildClient(build_py):
    def run(self) -> None:
        super().run()
        self.copy_file("core/prompt.py", str(Path(self.build_lib, "gemma_client", "prompt.py")))


setup(cmdclass={"build_py": BuildClient})
