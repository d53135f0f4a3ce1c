"""What a user names to ask, compare or prove: a model's folder, a hub id, or an adapter's folder with its base."""

import functools
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..folders import adapter_base, hub, meant, model_folder

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # defaults: not used, and no warning


@dataclass
class Opened:
    """A model that can be loaded. adapter: its folder, or None; folder: the model's, or the adapter's base's."""

    name: str
    folder: Path
    adapter: Path | None

    @functools.cached_property
    def tokenizer(self):
        """Opened when it is asked for, after all folders have been looked at: it takes the seconds of importing transformers."""
        from ..model import adapter_fits, loading, whole_base

        if problems := model_folder.value_problems(self.folder) or whole_base.problems(self.folder):
            raise UserError(*problems)
        if self.adapter is not None:
            adapter_fits.check(self.folder, self.adapter)
        return loading.load_tokenizer(self.folder)

    def load(self, dtype=None, device=None):
        """The model in evaluation, as it was trained: over quantized weights, if it was.

        dtype: None as stored; device: None the GPU if there is one.
        """
        import torch

        from ..folders import shards
        from ..model import loading

        tokenizer = self.tokenizer  # first: what is wrong with it is said before weights are read
        if self.adapter is not None:
            loaded = loading.load_tuned(self.folder, self.adapter, dtype or shards.stored_dtype(self.folder))
        else:
            loaded = loading.load_weights(self.folder, dtype or "auto", half_on_cuda=False)
            loading.set_chat_settings(loaded, tokenizer)  # a base model answers too, as well as it can
        return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def open_named(name: str, base: str | None = None) -> Opened:
    """Finds the files. base: of an adapter whose own has moved. UserError for an incomplete folder."""
    folder = Path(name)
    if is_adapter(name):
        return Opened(name, adapter_base.find(folder, base), folder)
    if base is not None:
        raise UserError(f"--base {base}: {name} is a whole model, which has none - leave it out")
    folder = hub.find_folder(name)
    if not (folder / "config.json").is_file():
        what = f"{name}: neither config.json nor adapter_config.json there - give the folder of a model, or of a LoRA run"
        raise UserError(what + meant.folder(name, meant.EITHER))
    if problems := model_folder.first_problems(folder, may_be_quantized=True):
        raise UserError(*problems)
    return Opened(name, folder, None)
