"""The website in front of Triton: the pages of the tasks, and the runs behind them. `make web` starts it."""
