"""Facts about first-generation Qwen that are said twice, since to import their source takes seconds."""

from finetune.folders import model_folder
from qwen_model import tokenization_qwen


def test_the_special_tokens_are_counted_as_the_tokenizer_lists_them():
    assert model_folder.SPECIAL_TOKENS == len(tokenization_qwen.SPECIAL_TOKENS)
