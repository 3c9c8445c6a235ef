"""Being told to stop: by a scheduler, by a user's Ctrl-C."""

import signal
from typing import Any

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: what a scheduler may take as "start the same command again"
LOST = 69  # EX_UNAVAILABLE: a process or machine of the run has gone; the same command goes on, if that does not recur


class Stopped(BaseException):
    """The run was told to stop; the text is for the user. Not an `Exception`, so that no library swallows it."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(f"stopped by {name} {text}; the same command goes on")
        self.exit_code = 130 if name == "SIGINT" else TRY_AGAIN


class StopSignals:
    """SIGTERM, SIGUSR1 (what Slurm is asked to send) and Ctrl-C: `Stopped` at once, or in training after the step.

    A second Ctrl-C does not wait for the step.
    """

    def __init__(self) -> None:
        self.received = ""
        self.in_training = False
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        again, self.received = self.received, signal.Signals(number).name
        if not self.in_training:
            raise Stopped("outside of training, nothing is lost", self.received)
        if again and number == signal.SIGINT:
            raise Stopped("before the end of a step", self.received)
