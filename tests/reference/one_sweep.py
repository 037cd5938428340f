"""The layers over clean tokens and canvases in one call each and one graph: the definition that the visits of
`ds_dgemma/model/sweep.py` take apart.
"""

from torch import Tensor, cat

from ds_dgemma.model.sweep import Call, Sweep


def in_one_sweep(sweep: Sweep, clean_NH: Tensor, canvas_NH: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Normed hidden states of both."""
    hidden = cat([clean_NH, canvas_NH])[None]
    for layer_pass in sweep._passes:
        hidden = layer_pass.layer.block(hidden, call).hidden_1NH
    hidden = sweep._norm(hidden[0])
    return hidden[: len(clean_NH)], hidden[len(clean_NH) :]
