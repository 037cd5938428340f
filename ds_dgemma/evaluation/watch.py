"""A canvas in the terminal while it is denoised: the likeliest tokens, coloured by how sure the model is."""

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from ds_dgemma.evaluation.sampler import Draft

# nats of entropy below which a token has a colour; accepted ones are bold
COLOURS = ((0.1, "green"), (0.7, "yellow"), (2.0, "dark_orange"), (float("inf"), "red"))
LONGEST = 0.05  # seconds between two pictures


class Watch:
    """Shows the first prompt's canvases; what is finished stays on the screen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, console: Console | None = None) -> None:
        self._tokenizer, self._console = tokenizer, console or Console(stderr=True)
        self._live: Live | None = None

    def __call__(self, draft: Draft) -> None:
        if draft.row:
            return
        if draft.step == 1 or self._live is None:
            self.close()
            self._live = Live(console=self._console, refresh_per_second=1 / LONGEST)
            self._live.start()
        self._live.update(self.picture(draft))

    def picture(self, draft: Draft) -> Text:
        """The canvas as text."""
        sure = int((draft.entropy_L < COLOURS[0][0]).sum())
        shown = Text(f"step {draft.step}, {sure} of {len(draft.tokens)} tokens sure\n", style="dim")
        for token, entropy, accepted in zip(
            draft.tokens.tolist(), draft.entropy_L.tolist(), draft.is_accepted_L.tolist(), strict=True
        ):
            colour = next((colour for bound, colour in COLOURS if entropy < bound), "red")
            shown.append(str(self._tokenizer.decode([token])), f"bold {colour}" if accepted else colour)
        return shown

    def close(self) -> None:
        """Leave the last picture where it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None
