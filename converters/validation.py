"""Validation of untrusted checkpoints: is it a Gemma with the shapes of its configuration, and are its values
finite?"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from converters.checkpoint import Checkpoint, LazyTensor
from converters.layerwise_forward import FAMILIES, empty_model
from converters.safetensors_file import NAMES
from core.errors import UserError

MAX_LAYERS = 200  # Gemma's largest has 62


def check_shapes(checkpoint: Checkpoint, where: Path) -> None:
    """Check names, shapes and dtypes of all tensors, without reading them.

    Args:
        where: for error messages.

    Raises:
        UserError: another family than the text models of Gemma 1 to 4; a missing or unexpected tensor, or one of
            another shape or dtype than its configuration asks for.
    """
    config = checkpoint.config
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where} holds a model of type {str(family)[:40]!r}; only Gemma 1, 2, 3 and 4 (text) are converted"
        )
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {str(layers)[:40]}, which no Gemma has")
    try:
        model = empty_model(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception as error:  # transformers raises various errors for invalid values
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{where}: its configuration is none of a {family} ({type(error).__name__}: {reason})"
        ) from None
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = checkpoint.tensors
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{where} has no {name}, which its configuration asks for; copy or download it again")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{where} holds {name}, which a {family} of {layers} layers does not have")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{where}: {name} has shape {list(found[name].shape)}; its configuration asks for {list(shape)}"
            )
        if found[name].dtype not in NAMES:
            raise UserError(f"{where}: {name} is of {found[name].dtype}, which is no whole weight of 16 or 32 bits")


def validated(
    tensors: Mapping[str, LazyTensor], where: Path, seen: Callable[[int], object] = lambda size: None
) -> dict[str, LazyTensor]:
    """`tensors` of the file `where`, each validated when it is read; `seen` is then called with its size in bytes.

    Reading raises a UserError if the file cannot be read or the values are not finite.
    """
    return {name: _validated(name, tensor, where, seen) for name, tensor in tensors.items()}


def _validated(name: str, tensor: LazyTensor, where: Path, seen: Callable[[int], object]) -> LazyTensor:
    def read() -> Tensor:
        try:
            values = tensor.read()
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(f"{where}: {name} cannot be read ({type(error).__name__}: {reason})") from None
        if tuple(values.shape) != tuple(tensor.shape) or values.dtype != tensor.dtype:
            raise UserError(
                f"{where}: {name} is {values.dtype} {list(values.shape)}, not {tensor.dtype} {list(tensor.shape)}"
            )
        if not _finite(values):
            raise UserError(f"{where}: {name} holds values that are not finite numbers")
        seen(tensor.nbytes)
        return values

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _finite(values: Tensor) -> bool:
    """Whether all are. A sum, which one of them that is not spoils, takes half the time of looking for the ends; finite
    ones may overflow it."""
    return bool(values.sum().isfinite()) or all(end.isfinite() for end in values.aminmax())
