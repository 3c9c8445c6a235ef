"""Record what the README's first command came to on this machine, for the table in the README.

    make train TASK=slang && .venv/bin/python -m benchmarks.default_run

Takes the newest finished run of the default configuration and writes benchmarks/results/default-run/<machine>.json.
"""

from benchmarks.figures import result_file
from core.configuration import load_config, plain
from core.errors import UserError, run
from core.files import write_json
from core.run_folder import Run, finished_runs


def main(argv: list[str]) -> None:
    config = load_config(argv)
    runs = [Run.read(folder) for folder in finished_runs(config)]
    settings = plain(config.task.train)
    default = [found for found in runs if found.config["task"]["train"] == settings and not found.config["seed"]]
    if not default:
        raise UserError("no finished run of the default configuration. Train one: make train TASK=slang")
    evaluation, environment = default[-1].evaluation, default[-1].environment
    assert environment  # training writes it
    file = result_file("default-run", environment.machine)
    write_json(
        file,
        {
            "machine": environment.machine,
            "finished": evaluation.finished,
            "commit": environment.commit,
            "command": environment.command,
            "packages": environment.packages,
            "training_seconds": evaluation.training_seconds,
            "peak_memory_gib": evaluation.peak_memory_gib,
            "perplexity_before": evaluation.before.perplexity,
            "perplexity_after": evaluation.after.perplexity,
            "held_out_rows": evaluation.held_out_rows,
        },
    )
    print(file)


if __name__ == "__main__":
    run(main)
