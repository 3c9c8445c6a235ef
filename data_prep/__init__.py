"""A table of rows becomes training data: `data/<task>/{training,validation,test}.jsonl` and `manifest.json`."""
