"""Turns a table of rows into training data: `data/<task>/{training,validation,test}.jsonl` and `manifest.json`."""
