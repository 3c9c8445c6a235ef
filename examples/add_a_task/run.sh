#!/bin/sh
# A task of your own that needs Python, kept outside this project's folders:
#
#     nemo_configs/task/opening_hours.yaml    columns, prompt, settings
#     tasks/opening_hours/rows.py             how a row of the table becomes rows to learn
#     places.csv                              the table
#
# The first two are found because this folder is on PYTHONPATH. Arguments are further settings, such as seed=1.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH=examples/add_a_task

make data TASK=opening_hours ARGS="$*"
make train TASK=opening_hours ARGS="$*"
