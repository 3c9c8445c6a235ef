"""How many tokens of prompts a step may compute, by the time that steps have taken so far."""

STEP_SECONDS = 0.12  # target of a step with prompts, while nobody waits for a next token
SLOWER = 1.8  # times as long as without prompts: aimed at while streams wait for their next tokens, so that 2 holds
MIN_TOKENS, MAX_TOKENS = 8, 512  # of a step, however long they take


class PromptBudget:
    """Follows the machine: what a token of a prompt costs, and what a step costs without prompts."""

    def __init__(self) -> None:
        self._token_seconds = STEP_SECONDS / 64  # of one token of a prompt
        self._step_seconds: float | None = None  # of a step without prompts

    def tokens(self, streams: int) -> int:
        """For the next step, in which `streams` requests compute one token each."""
        seconds = STEP_SECONDS
        if streams and self._step_seconds is not None:
            seconds = min(STEP_SECONDS, (SLOWER - 1) * self._step_seconds)
        return int(min(max(seconds / self._token_seconds, MIN_TOKENS), MAX_TOKENS))

    def learn(self, streams: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many tokens of streams and of prompts took so long."""
        if not prompt_tokens:
            known = self._step_seconds
            self._step_seconds = seconds if known is None else (known + seconds) / 2
        elif prompt_tokens >= self.tokens(streams) // 2:  # a few tokens cost as much as reading the weights
            if streams and self._step_seconds is not None:
                seconds -= self._step_seconds
            # One step that was disturbed, or streams that were slower than usual, change little.
            found = min(max(seconds / prompt_tokens, self._token_seconds / 2), self._token_seconds * 2)
            self._token_seconds = (self._token_seconds + found) / 2
