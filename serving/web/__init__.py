"""The website in front of Triton: slang, reviews, chat and the runs behind them. `make web` starts it."""
