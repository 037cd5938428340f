"""The vision tower costs nothing where there are no images."""

from pathlib import Path

from ds_dgemma.model.build import build_stack
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.tools.tiny import make_tiny
from tests import generate_parity
from tests.benchmarks.step import make_batch


def test_without_images_the_tower_is_never_read_and_no_parameter_is_there(tmp_path: Path) -> None:
    make_tiny("shapes", tmp_path / "model")
    stack, spec = generate_parity.open_plain(tmp_path / "model"), read_spec(str(tmp_path / "model"))
    assert not [name for name, _ in stack.named_parameters() if "vision" in name]
    asked: list[str] = []
    stack.vision.read = lambda name, real: bool(asked.append(name))
    length = spec.canvas_length
    assert isinstance(length, int)
    batch = make_batch(20, length, 2, text_spec(spec).vocab_size, length)
    DenoisingObjective(stack, 1)(batch, TokenWeights(1.0, 1.0)).loss.backward()
    assert not asked
    trained = build_stack(spec, train_vision_embedding=True)
    assert [name for name, _ in trained.named_parameters() if "vision" in name] == [
        "embed_vision.embedding_projection.weight"
    ]
