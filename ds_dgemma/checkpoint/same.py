"""What a checkpoint does not go on with: another model, another optimizer, other data."""

from ds_dgemma.checkpoint.run_state import Checkpoint
from ds_dgemma.errors import UserError


def check_same_model(path: str, digest: str, checkpoint: Checkpoint) -> None:
    """Refuse to go on from, or to export into, other weights: what was not trained is read from them.

    Raises:
        UserError: the model at `path`, of which `digest` is, changed since the checkpoint.
    """
    if checkpoint.state.get("model_digest", digest) != digest:
        raise UserError(
            f"model.path: {path} has changed since {checkpoint.path} was written: other tensors or other values. "
            "Restore the model that the run started from, or choose a new run.dir."
        )


def check_same_data(source: str, checkpoint: Checkpoint, digest: str, examples: int) -> None:
    """Refuse to go on with other data: a step's batch would be another one.

    Raises:
        UserError: the content of `data.train` changed since the checkpoint.
    """
    before = checkpoint.state.get("data_digest", digest)
    if before != digest:
        raise UserError(
            f"data.train: {source} has changed since {checkpoint.path.name} was written: "
            f"{checkpoint.state['examples']:,} examples then, {examples:,} now, or other text. Restore it; or export "
            "that checkpoint and start a new run from the export, with the new data."
        )


def check_same_optimizer(wanted: str, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another optimizer: the moments of one are nothing to the other.

    Raises:
        UserError: `optimizer.type` changed since the checkpoint.
    """
    before = checkpoint.state.get("optimizer", "adamw")
    if before != wanted:
        raise UserError(
            f"optimizer.type: {wanted}, but {checkpoint.path.name} was written by {before}, whose moments are others. "
            f"Set optimizer.type: {before}; or export that checkpoint and start a new run from the export."
        )
