"""Stop signals, from a scheduler or from a user's Ctrl-C, and the exit codes that tell a scheduler what to do."""

import os
import signal
from typing import Any

# Of sysexits.h. A scheduler may take either as "run the same command again, and it resumes".
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: stopped by a signal
EXIT_LOST = os.EX_UNAVAILABLE  # 69: a process or machine of the run is gone; resuming helps unless that recurs


class Stopped(BaseException):
    """The run was stopped by the signal `name`. Not an `Exception`, so that no library swallows it.

    Args:
        when: for the user's sentence, e.g. "after step 120; checkpoint written".
        name: "SIGTERM", "SIGUSR1" or "SIGINT".
    """

    def __init__(self, when: str, name: str) -> None:
        super().__init__(f"stopped by {name} {when}; run the same command to resume")
        self.exit_code = 130 if name == "SIGINT" else EXIT_STOPPED


class StopSignals:
    """Turns SIGTERM, SIGUSR1 (which Slurm is asked to send) and Ctrl-C into `Stopped`: at once, or during training
    after the current step. A second Ctrl-C does not wait for the step.

    Attributes:
        received: name of the signal, or "".
        in_training: set while a training loop runs, which then checks `received` after each step.
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
            raise Stopped("outside training, nothing is lost", self.received)
        if again and number == signal.SIGINT:
            raise Stopped("before the end of a step", self.received)
