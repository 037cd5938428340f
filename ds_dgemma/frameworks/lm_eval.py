"""lm-evaluation-harness on DiffusionGemma: its own command, which knows the model `ds_dgemma` besides.

    python -m ds_dgemma.frameworks.lm_eval --model ds_dgemma --model_args pretrained=PATH --apply_chat_template \
        --tasks gsm8k_cot ...

PATH is a checkpoint, a hub id, a run's directory or a PEFT adapter; `adapter`, `step`, `revision`, `seed` and the
sampler's settings are further model arguments. Tasks that generate (`generate_until`) run; tasks that ask for
log-likelihoods are refused, for a block-diffusion model has none to give.

Source: lm_eval 0.4.13 `api/model.py`.
"""

# pyright: reportMissingImports=false
# an extra: not there where types are checked
import sys
from typing import Any

from ds_dgemma.errors import EXIT_USER_ERROR, UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    sys.exit(f"{error}. It comes with the extra: pip install -e '.[lm-eval]'")

from ds_dgemma.evaluation.prompts import check_known
from ds_dgemma.frameworks.served import answer_texts, cut, open_path, whole

NO_LIKELIHOOD = (
    "This task asks for log-likelihoods. DiffusionGemma denoises whole canvases and has no probability of a text to "
    "give; its encoder's next-token scores are those of another objective. Choose a task with generate_until."
)
USED = {"until", "max_gen_toks", "max_new_tokens"}


@register_model("ds_dgemma")
class DiffusionGemmaLM(LM):
    """A model that generates."""

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 64,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise UserError("--model_args pretrained=PATH is missing: a checkpoint, a run or an adapter.")
        if device not in (None, "cpu", "cuda", "cuda:0"):
            raise UserError(f"device {device}: the first GPU is used, or the CPU where there is none.")
        most = (max_batch_size or 64) if str(batch_size).startswith("auto") else batch_size
        self._batch_size = whole("batch_size", most, 1)
        self._seed, self._told = whole("seed", seed, 0), set[str]()
        self._model = open_path(str(pretrained), settings)

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes its rendering, for the harness's cache."""
        return str(self._model.found.model.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself; another one by name is not known."""
        if isinstance(chat_template, str):
            raise UserError(f"--apply_chat_template {chat_template}: the checkpoint has one template. Give no name.")
        return str(self._model.found.model.tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        continues = not add_generation_prompt
        return str(
            self._model.found.model.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continues,
            )
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer every request, the n-th with the seed `seed + n`; text before the first of `until`."""
        made: dict[int, str] = {}
        wanted = [_most(request.args[1]) for request in requests]
        for most in dict.fromkeys(wanted):
            rows = [n for n, one in enumerate(wanted) if one == most]
            prompts = [self._ids(requests[n].args[0]) for n in rows]
            seeds = [self._seed + n for n in rows]
            said = answer_texts(self._model, prompts, seeds, most, self._batch_size)
            for n, one in zip(rows, said, strict=True):
                asked = requests[n].args[1]
                self._tell_unused(asked)
                until = asked.get("until") or []
                made[n], _ = cut(one, most, [until] if isinstance(until, str) else until, self._model)
                self.cache_hook.add_partial("generate_until", requests[n].args, made[n])
        return [made[n] for n in range(len(requests))]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._model.found.model.tokenizer
        begin = str(tokenizer.bos_token or "")
        whole = text if text.startswith(begin) else begin + text
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        check_known(ids, self._model.found, "the prompt")
        return ids

    def _tell_unused(self, asked: dict[str, Any]) -> None:
        greedy = set() if asked.get("do_sample") else {"do_sample", "temperature"}  # asks for nothing
        if unused := asked.keys() - USED - greedy - self._told:
            self._told |= unused
            print(
                f"ds_dgemma: {', '.join(sorted(unused))} not used: the sampler's settings are model arguments (t_min, "
                "t_max, entropy_bound, ...).",
                file=sys.stderr,
            )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused."""
        raise UserError(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refused."""
        raise UserError(NO_LIKELIHOOD)


def _most(asked: dict[str, Any]) -> int | None:
    most = asked.get("max_gen_toks", asked.get("max_new_tokens"))
    return None if most is None else whole("max_gen_toks", most, 1)


def main() -> None:
    """lm_eval's command."""
    try:
        cli_evaluate()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
