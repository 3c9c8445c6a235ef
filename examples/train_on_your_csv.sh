#!/bin/sh
# Fine-tune on a CSV file: bike_slang.csv, 48 terms written for this example. Takes a few minutes without a GPU.
#
#     examples/train_on_your_csv.sh                  # arguments are further settings, such as:
#     examples/train_on_your_csv.sh seed=1 task.train.learning_rate=1e-3
set -eu
cd "$(dirname "$0")/.."

# Columns may have other names (keyword, definition, usage, ...) and stand in any order.
csv=examples/bike_slang.csv

# Look at the rows first: the three splits, the text the model sees, and which rows were dropped and why.
make data TASK=slang SOURCE=$csv ARGS="$*"

# Train, then compare the base model and the fine-tuned one on rows that neither was trained on.
make train TASK=slang SOURCE=$csv ARGS="task.train.epochs=2 $*"
