"""Building the model of a configuration, or of a layout and a size by name."""

from typing import Any

from .block_transformer import BlockTransformer
from .config import ArchConfig, ModelConfig, SizeConfig
from .decoder import Decoder
from .language_model import LanguageModel
from .named import model_config


def build(
    arch: ModelConfig | ArchConfig | str,
    size: SizeConfig | str | None = None,
    device_type: str = "cpu",
    *,
    backend: str = "auto",
    init: bool = True,
    seed: int = 0,
    **changes: Any,
) -> LanguageModel:
    """Build a decoder, or with `arch.block` a Block Transformer: `build("cla2", "tiny", num_layers=4)`.

    arch, size   names or objects, as in `model_config`; or a ModelConfig alone
    device_type  cpu or cuda: the device it will run on, which decides the attention backend
    backend      attention backend: auto, or a name from arch/attend.py
    init         draw the initial weights of `seed`; False leaves them undefined, for weights that are loaded. On the
                 meta device nothing is drawn
    changes      keys of the size

    Raises UnknownNameError on a name or key that does not exist, LayoutError if the layout is impossible, ValueError
    if the attention backend cannot run it, TypeError if arguments contradict each other.
    """
    if isinstance(arch, ModelConfig):
        if size is not None or changes:
            raise TypeError("a ModelConfig has its size; change it there")
        config = arch
    elif size is None:
        raise TypeError('build needs a size too: build("cla2", "tiny")')
    else:
        config = model_config(arch, size, **changes)
    model = (Decoder if config.arch.block is None else BlockTransformer)(config, backend, device_type)
    if init and not model.output_weight.is_meta:
        model.init_weights(seed)
    return model
