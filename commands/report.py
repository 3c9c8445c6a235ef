"""Ask base and fine-tuned model of the newest run the same questions, measure their answers, and write the report.

python -m commands.report task=slang [run=FOLDER]
"""

from core.artifacts import Metrics
from core.configuration import load_config
from core.errors import UserError, run
from core.run_folder import Run, newest_run
from evaluation.gate import pass_gate, pass_scores
from evaluation.report import evaluate, show, write


def main(argv: list[str]) -> int:
    config = load_config(argv)
    finished = Run.read(newest_run(config))
    if finished.task != config.task.name:
        raise UserError(f"{finished.folder} is a run of {finished.task}: make report TASK={finished.task}")
    evaluate(finished, config)
    report = write(finished.folder)
    metrics, settings = Metrics.read(finished.folder / "metrics.json"), config.task.evaluate
    show(metrics)
    print(report)
    return max(pass_gate(finished.evaluation, settings.min_gain), pass_scores(metrics, settings.min_scores))


if __name__ == "__main__":
    run(main)
