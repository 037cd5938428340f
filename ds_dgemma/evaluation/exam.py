"""Questions that a model answers while it trains, on the engine as it is: ZeRO, expert parallelism, adapters, offload.

The ranks share the questions, and make the same calls. The n-th answer has the seed `seed + n`, on any topology.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import Said, said_of
from ds_dgemma.evaluation.evaluate import manner, samples, score
from ds_dgemma.evaluation.questions import Question, prompt_ids, read_questions
from ds_dgemma.evaluation.sampler import Group, Prompt, Sampler
from ds_dgemma.evaluation.sampler_settings import SamplerSettings, ends_of, in_words, read_settings
from ds_dgemma.evaluation.scores import summarise
from ds_dgemma.evaluation.tasks import Task, find_task
from ds_dgemma.ranks.layout import RankLayout, gather, sum_over_ranks


@dataclass(frozen=True)
class Exam:
    """Held-out questions with their prompts, and how they are answered."""

    questions: list[Question]
    prompts: list[Prompt]
    task_name: str
    task: Task
    settings: SamplerSettings
    tokenizer: PreTrainedTokenizerFast
    batch_size: int
    seed: int
    images: ImageFiles

    @classmethod
    def of(cls, config: RunConfig, directory: Path, tokenizer: PreTrainedTokenizerFast, images: ImageFiles) -> "Exam":
        """What a config asks for.

        Raises:
            UserError: an unknown task, rows that it is not for, settings that the sampler refuses.
        """
        own, data = config.evaluation, config.data
        assert own.task is not None  # the config was checked
        task, questions = find_task(own.task), read_questions(data, own.examples, "validation")
        for question in questions:
            score(task, question, "")
        prompts = prompt_ids(questions, tokenizer, data, images)
        settings = read_settings(directory, own.sampler.model_dump())
        return cls(questions, prompts, own.task, task, settings, tokenizer, own.batch_size, config.seed, images)

    @property
    def digest(self) -> str:
        """What is measured: the questions and their references, by which task, with answers sampled how."""
        asked = "\n".join(
            f"{ids} {q.reference}" + "".join(image.digest for image in ids.images)
            for ids, q in zip(self.prompts, self.questions, strict=True)
        )
        asked += f"\n{self.task_name} {self.settings.named()} {self.seed}"
        return f"{hashlib.sha256(asked.encode()).hexdigest()[:16]} {len(self.prompts)}"

    def check_measure(self, metric: str) -> None:
        """Refuse a measure that these questions would not give.

        Raises:
            UserError: `metric`, evaluation/NAME, is none that a best can be known by.
        """
        shares = summarise([score(self.task, question, "") for question in self.questions])
        known = [name for name, value in shares.items() if isinstance(value, float)] + ["stopped", "steps_per_canvas"]
        if metric.removeprefix("evaluation/") not in known:
            raise UserError(
                f"checkpoint.best_by: {metric} is nothing that this evaluation measures. It measures: "
                f"{', '.join(known)}."
            )

    def take(self, engine: Any, ranks: RankLayout) -> dict[str, Any]:
        """Answer all questions; shares by measure, the manner of the answers, and some of them, or `failed` and why.
        A collective.
        """
        engine.eval()
        any_rank = lambda holds: sum_over_ranks([holds], ranks.device)[0] > 0  # noqa: E731
        sampler = Sampler(engine.module.model, self.settings, ranks.device, any_rank, self.images)
        stops = ends_of(self.settings, self.tokenizer)
        said: dict[int, Said] = {}
        mine = list(range(ranks.rank, len(self.prompts), ranks.world))
        for start in range(0, -(-len(self.prompts) // ranks.world), self.batch_size):
            rows = mine[start : start + self.batch_size]
            answers = sampler.answer([Group([self.prompts[row]], self.seed + row) for row in rows])
            said |= {row: said_of(answer, stops, self.tokenizer) for row, (answer,) in zip(rows, answers, strict=True)}
        engine.train()
        everything: dict[int, Said] = {}
        for part in gather(said, ranks):
            everything |= part
        ordered = [everything[row] for row in range(len(self.prompts))]
        return gather(self._record(ordered) if ranks.is_main else {}, ranks)[0]

    def _record(self, said: list[Said]) -> dict[str, Any]:
        """What came of the answers; `failed`, where a user's task fails, which is no reason to end a training."""
        try:
            scores = [score(self.task, question, one.text) for question, one in zip(self.questions, said, strict=True)]
        except UserError as error:
            return {"failed": str(error)}
        report = summarise(scores)
        del report["groups"]
        return {
            **report,
            **manner(said, self.questions, self.tokenizer),
            "sampler": in_words(self.settings.named()),
            "answers": samples(self.questions, said, scores),
        }
